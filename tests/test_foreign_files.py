"""Plain LoRAs as other programs write them: what is no part of a LoRA, and shapes that mean the same."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file, save_file

from networks.deft_config import DeftError
from tests.conftest import deltas, largest_error, network_of
from tests.test_files import loaded_from, save


def rewritten(model, tmp_path, change) -> tuple[str, dict[str, torch.Tensor]]:
    """A file of ours with its tensors changed, and the deltas it has."""
    network = network_of(model, conv_dim="2")
    wanted = deltas(network)
    tensors = load_file(save(network, tmp_path))
    network.remove()
    save_file({key: value.contiguous() for key, value in change(tensors).items()}, tmp_path / "b.safetensors")
    return str(tmp_path / "b.safetensors"), wanted


def test_bundled_embeddings_are_passed_over_and_told(model, tmp_path, caplog):
    embeddings = {f"bundle_emb.sks.string_to_param.{i}": torch.ones(1, 8) for i in "*x"}
    file, wanted = rewritten(model, tmp_path, lambda tensors: tensors | embeddings)
    again = loaded_from(file, model)
    assert largest_error(deltas(again), wanted) < 1e-6
    assert any("2 tensors of embeddings, bundle_emb.sks" in line for line in caplog.messages)
    assert not any(key.startswith("bundle_emb") for key in load_file(save(again, tmp_path)))


@pytest.mark.parametrize("to", ["matrices as 1x1 convolutions", "1x1 convolutions as matrices"])
def test_a_1x1_convolution_and_a_matrix_are_the_same(model, tmp_path, to):
    def change(tensors):
        if to.startswith("matrices"):
            return {k: v[..., None, None] if v.dim() == 2 else v for k, v in tensors.items()}
        return {k: v.flatten(1) if v.dim() == 4 and v.shape[2:] == (1, 1) and pointwise(k) else v
                for k, v in tensors.items()}  # fmt: skip

    def pointwise(key):
        return key.split(".")[0].endswith(("proj_in", "proj_out", "conv_shortcut"))

    file, wanted = rewritten(model, tmp_path, change)
    before = load_file(tmp_path / "a.safetensors")
    assert sum(value.shape != before[key].shape for key, value in load_file(file).items()) > 20
    assert largest_error(deltas(loaded_from(file, model)), wanted) < 1e-6


def test_another_kernel_is_still_refused(model, tmp_path):
    file, _ = rewritten(
        model,
        tmp_path,
        lambda tensors: {k: v[..., :1, :1] if "conv1.lora_down" in k else v for k, v in tensors.items()},
    )
    with pytest.raises(DeftError, match="is made for a weight of"):
        loaded_from(file, model)
