"""musubi-tuner's own swapping of blocks on a GPU, below networks.deft.

MUSUBI_DIR=/path/to/musubi-tuner pytest tests/integration/test_musubi_cuda.py
"""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from networks import deft
from tests.test_musubi_files import products

MUSUBI = os.environ.get("MUSUBI_DIR")
BLOCKS, SWAPPED = 8, 6

pytestmark = pytest.mark.skipif(
    not (MUSUBI and torch.cuda.is_available()), reason="set MUSUBI_DIR to a checkout of kohya-ss/musubi-tuner; a GPU"
)

# as its trainers have them: --blocks_to_swap, with --use_pinned_memory_for_block_swap, with --block_swap_h2d_only
WAYS: dict[str, dict[str, Any]] = {
    "swapped": {},
    "pinned": {"use_pinned_memory_for_block_swap": True},
    "streamed": {"block_swap_h2d_only": True},
    "streamed, pinned": {"block_swap_h2d_only": True, "use_pinned_memory_for_block_swap": True},
    "streamed, one buffer": {"block_swap_h2d_only": True, "block_swap_ring_size": 1},
}


def trained(way: dict[str, Any] | None, file: Path, removal: str, steps: int = 4) -> dict[str, torch.Tensor]:
    """The deltas of a short training of a small Z-Image, in the order of musubi-tuner's trainer.

    :param way: of swapping; None for none
    """
    from benchmarks.musubi_step import SMALL_ZIMAGE, musubi

    device = torch.device("cuda")
    torch.manual_seed(0)
    kind = musubi("zimage.zimage_model").ZImageTransformer2DModel
    model = kind(**SMALL_ZIMAGE | {"n_layers": BLOCKS})
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.05).requires_grad_(False)
    if way is None:
        model.to(device)
    else:
        swapping = musubi("modules.custom_offloading_utils").BlockSwapConfig
        given = SimpleNamespace(gradient_checkpointing=True, **way)
        model.enable_block_swap(SWAPPED, swapping.from_args(given, device, supports_backward=True))
        model.move_to_device_except_swap_blocks(device)
    network = deft.create_arch_network(1.0, 4, 4.0, None, None, model, removal=removal)
    network.prepare_network(SimpleNamespace(sample_prompts=None, sample_at_first=False))
    network.apply_to(None, model, apply_text_encoder=False, apply_unet=True)
    model.enable_gradient_checkpointing()
    parameters, _ = network.prepare_optimizer_params(unet_lr=1e-2)
    network.to(device)
    if way is not None:
        model.prepare_block_swap_before_forward()
    model.train()
    network.prepare_grad_etc(model)
    network.on_epoch_start(model)
    optimizer = torch.optim.SGD(parameters)
    torch.manual_seed(1)
    picture, text = torch.randn(1, 16, 1, 16, 16, device=device), torch.randn(1, 32, 2560, device=device)
    for _ in range(steps):
        network.on_step_start()
        answer = model(x=picture, t=torch.full((1,), 0.5, device=device), cap_feats=text, cap_mask=None)
        (answer - picture.view_as(answer)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    network.save_weights(str(file), torch.float32, {})
    return products(load_file(file))


def metadata(file: Path) -> dict[str, str]:
    with safe_open(str(file), framework="pt") as opened:
        return opened.metadata()


@pytest.mark.parametrize("removal", ["0", "1"])
def test_a_file_is_the_same_however_blocks_are_swapped(tmp_path, removal):
    """What is learnt, and the base model's hash."""
    plain = trained(None, tmp_path / "plain.safetensors", removal)
    again = trained(None, tmp_path / "again.safetensors", removal)
    assert all(bool(delta.any()) for delta in plain.values())
    wanted = metadata(tmp_path / "plain.safetensors")["deft_base_hash"]

    zeros = {name: torch.zeros_like(delta) for name, delta in plain.items()}

    def apart(tensors: dict[str, torch.Tensor]) -> float:
        """The norm of the difference of all deltas, of theirs."""
        assert tensors.keys() == plain.keys()
        squares = [sum(float((d[k] - plain[k]).square().sum()) for k in plain) for d in (tensors, zeros)]
        return (squares[0] / squares[1]) ** 0.5

    own = apart(again)
    print(f"removal={removal}: without swapping again {own:.1e}")
    for name, way in WAYS.items():
        file = tmp_path / f"{name}.safetensors"
        distance = apart(trained(way, file, removal))
        print(f"removal={removal}: {name} {distance:.1e}")
        assert distance <= max(2 * own, 1e-5), name
        assert metadata(file)["deft_base_hash"] == wanted, name
