"""A frozen denoiser in plain fp8: the gradients that pass it, and what is kept between forward and backward pass."""

from __future__ import annotations

import copy
import json
from collections import defaultdict
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn

import train_network_deft
from library.models.family import Family
from library.models.quantised import read_anew
from networks import deft
from networks.deft_targets import is_adaptable
from tests.conftest import (
    LAYER_KINDS,
    arguments,
    input_of,
    layer_of,
    loaded,
    network_of,
    relative_error,
    reset_accelerator,
)
from tests.test_loop_options import logged

DEVICE, FP8 = torch.device("cuda" if torch.cuda.is_available() else "cpu"), torch.float8_e4m3fn
SHORT = {"t5xxl_max_token_length": 12}
FAMILIES = ["sd15", "sdxl", "flux", "omnigen"]
OPTIONS: list[tuple[str, dict[str, str]]] = [
    *((family, {}) for family in FAMILIES),
    ("sdxl", {"conv_dim": "2", "conv_alpha": "1"}),
    ("sdxl", {"network_reg_dims": "up_blocks=0"}),
    ("sd15", {"neuron_dropout": "0.2"}),
    ("flux", {"train_blocks": "single"}),
    ("flux", {"fuse_qkv": "true"}),
    ("omnigen", {"network_reg_dims": "layers_0=0", "train_mlp": "true"}),
]


def placed(folder, options: dict[str, str] | None = None, weights=None, **given) -> tuple[Family, Any]:
    """A model in bf16, with a network on it unless `options` is None.

    :param weights: a denoiser's, that it computes with in bf16
    """
    model, network = loaded(folder, **SHORT, **given), None
    model.quantise(DEVICE, torch.bfloat16)
    if options is not None:
        torch.manual_seed(0)
        network = network_of(model, **options)
    if weights is not None:
        model.denoiser.load_state_dict(weights)
    model.place(DEVICE, torch.bfloat16, encoders=True)
    if network is not None:
        network.to(DEVICE)
    return model, network


def backward(model: Family, network: deft.DeftNetwork) -> dict[str, Tensor]:
    """The network's gradients, of a pass under autocast as the trainer has it."""
    inputs = torch.Generator().manual_seed(5)
    shape = 2, model.vae.config.latent_channels, 8, 8
    noisy, target = (torch.randn(shape, generator=inputs).to(DEVICE) for _ in range(2))
    timesteps, sizes = torch.tensor([37.0, 800.0], device=DEVICE), torch.full((2, 6), 64.0, device=DEVICE)
    network.train()
    torch.manual_seed(7)  # dropout
    with torch.autocast(DEVICE.type, torch.bfloat16):
        text = model.encode_text(["a cat", "a dog in the grass"])
        answer = model.predict(noisy, timesteps, text, sizes)
    (answer.float() - target).square().mean().backward()
    return {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}


def in_fp8(model: Family) -> list[nn.Module]:
    return [layer for layer in model.denoiser.modules() if getattr(layer, "weight", None) is not None
            and layer.weight.dtype == FP8]  # fmt: skip


@contextmanager
def nothing_kept_of(layers: list[nn.Module]):
    """Fails where a layer's weight, as it is while the layer computes, is kept for the backward pass."""
    of_size = defaultdict(list)
    for layer in layers:
        of_size[layer.weight.numel()].append(layer)

    def pack(tensor: Tensor) -> Tensor:
        for layer in of_size[tensor.numel()]:
            assert tensor.untyped_storage().data_ptr() != layer.weight.untyped_storage().data_ptr(), layer
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


@pytest.mark.parametrize(("family", "options"), OPTIONS, ids=str)
def test_gradients_are_those_of_a_bf16_model_of_the_rounded_weights(family, options, folders):
    """Of all that is adapted, text encoders too; with checkpoints as without; and no weight is kept in bf16."""
    model, network = placed(folders(family), options, fp8_base=True)
    weights = {name: weight.bfloat16() for name, weight in model.denoiser.state_dict().items()}
    wanted = backward(*placed(folders(family), options, weights))
    with nothing_kept_of(in_fp8(model)):
        whole = backward(model, network)
    assert {layer.weight.dtype for layer in in_fp8(model)} == {FP8}
    checkpointed = backward(*placed(folders(family), options, fp8_base=True, gradient_checkpointing=True))
    for found in (whole, checkpointed):
        assert found.keys() == wanted.keys()
        assert all(torch.isfinite(gradient).all() for gradient in [*found.values(), *wanted.values()])
        apart = torch.stack([(found[name] - wanted[name]).norm() for name in wanted]).norm()
        assert apart < 0.02 * torch.stack([gradient.norm() for gradient in wanted.values()]).norm()
    if family != "omnigen":
        assert any(name.startswith("lora_te") and gradient.any() for name, gradient in whole.items())


@pytest.mark.parametrize("family", FAMILIES)
def test_half_of_the_denoiser_is_saved(family, folders):
    """Weights of layers that are cast take a byte a number; nothing else has changed."""
    model, whole = placed(folders(family), fp8_base=True)[0], placed(folders(family))[0]
    cast = {id(p) for layer in in_fp8(model) for p in layer.parameters(recurse=False)}
    sizes = [(id(p) in cast, p.element_size()) for p in model.denoiser.parameters()]
    assert {size for is_cast, size in sizes if is_cast} == {1}
    assert {size for is_cast, size in sizes if not is_cast} == {2}
    bytes_of = [sum(p.nbytes for p in one.denoiser.parameters()) for one in (model, whole)]
    assert bytes_of[0] < 0.7 * bytes_of[1]


