"""A small OmniGen of the shipped world: it draws captions, and what pictures in its prompt ask for.

    python benchmarks/condition_model.py output/condition/model    # a GPU, eight minutes

The architecture is diffusers' OmniGenTransformer2DModel, the autoencoder that of the shipped model. It is trained from
nothing on what the world's scenes show: captions alone, and conditions (`CONDITIONS` but `HELD_OUT`), by themselves and
behind one example of a condition and its picture. What is held out is for adapters to learn: see condition.py.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import random
import re
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, OmniGenTransformer2DModel
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from transformers import PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from library.models import omnigen_sequence  # noqa: E402
from library.world import draw, measure, scenes, train_model  # noqa: E402

logger = logging.getLogger(__name__)

SPECIAL = ("<|user|>", "<|assistant|>", "<|end|>", "<|diffusion|>", "<img>", "</img>", "<cfg>")
WORDS = re.compile(r"[A-Za-z0-9]+|[.,]")
TRANSFORMER = {
    "hidden_size": 384, "num_attention_heads": 6, "num_key_value_heads": 6, "intermediate_size": 1024, "num_layers": 8,
    "in_channels": 4, "time_step_dim": 128, "pos_embed_max_size": 16, "original_max_position_embeddings": 4096,
    "max_position_embeddings": 4096, "rope_scaling": {"long_factor": [1.0] * 32, "short_factor": [1.0] * 32},
}  # fmt: skip
SCENES, BATCH, RATE, AVERAGED = 40_000, 192, 6e-4, 0.999
TOKENS = 64  # of a picture
DROPPED = 0.1  # share of instructions without text and pictures, for guidance
ALONE = "a picture of <img><|image_1|></img>"
BEHIND_EXAMPLE = "<img><|image_1|></img> becomes <img><|image_2|></img>. now do the same to <img><|image_3|></img>"


def grey(pixels: Tensor) -> Tensor:
    """Luminance, of pixels (b, 3, 64, 64) in [-1, 1], as all of these."""
    weights = torch.tensor([0.299, 0.587, 0.114], device=pixels.device)
    return torch.einsum("bchw,c->bhw", pixels, weights)[:, None].expand(-1, 3, -1, -1)


def blurred(pixels: Tensor) -> Tensor:
    """An eighth of the size, and back."""
    return F.interpolate(F.avg_pool2d(pixels, 8), scale_factor=8, mode="bilinear", align_corners=False)


def negative(pixels: Tensor) -> Tensor:
    """Every colour's opposite."""
    return -pixels


def edges(pixels: Tensor) -> Tensor:
    """White where colours change from pixel to pixel, black elsewhere: Sobel's gradient, of all channels together."""
    across = torch.tensor([[-1.0, 0, 1], [-2, 0, 2], [-1, 0, 1]], device=pixels.device)
    kernels = torch.stack([across, across.T])[:, None].repeat(3, 1, 1, 1)
    found = F.conv2d(F.pad(pixels, (1, 1, 1, 1), mode="replicate"), kernels, groups=3)
    strength = found.square().sum(1, keepdim=True).sqrt() / 8
    return (2 * strength.clamp(0, 1) - 1).expand(-1, 3, -1, -1)


CONDITIONS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "grey": grey, "blurred": blurred, "negative": negative, "edges": edges,
}  # fmt: skip
HELD_OUT = "edges"


@dataclass(frozen=True)
class Task:
    """Prompts of one form, a row a scene.

    :param ids: (scenes, length) of tokens, padded on the left; 0 where a picture stands
    :param ends: how far from the end each picture begins
    :param share: of the training's rows
    """

    ids: Tensor
    ends: tuple[int, ...]
    share: float


@dataclass(frozen=True)
class World:
    """What is trained on.

    :param pictures: (scenes, 4, 16, 16), float16: their latents
    :param conditions: (conditions, scenes, 4, 16, 16) likewise, of all that are not held out
    :param empty: tokens of a dropped instruction
    """

    pictures: Tensor
    conditions: Tensor
    tasks: tuple[Task, ...]
    empty: Tensor


@torch.no_grad()
def encoded(vae: AutoencoderKL, pixels: Tensor) -> Tensor:
    """Latents' means (b, 4, 16, 16) of pixels (b, 3, 64, 64), in the model's scale."""
    return vae.encode(pixels).latent_dist.mean * vae.config.scaling_factor


def words() -> list[str]:
    """What instructions are made of."""
    said = " ".join((ALONE, BEHIND_EXAMPLE, omnigen_sequence.AROUND))
    return sorted({*train_model.words(), *(word for word in WORDS.findall(said))})


