"""Runs in sd-scripts' own Python: `python steps_side.py FILE`.

One training step of networks.deft on a small model of each transformer's real class, then the file in sd-scripts' own
network on the same model; writes what was found.
"""

from __future__ import annotations

import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library import anima_models, chroma_models, flux_models, hunyuan_image_models, lumina_models, sd3_models
from networks import deft

Model = tuple[torch.nn.Module, Callable[[torch.nn.Module], Tensor]]


def ids(number: int) -> Tensor:
    return torch.arange(3 * number).view(1, number, 3).float() % 5


def flux() -> Model:
    params = replace(
        flux_models.configs["dev"].params, in_channels=8, vec_in_dim=12, context_in_dim=20, hidden_size=64, num_heads=2,
        depth=2, depth_single_blocks=2, axes_dim=[8, 12, 12],
    )  # fmt: skip
    img, txt, y, t = torch.randn(1, 9, 8), torch.randn(1, 5, 20), torch.randn(1, 12), torch.tensor([0.4])
    return flux_models.Flux(params), lambda model: model(img, ids(9), txt, ids(5), t, y, guidance=t)


def chroma() -> Model:
    params = replace(
        chroma_models.chroma_params, in_channels=8, context_in_dim=20, hidden_size=64, num_heads=2, depth=2,
        depth_single_blocks=2, axes_dim=[8, 12, 12], approximator_hidden_size=32, approximator_depth=1,
    )  # fmt: skip
    img, txt, t = torch.randn(1, 9, 8), torch.randn(1, 5, 20), torch.tensor([0.4])
    mask = torch.ones(1, 5)

    def run(model):
        vectors = model.get_mod_vectors(timesteps=t, guidance=t, batch_size=1)
        return model(img, ids(9), txt, ids(5), t, None, guidance=t, txt_attention_mask=mask, mod_vectors=vectors)

    return chroma_models.Chroma(params), run


def sd3() -> Model:
    model = sd3_models.MMDiT(
        patch_size=2, in_channels=4, depth=2, adm_in_channels=16, context_embedder_in_features=20,
        context_embedder_out_features=128, pos_embed_max_size=8, num_patches=64, qk_norm="rms",
        x_block_self_attn_layers=[0], model_type="5-medium",
    )  # fmt: skip
    x, t, y, context = torch.randn(1, 4, 8, 8), torch.tensor([0.4]), torch.randn(1, 16), torch.randn(1, 5, 20)
    return model, lambda model: model(x, t, y=y, context=context)


def lumina() -> Model:
    model = lumina_models.NextDiT(
        patch_size=2, in_channels=4, dim=64, n_layers=2, n_refiner_layers=1, n_heads=4, n_kv_heads=2, multiple_of=32,
        qk_norm=True, cap_feat_dim=20, axes_dims=[4, 6, 6], axes_lens=[64, 64, 64],
    )  # fmt: skip
    x, t, caption = torch.randn(1, 4, 8, 8), torch.tensor([0.4]), torch.randn(1, 5, 20)
    return model, lambda model: model(x, t, caption, torch.ones(1, 5, dtype=torch.int32))


def hunyuan() -> Model:
    """Its widths are fixed: one block of each kind, in bfloat16."""
    with torch.device("meta"):
        model = hunyuan_image_models.HYImageDiffusionTransformer()
    model.double_blocks, model.single_blocks = model.double_blocks[:1], model.single_blocks[:1]
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    x, t = torch.randn(1, 64, 4, 4).bfloat16(), torch.tensor([400.0])
    text, mask = torch.randn(1, 5, 3584).bfloat16(), torch.ones(1, 5, dtype=torch.bool)
    letters, letters_mask = torch.randn(1, 3, 1472).bfloat16(), torch.ones(1, 3, dtype=torch.bool)
    return model, lambda model: model(x, t, text, mask, letters, letters_mask).float()


def anima() -> Model:
    model = anima_models.Anima(
        max_img_h=16, max_img_w=16, max_frames=4, in_channels=4, out_channels=4, patch_spatial=2, patch_temporal=1,
        model_channels=64, num_blocks=2, num_heads=2, crossattn_emb_channels=20, pos_emb_cls="rope3d",
        use_adaln_lora=True, adaln_lora_dim=8, use_llm_adapter=False,
    )  # fmt: skip
    x, t, context = torch.randn(1, 4, 1, 8, 8), torch.tensor([0.4]), torch.randn(1, 5, 20)
    mask = torch.zeros(1, 1, 8, 8)
    return model, lambda model: model(x, t, context, padding_mask=mask)


MODELS: dict[str, tuple[Callable[[], Model], str]] = {
    "flux": (flux, "lora_flux"), "chroma": (chroma, "lora_flux"), "sd3": (sd3, "lora_sd3"),
    "lumina": (lumina, "lora_lumina"), "hunyuan": (hunyuan, "lora_hunyuan_image"), "anima": (anima, "lora_anima"),
}  # fmt: skip


def made(name: str) -> Model:
    """One of `MODELS` with frozen random weights, and what runs it."""
    model, run = MODELS[name][0]()
    for key, tensor in model.state_dict().items():  # some start with zeros, through which nothing would flow
        if tensor.is_floating_point() and not key.endswith(("freqs", "seq", "range")):
            tensor.fill_(1.0) if "norm" in key and tensor.dim() == 1 else tensor.normal_(0, 0.05)
    return model.requires_grad_(False), run


def step(name: str, folder: Path) -> dict[str, Any]:
    """Relative distances of the model's outputs, and how many modules had gradients."""
    torch.manual_seed(0)
    model, run = made(name)
    base = run(model)
    net = deft.create_network(1.0, 4, 4, None, [], model)
    net.apply_to([], model)
    fresh = run(model)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-2)
    run(model).square().mean().backward()
    moved = sum(bool(m.R.grad is not None and m.R.grad.any()) for m in net.all_modules)
    optimizer.step()
    trained = run(model)
    file = str(folder / f"{name}.safetensors")
    net.save_weights(file, torch.float32, None)
    net.remove()
    own = __import__(f"networks.{MODELS[name][1]}", fromlist=["x"])
    theirs, weights = own.create_network_from_weights(1.0, file, None, [torch.nn.Module()], model)
    theirs.apply_to([], model, False, True)
    theirs.to(base.dtype if name != "hunyuan" else torch.bfloat16)
    result = theirs.load_state_dict(weights, strict=False)
    read = run(model)

    def distance(a: Tensor, b: Tensor) -> float:
        return float((a.double() - b.double()).norm() / b.double().norm())

    return {
        "modules": len(net.all_modules), "with gradients": moved, "fresh": distance(fresh, base),
        "trained": distance(trained, base), "read": distance(read, trained),
        "unmatched": len(result.unexpected_keys),
    }  # fmt: skip


if __name__ == "__main__":
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in sys.argv[2:] or MODELS:
            found[name] = step(name, Path(folder))
            print("---", name, found[name], flush=True)
    Path(sys.argv[1]).write_text(json.dumps(found))
