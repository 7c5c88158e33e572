"""The text encoder and the U-Net of the small model."""

from __future__ import annotations

import copy
import logging
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from library.world import draw, scenes, tokenizer
from library.world.backward import autocast, backward_of
from library.world.descent import Descent
from library.world.scenes import BACKGROUNDS, COLOURS, RELATIONS, SHAPES, SIZES, STYLES, TEXTURES, Scene

logger = logging.getLogger(__name__)

POSITIONS = 32  # tokens of a prompt, with start and end
TEXT_ENCODER: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "projection_dim": 128,
    "max_position_embeddings": POSITIONS,
}
UNET = {
    "sample_size": draw.SIZE // 4,
    "block_out_channels": (64, 128, 192),
    "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
    "attention_head_dim": 4,  # the number of heads, in Stable Diffusion 1.x's configuration
    "cross_attention_dim": 128,
    "norm_num_groups": 8,
}
# Stable Diffusion's schedule but for its end: 0.012 leaves 7% of the latents' mean in what is called pure noise, from
# which a model learns the background (Lin et al., arXiv 2305.08891); here 1.6% is left.
SCHEDULER = {
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "beta_end": 0.02,
    "clip_sample": False,
    "set_alpha_to_one": False,
    "timestep_spacing": "trailing",
    "steps_offset": 1,
}
CAPTIONS_PER_SCENE = 4
UNCONDITIONAL = 0.1  # share of empty captions, for classifier-free guidance
SAVE_EVERY = 1000  # steps
AVERAGED = 0.999  # decay of the average of weights
GAMMA = 5.0  # of min-SNR (Hang et al., arXiv 2303.09556)


def words() -> list[str]:
    """The words of the captions."""
    names = (*SHAPES, *COLOURS, *BACKGROUNDS, *TEXTURES, *SIZES, *STYLES, *scenes.NUMBERS)
    plural = [scenes.plural(shape) for shape in SHAPES]
    others = "a an on of to the and left right above below background picture drawing pencil 2 3"
    return sorted({*names, *plural, *others.split()})


