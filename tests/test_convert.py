"""convert_deft.py: formats, repair, and DEFTs on other bases."""

from __future__ import annotations

import pytest
import torch

from networks import deft_io, deft_rebase
from networks.deft_checkpoint import open_checkpoint
from tests import small_models
from tests.conftest import deltas, loaded, network_of, relative_error


def saved(network, path, **options):
    network.save_weights(str(path), options.pop("dtype", None), {})
    return path


# --- another base -----------------------------------------------------------------------------------------------------


@pytest.fixture(scope="session")
def bases(tmp_path_factory):
    """Two models of SDXL's architecture, and the second as one file in the original's names."""
    folders = [small_models.build("sdxl", tmp_path_factory.mktemp(f"base{seed}"), seed) for seed in (0, 1)]
    return folders


def removing_file(folder, path, **options):
    network = network_of(loaded(folder), conv_dim="2", conv_alpha="2", save_format="deft", **options)
    return network, saved(network, path)


@pytest.mark.parametrize("options", [{}, {"basis": "relu"}, {"init": "paper"}, {"para": "true"}, {"removal": "0.5"}])
def test_on_its_own_base_it_is_what_was_trained(bases, tmp_path, options):
    network, path = removing_file(bases[0], tmp_path / "cat.safetensors", **options)
    adapter = deft_io.read_adapter(path)
    assert deft_rebase.depends_on_base(adapter)
    with open_checkpoint(bases[0]) as base:
        found = deft_rebase.rebased(adapter, base)
        assert deft_rebase.trained_on(adapter, deft_io.read_metadata(path), base) is True
    expected = deltas(network)
    assert found.keys() == expected.keys()
    assert max(relative_error(found[name].delta(), expected[name]) for name in expected) < 1e-5


@pytest.mark.parametrize(("x", "y"), [(1, 1), (0.4, 1), (1, -0.7), (0, 0)])
def test_on_another_base_it_is_the_formula_in_float64(bases, tmp_path, x, y):
    _, path = removing_file(bases[0], tmp_path / "cat.safetensors")
    adapter = deft_io.read_adapter(path)
    with open_checkpoint(bases[1]) as base:
        found = deft_rebase.rebased(adapter, base, x, y)
        weights = {name: base.weight(name).flatten(1).double() for name in found}
        assert deft_rebase.trained_on(adapter, deft_io.read_metadata(path), base) is False
    for name, layer in adapter.layers.items():
        Q, W = torch.linalg.qr(layer.P.double())[0], weights[name]
        Q = Q * torch.sign((Q * layer.P.double()).sum(0))  # QR's sign is free, E0's is not
        expected = -x * Q @ (Q - layer.E0.double()).T @ W + y * layer.scale * Q @ layer.R.double()
        assert (found[name].delta() - expected).norm() < 1e-6 * W.norm()


def test_parts_of_a_fused_weight_come_to_the_whole(bases):
    sizes = deft_rebase._part_sizes("lora_unet_single_blocks_3_linear1", (21504, 3072))
    assert sizes == [3072, 3072, 3072, 12288]
    assert deft_rebase._part_sizes("lora_unet_double_blocks_3_img_attn_qkv", (9216, 3072)) == [3072] * 3
    assert deft_rebase._part_sizes("lora_unet_double_blocks_3_img_mlp_0", (9216, 3072)) == []