def build_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A token a word, with OmniGen's special ones."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())  # without them it looks like an empty one
    every = list(dict.fromkeys(["<unk>", "<s>", "</s>", *SPECIAL, *words(), *letters]))
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(every)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Regex(r"\w+|[^\w\s]"), "removed", invert=True)
    made.post_processor = processors.TemplateProcessing("<s> $A", "<s> $A $B", [("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>", *SPECIAL])
    found = PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<s>", eos_token="</s>", unk_token="<unk>", pad_token="</s>"
    )
    found.save_pretrained(str(folder))
    return found


def make_world(vae: AutoencoderKL, tokenizer: PreTrainedTokenizerFast, number: int, device: torch.device) -> World:
    """Draws, captions and encodes it."""
    rng = random.Random("condition")
    made = [scenes.draw_scene(rng) for _ in range(number)]
    trained = [change for name, change in CONDITIONS.items() if name != HELD_OUT]
    parts = []
    for first in range(0, number, 256):
        pixels = draw.render([scene.picture() for scene in made[first : first + 256]], device)
        parts.append(torch.stack([encoded(vae, one).half() for one in (pixels, *(f(pixels) for f in trained))]))
    latents = torch.cat(parts, 1)

    def task(form: str, share: float, said: float) -> Task:
        captions = (scenes.caption(scene, rng) if rng.random() < said else "" for scene in made)
        found = [prompt_ids(tokenizer, f"{caption} {form}".strip()) for caption in captions]
        ids = left_padded([row for row, _ in found])
        return Task(ids.to(device), found[0][1], share)

    tasks = task("", 0.5, 1.0), task(ALONE, 0.15, 0.5), task(BEHIND_EXAMPLE, 0.35, 0.3)
    return World(latents[0], latents[1:], tasks, torch.tensor(prompt_ids(tokenizer, "<cfg>")[0], device=device))


def prompt_ids(tokenizer: PreTrainedTokenizerFast, instruction: str) -> tuple[list[int], tuple[int, ...]]:
    """An instruction as tokens, 0 where a picture stands, and how far from the end each picture begins."""
    first, *others = omnigen_sequence.ids_of(tokenizer, instruction)
    ids, begins = first, []
    for behind in others:
        begins.append(len(ids))
        ids = [*ids, *[0] * TOKENS, *behind]
    return ids, tuple(len(ids) - place for place in begins)


def left_padded(rows: Sequence[Sequence[int]]) -> Tensor:
    """(rows, length) of token numbers, -1 before each."""
    length = max(map(len, rows))
    return torch.tensor([[-1] * (length - len(row)) + list(row) for row in rows])


def visible(ids: Tensor, pictures: Sequence[int], target: int) -> Tensor:
    """(b, length, length): what each place sees, as OmniGen's attention has it. Text sees what is before it, an input
    picture all of itself too, the time token and the target all; padding is seen by none.

    :param ids: (b, text), -1 for padding
    :param pictures: first places of input pictures, of `target` places each
    """
    text = ids.shape[1]
    seen = torch.ones(text + 1 + target, text + 1 + target, device=ids.device).tril()
    seen[text + 1 :] = 1
    for first in pictures:
        seen[first : first + target, first : first + target] = 1
    there = F.pad((ids >= 0).float(), (0, 1 + target), value=1.0)
    return torch.maximum(seen * there[:, None], 1 - there[:, :, None])  # padding sees all: its softmax needs something