class Parser(nn.Module):
    """Reads off the text encoder's last state what a caption says.

    Trained before the U-Net, so that the text encoder knows from the start what goes with what, as Stable Diffusion's
    does; then thrown away.
    """

    HEADS: ClassVar[dict[str, int]] = {
        **{f"{name} {i}": len(values) for i in (0, 1) for name, values in
           (("shape", SHAPES), ("colour", COLOURS), ("texture", TEXTURES))},
        "relation": len(RELATIONS) + 2, "number": 3, "size": len(SIZES), "style": len(STYLES),
        "background": len(BACKGROUNDS) + 1,
    }  # fmt: skip

    def __init__(self, width: int) -> None:
        super().__init__()
        self.heads = nn.Linear(width, sum(self.HEADS.values()))

    def forward(self, states: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Cross-entropy, and the share of right answers, from states (b, width) and targets (b, heads), -1 unsaid."""
        parts = self.heads(states).split(list(self.HEADS.values()), -1)
        pairs = list(zip(parts, targets.T, strict=True))
        loss = torch.stack([F.cross_entropy(part, target, ignore_index=-1) for part, target in pairs]).sum()
        right = torch.stack([part.argmax(-1) == target for part, target in pairs], 1)
        return loss, right[targets >= 0].float().mean()

    @classmethod
    def targets(cls, scene: Scene, text: str, background: bool) -> list[int]:
        """What this caption of the scene says, by head."""
        unordered = " and " in text
        said = dict.fromkeys(cls.HEADS, -1)
        for i, thing in enumerate(scene.things[: 2 if scene.relation else 1]):
            if not unordered:
                said |= {f"shape {i}": SHAPES.index(thing.shape), f"colour {i}": COLOURS.index(thing.colour),
                         f"texture {i}": TEXTURES.index(thing.texture)}  # fmt: skip
        said["relation"] = 3 if unordered else 2 if scene.relation is None else RELATIONS.index(scene.relation)
        said["number"] = 1 if scene.relation else len(scene.things) - 1
        said["size"] = SIZES.index(scene.size)
        said["style"] = STYLES.index(scene.style)
        said["background"] = BACKGROUNDS.index(scene.background) if background else len(BACKGROUNDS)
        return list(said.values())


def tokens(tokenizer: CLIPTokenizer, captions: list[str]) -> Tensor:
    """Token numbers (b, POSITIONS)."""
    return tokenizer(
        captions, padding="max_length", max_length=POSITIONS, truncation=True, return_tensors="pt"
    ).input_ids


def build_text_encoder(tokenizer: CLIPTokenizer) -> CLIPTextModel:
    """With random weights."""
    ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id,
           "pad_token_id": tokenizer.pad_token_id}  # fmt: skip
    return CLIPTextModel(CLIPTextConfig(**TEXT_ENCODER, vocab_size=len(tokenizer), **ids))


def train_text_encoder(
    text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, steps: int, batch_size: int, device: torch.device, seed: int
) -> None:
    """Teaches it to parse captions (`Parser`)."""
    torch.manual_seed(seed)
    rng = random.Random(f"text encoder {seed}")
    parser = Parser(TEXT_ENCODER["hidden_size"]).to(device)
    text_encoder.train()
    parameters = [*text_encoder.parameters(), *parser.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01)
    descent = Descent("text encoder", optimizer, steps)
    for _ in range(steps):
        captions, targets = [], []
        for _ in range(batch_size):
            scene, background = scenes.draw_scene(rng), rng.random() < scenes.BACKGROUND_SAID
            captions.append(scenes.caption(scene, rng, background))
            targets.append(Parser.targets(scene, captions[-1], background))
        ids = tokens(tokenizer, captions)
        ends = (ids == tokenizer.eos_token_id).int().argmax(1)
        with autocast(device):
            states = text_encoder(ids.to(device))[0]
        loss, right = parser(states[torch.arange(len(ids)), ends].float(), torch.tensor(targets, device=device))
        loss.backward()
        descent.step("parsed", right)


@dataclass
class Pictures:
    """The training set: latents' means and spreads (n, 4, 16, 16) in float16, tokens (n, CAPTIONS_PER_SCENE, 32)."""

    means: Tensor
    spreads: Tensor
    captions: Tensor

    def batch(self, size: int, generator: torch.Generator, empty: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (size, 4, 16, 16) and tokens (size, 32), where the pictures are; `empty` is the empty caption's."""
        drawn: dict[str, Any] = {"generator": generator, "device": self.means.device}
        rows = torch.randint(len(self.means), (size,), **drawn)
        which = torch.randint(CAPTIONS_PER_SCENE, (size,), **drawn)
        noise = torch.randn((size, *self.means.shape[1:]), **drawn)
        dropped = torch.rand(size, **drawn) < UNCONDITIONAL
        latents = self.means[rows].float() + self.spreads[rows].float() * noise
        return latents, torch.where(dropped[:, None], empty, self.captions[rows, which].long())


@torch.no_grad()
def make_pictures(
    vae: AutoencoderKL, tokenizer: CLIPTokenizer, number: int, device: torch.device, seed: int
) -> Pictures:
    """Draws, captions and encodes the training set."""
    rng = random.Random(f"pictures {seed}")
    means, spreads, captions = [], [], []
    start = time.time()
    vae.to(device)
    for first in range(0, number, 128):
        batch = [scenes.draw_scene(rng) for _ in range(min(128, number - first))]
        with autocast(device):
            posterior = vae.encode(draw.render([scene.picture() for scene in batch], device)).latent_dist
        means.append(posterior.mean.half())
        spreads.append(posterior.std.half())
        texts = [scenes.caption(scene, rng) for scene in batch for _ in range(CAPTIONS_PER_SCENE)]
        captions.append(tokens(tokenizer, texts).short().unflatten(0, (len(batch), -1)).to(device))
    logger.info(f"{number} pictures encoded in {time.time() - start:.0f} s")
    return Pictures(torch.cat(means), torch.cat(spreads), torch.cat(captions))


def learning_rate(step: int, steps: int) -> float:
    """1e-3 after a warm-up, falling to zero over the last quarter."""
    return 1e-3 * min(1.0, (step + 1) / 200, 4 * (steps - step) / steps)


class NoiseLoss(nn.Module):
    """How far the noise that text encoder and U-Net predict is from the noise: a mean square, to be trained on."""

    def __init__(self, unet: UNet2DConditionModel, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.unet, self.text_encoder = unet, text_encoder

    def forward(self, noisy: Tensor, t: Tensor, ids: Tensor, noise: Tensor) -> Tensor:
        """Of noisy latents (b, 4, 16, 16) at timesteps t (b,), with captions' tokens (b, POSITIONS)."""
        with autocast(noisy.device):
            predicted = self.unet(noisy, t, self.text_encoder(ids)[0]).sample
        return F.mse_loss(predicted.float(), noise)


def train_unet(
    unet: UNet2DConditionModel,
    text_encoder: CLIPTextModel,
    pictures: Pictures,
    empty: Tensor,
    steps: int,
    batch_size: int,
    device: torch.device,
    seed: int,
    checkpoint: Path,
    stop: int | None = None,
) -> tuple[UNet2DConditionModel, CLIPTextModel]:
    """Trains both, and returns the moving averages of their weights.

    Every step draws its numbers from its own seed, so a run that goes on from `checkpoint` is the run that was broken
    off. Timesteps are drawn with min-SNR's weights as their density, which weights no sample.

    :param stop: step to break off at
    """
    schedule = DDIMScheduler(**SCHEDULER)
    kept = schedule.alphas_cumprod
    ratio = kept / (1 - kept)
    density = ratio.clamp(max=GAMMA) / ratio
    shares = (density / density.sum()).cumsum(0).to(device)
    schedule.alphas_cumprod = kept.to(device)
    live = NoiseLoss(unet, text_encoder).to(device).train()
    optimizer = torch.optim.AdamW(
        [{"params": unet.parameters(), "rate": 1.0}, {"params": text_encoder.parameters(), "rate": 0.3}],
        lr=1e-3, betas=(0.9, 0.99), weight_decay=0.01, fused=True,
    )  # fmt: skip
    averaged = copy.deepcopy(live)
    first = 0
    if checkpoint.is_file():
        state = torch.load(checkpoint, map_location=device, weights_only=True)
        live.load_state_dict(state["live"])
        averaged.load_state_dict(state["averaged"])
        optimizer.load_state_dict(state["optimizer"])
        first = state["step"]

    def batch(step: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        generator = torch.Generator(device).manual_seed(seed * 10**6 + step)
        latents, ids = pictures.batch(batch_size, generator, empty)
        t = torch.searchsorted(shares, torch.rand(batch_size, generator=generator, device=device))
        t = t.clamp(max=len(shares) - 1)  # the last share may be rounded below 1
        noise = torch.randn(latents.shape, generator=generator, device=device)
        return schedule.add_noise(latents, noise, t), t, ids, noise

    backward = backward_of(live, batch(first))
    start, shown = time.time(), torch.zeros((), device=device)
    for step in range(first, steps if stop is None else stop):
        loss = backward(*batch(step))
        torch.nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = group["rate"] * learning_rate(step, steps)
        optimizer.step()
        decay = min(AVERAGED, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(averaged.parameters()), list(live.parameters()), 1 - decay)
        shown += loss / 100
        if (step + 1) % 100 == 0:
            logger.info(f"unet {step + 1}/{steps} loss {shown.item():.4f} {time.time() - start:.0f} s")
            shown.zero_()
        if (step + 1) % SAVE_EVERY == 0:
            state = {"live": live.state_dict(), "averaged": averaged.state_dict(),
                     "optimizer": optimizer.state_dict(), "step": step + 1}  # fmt: skip
            partial = checkpoint.with_suffix(".partial")
            torch.save(state, partial)
            partial.replace(checkpoint)
    return averaged.unet.eval(), averaged.text_encoder.eval()


def pipeline(
    vae: AutoencoderKL, text_encoder: CLIPTextModel, tokenizer: CLIPTokenizer, unet: UNet2DConditionModel
) -> StableDiffusionPipeline:
    """The whole model."""
    return StableDiffusionPipeline(
        vae=vae, text_encoder=text_encoder, tokenizer=tokenizer, unet=unet, scheduler=DDIMScheduler(**SCHEDULER),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def build_tokenizer(folder: Path) -> CLIPTokenizer:
    """The world's tokenizer, written to the folder."""
    return tokenizer.build(folder, words(), POSITIONS)
