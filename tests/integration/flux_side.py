"""Runs in sd-scripts' own Python: `python flux_side.py FOLDER TOKENIZERS WORLD`.

Its own FLUX.1, small and random, dev and schnell, as files in WORLD; and what it makes of `given.safetensors` there:
text encoders as the Diffusers folder FOLDER has them read the captions, with --apply_t5_attn_mask and without.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from library.strategy_flux import FluxTextEncodingStrategy, FluxTokenizeStrategy
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from library import flux_models, flux_utils


def params(width: int, text: int, dev: bool) -> flux_models.FluxParams:
    return flux_models.FluxParams(
        in_channels=64, vec_in_dim=text, context_in_dim=text, hidden_size=width, mlp_ratio=4.0, num_heads=width // 128,
        depth=2, depth_single_blocks=3, axes_dim=[16, 56, 56], theta=10_000, qkv_bias=True, guidance_embed=dev,
    )  # fmt: skip


def answer(model: flux_models.Flux, given: dict[str, Tensor], conds: list, guidance: float, masked: bool) -> Tensor:
    """As flux_train_network.py's `get_noise_pred_and_target` calls it."""
    noisy, timesteps = given["noisy"], given["timesteps"]
    rows, columns = noisy.shape[2] // 2, noisy.shape[3] // 2
    pooled, hidden, txt_ids, mask = conds
    found = model(
        img=flux_utils.pack_latents(noisy),
        img_ids=flux_utils.prepare_img_ids(len(noisy), rows, columns),
        txt=hidden,
        txt_ids=txt_ids,
        y=pooled,
        timesteps=timesteps / 1000,
        guidance=torch.full((len(noisy),), guidance),
        txt_attention_mask=mask if masked else None,
    )
    return flux_utils.unpack_latents(found, rows, columns)


@torch.no_grad()
def main(folder: Path, tokenizers: str, world: Path) -> None:
    asked, given = json.loads((world / "asked.json").read_text()), load_file(world / "given.safetensors")
    torch.manual_seed(0)
    clip = CLIPTextModel(CLIPTextConfig.from_pretrained(folder / "text_encoder"))
    clip.load_state_dict(load_file(world / "clip_l.safetensors"))
    t5 = T5EncoderModel(T5Config.from_pretrained(folder / "text_encoder_2"))
    t5.load_state_dict(load_file(world / "t5xxl.safetensors"), strict=False)  # one of its tensors has two names
    encoders = [clip.eval(), t5.eval()]
    tokenizing = FluxTokenizeStrategy(asked["tokens"], tokenizers)
    found = {}
    for dev in (True, False):
        model = flux_models.Flux(params(asked["width"], clip.config.hidden_size, dev)).eval()
        for name, weight in model.named_parameters():
            torch.nn.init.uniform_(weight, 0.5, 1.5) if name.endswith(".scale") else weight.mul_(1.5)
        kind = "dev" if dev else "schnell"
        save_file(model.state_dict(), world / f"{kind}.safetensors")
        for masked in (True, False):
            encoding = FluxTextEncodingStrategy(masked)
            conds = encoding.encode_tokens(tokenizing, encoders, tokenizing.tokenize(asked["captions"]))
            found[f"{kind} {masked}"] = answer(model, given, conds, asked["guidance"], masked)
    ae = flux_models.AutoEncoder(flux_models.AutoEncoderParams(**asked["ae"]))
    ae.load_state_dict(load_file(world / "ae.safetensors"))
    ae.reg.sample = False
    found |= {"latents": ae.encode(given["pixels"]), "pixels": ae.decode(given["noisy"])}
    save_file({key: value.contiguous() for key, value in found.items()}, world / "found.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], Path(sys.argv[3]))