class Loss(torch.nn.Module):
    """How far the predicted velocity is from picture minus noise: a mean square, to be trained on."""

    def __init__(self, transformer: OmniGenTransformer2DModel) -> None:
        super().__init__()
        self.transformer = transformer
        transformer._get_multimodal_embeddings = self._embedded  # all rows at once: pictures stand alike in them
        self.first: tuple[int, ...] = ()

    def _embedded(self, ids: Tensor, pictures: list[Tensor], sizes: dict) -> Tensor:
        tokens = self.transformer.embed_tokens(ids.clamp(min=0)).clone()
        for first, one in zip(self.first, pictures, strict=True):
            found = self.transformer.patch_embedding(one, is_input_image=True)
            tokens[:, first : first + found.shape[1]] = found.to(tokens.dtype)
        return tokens

    def forward(self, clean: Tensor, ids: Tensor, pictures: list[Tensor], first: tuple[int, ...]) -> Tensor:
        """Of latents (b, 4, 16, 16) with prompts (b, text).

        :param pictures: latents of the input pictures, (b, 4, 16, 16) each
        :param first: places in the prompts where they begin
        """
        self.first = first
        t = torch.randn(len(clean), device=clean.device).sigmoid()
        noise = torch.randn_like(clean)
        at = t.view(-1, 1, 1, 1)
        target = (clean.shape[-1] // self.transformer.config.patch_size) ** 2
        length = ids.shape[1] + 1 + target
        with torch.autocast(clean.device.type, torch.bfloat16):
            predicted = self.transformer(
                hidden_states=at * clean + (1 - at) * noise,
                timestep=t,
                input_ids=ids,
                input_img_latents=pictures,
                input_image_sizes={},
                attention_mask=visible(ids, first, target),
                position_ids=torch.arange(length, device=ids.device).expand(len(ids), -1),  # only distances count
                return_dict=False,
            )[0]
        return F.mse_loss(predicted.float(), clean - noise)


def batch_of(world: World, task: Task, size: int) -> tuple[Tensor, Tensor, list[Tensor], tuple[int, ...]]:
    """What `Loss` takes: each row a scene, a condition, and another scene for the example."""
    device = world.pictures.device
    rows = torch.randint(len(world.pictures), (size,), device=device)
    ids, clean = task.ids[rows], world.pictures[rows].float()
    first = tuple(ids.shape[1] - end for end in task.ends)
    if not first:  # words alone: some of them are dropped
        empty = F.pad(world.empty, (ids.shape[1] - len(world.empty), 0), value=-1)
        dropped = torch.rand(size, device=device) < DROPPED
        return clean, torch.where(dropped[:, None], empty, ids), [], ()
    which = torch.randint(len(world.conditions), (size,), device=device)
    asked = world.conditions[which, rows].float()
    if len(first) == 1:
        return clean, ids, [asked], first
    other = torch.randint(len(world.pictures), (size,), device=device)
    return clean, ids, [world.conditions[which, other].float(), world.pictures[other].float(), asked], first


def train(transformer: OmniGenTransformer2DModel, world: World, seconds: float, seed: int) -> OmniGenTransformer2DModel:
    """Trains for so long; returns the moving average of its weights."""
    torch.manual_seed(seed)
    averaged = copy.deepcopy(transformer.to(world.pictures.device))
    live = Loss(transformer).train()
    optimizer = torch.optim.AdamW(live.parameters(), RATE, (0.9, 0.98), weight_decay=0.01, fused=True)
    start, step, shown = time.time(), 0, torch.zeros((), device=world.pictures.device)
    while (done := (time.time() - start) / seconds) < 1:
        loss = torch.stack(
            [task.share * live(*batch_of(world, task, round(BATCH * task.share))) for task in world.tasks]
        ).sum()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(live.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = RATE * min(1.0, (step + 1) / 500, max(0.01, 2.5 * (1 - done)))
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            decay = min(AVERAGED, (step + 1) / (step + 10))
            torch._foreach_lerp_(list(averaged.parameters()), list(transformer.parameters()), 1 - decay)
        shown += loss.detach() / 200
        step += 1
        if step % 200 == 0:
            logger.info(f"step {step}, {done:.0%}, loss {shown.item():.4f}")
            shown.zero_()
    return averaged.eval()


def write(folder: Path, seconds: float, number: int, device: torch.device, seed: int = 0) -> None:
    """The model as a Diffusers folder, float32."""
    vae = AutoencoderKL.from_pretrained(str(measure.MODEL / "vae"), local_files_only=True).to(device)
    tokenizer = build_tokenizer(folder / "tokenizer")
    world = make_world(vae, tokenizer, number, device)
    logger.info(f"{number} scenes, {sum(task.ids.numel() for task in world.tasks):,} tokens")
    torch.manual_seed(seed)
    transformer = OmniGenTransformer2DModel(**TRANSFORMER, vocab_size=len(tokenizer), pad_token_id=2)
    for name, weight in transformer.named_parameters():
        if weight.dim() > 1 and "embed" not in name:
            torch.nn.init.normal_(weight, std=0.5 * weight[0].numel() ** -0.5)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    train(transformer, world, seconds, seed).save_pretrained(str(folder / "transformer"))
    vae.cpu().save_pretrained(str(folder / "vae"))
    FlowMatchEulerDiscreteScheduler(invert_sigmas=True, num_train_timesteps=1).save_pretrained(
        str(folder / "scheduler")
    )
    parts = {
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"], "vae": ["diffusers", "AutoencoderKL"],
        "tokenizer": ["transformers", "PreTrainedTokenizerFast"],
        "transformer": ["diffusers", "OmniGenTransformer2DModel"],
    }  # fmt: skip
    index = {"_class_name": "OmniGenPipeline", **parts}
    (folder / "model_index.json").write_text(json.dumps(index, indent=1), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seconds", type=float, default=440, help="of training")
    parser.add_argument("--scenes", type=int, default=SCENES)
    args = parser.parse_args()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", level=logging.INFO)
    write(args.folder, args.seconds, args.scenes, torch.device("cuda" if torch.cuda.is_available() else "cpu"))


if __name__ == "__main__":
    main()