@pytest.mark.parametrize("family", FAMILIES)
def test_weights_stay_where_they_are(family, folders):
    """Through a step, where new ones would take room between what is kept; and where a layer fails in its turn."""
    model, network = placed(folders(family), {}, fp8_base=True, gradient_checkpointing=True)
    layers = in_fp8(model)
    before = [(id(p), p.data_ptr()) for layer in layers for p in layer.parameters()]
    backward(model, network)
    with pytest.raises(RuntimeError):
        layers[-1](torch.zeros(1, 1, 1, 1, device=DEVICE))
    assert [(id(p), p.data_ptr()) for layer in layers for p in layer.parameters()] == before
    assert model.denoiser.dtype == torch.bfloat16  # as pipelines ask


@pytest.mark.parametrize("kind", [*LAYER_KINDS, "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_gradient_below_a_frozen_layer_is_that_of_its_own_weight_in_float64(kind, dtype):
    torch.manual_seed(3)
    layer = (nn.Conv2d(12, 18, (3, 2), stride=(2, 1), padding=(2, 1), dilation=(1, 2), groups=3)
             if kind == "grouped" else layer_of(kind)).requires_grad_(False)  # fmt: skip
    x = input_of(layer).to(dtype).requires_grad_()
    layer.weight.data = layer.weight.data.to(FP8).to(dtype)
    layer.to(dtype)
    exact, x64 = copy.deepcopy(layer).double(), x.detach().double().requires_grad_()
    read_anew(layer)
    y = layer(x)
    layer.weight.data = layer.weight.data.to(FP8)  # as a hook behind the layer's turn does
    g = torch.randn_like(y)
    exact(x64).backward(g.double())
    y.backward(g)
    assert x.grad.dtype == dtype
    assert relative_error(x.grad.double(), x64.grad) < {torch.float32: 1e-6, torch.bfloat16: 5e-3}[dtype]


def test_below_a_convolution_that_is_not_adapted_gradients_are_float64s(folders):
    """Each layer of a placed U-Net on its own, cast or not."""
    model, _ = placed(folders("sdxl"), fp8_base=True)
    layers = [layer for layer in model.denoiser.modules() if is_adaptable(layer) and layer.weight.dtype == FP8]
    assert {type(layer) for layer in layers} == {nn.Linear, nn.Conv2d}
    for layer in layers:
        x = input_of(layer).to(DEVICE, torch.bfloat16).requires_grad_()
        y = layer(x)
        g = torch.randn_like(y)
        y.backward(g)
        x64 = x.detach().double().requires_grad_()
        weight = layer.weight.double()
        if isinstance(layer, nn.Conv2d):
            exact = nn.functional.conv2d(x64, weight, None, layer.stride, layer.padding)
        else:
            exact = nn.functional.linear(x64, weight)
        exact.backward(g.double())
        assert relative_error(x.grad.double(), x64.grad) < 5e-3


@pytest.mark.parametrize(("family", "more"), [
    ("sd15", {}),
    ("flux", {"gradient_checkpointing": True, "network_args": ["train_blocks=single"],
              "cache_text_encoder_outputs": True}),
    ("omnigen", {"gradient_checkpointing": True}),
], ids=str)  # fmt: skip
@pytest.mark.usefixtures("fresh_accelerator")
def test_trains_beside_everything_else(family, more, folders, photos, tmp_path):
    """Samples, a validation, meters. Losses are near those of bf16; deltas less so, since Adam's first steps take of
    gradients hardly more than the sign."""
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 64 --s 1\n")
    common = {"mixed_precision": "bf16", "learning_rate": 1e-3, "max_train_steps": 4, "network_train_unet_only": True,
              "sample_prompts": tmp_path / "p.txt", "sample_at_first": True, "validation_split": 0.4,
              "validate_every_n_steps": 4, "meter_every_n_steps": 4, **SHORT, **more}  # fmt: skip
    files, curves = [], []
    for name, fp8 in (("whole", None), ("eighth", True)):
        reset_accelerator()
        logs = tmp_path / name
        given = arguments(folders(family), photos, tmp_path, output_name=name, fp8_base=fp8, logging_dir=logs, **common)
        assert train_network_deft.main(given) == 0
        found = load_file(tmp_path / "out" / f"{name}.safetensors")
        names = {key.removesuffix(".lora_up.weight") for key in found if key.endswith(".lora_up.weight")}
        ups, downs = ({n: found[f"{n}.lora_{part}.weight"].flatten(1) for n in names} for part in ("up", "down"))
        files.append(torch.cat([(ups[n] @ downs[n]).flatten() for n in sorted(names)]))
        told = logged(logs)
        tags = [tag for tag in told.Tags()["scalars"] if tag.startswith(("loss/", "meter/"))]
        curves.append({tag: [event.value for event in told.Scalars(tag)] for tag in tags})
    assert len(list((tmp_path / "out" / "sample").iterdir())) == 2
    assert nn.functional.cosine_similarity(*files, dim=0) > 0.9
    for tag, values in curves[0].items():
        assert len(curves[1][tag]) == len(values)
        if not tag.startswith("meter/") and "divergence" not in tag:  # so early, these are next to nothing
            assert curves[1][tag] == pytest.approx(values, rel=0.05), tag
    assert {"meter/drift", "meter/learnt", "loss/validation/step_average", "loss/current"} <= curves[1].keys()
    with safe_open(tmp_path / "out" / "eighth.safetensors", "pt") as file:
        assert "float8_e4m3fn" in file.metadata()["deft_base_dtype"]
        assert json.loads(file.metadata()["ss_fp8_base"].lower()) is True
