"""configs/published: each is read, builds its network, and trains the formula of the code it is named after.

The formulas are written here once more, in float64, from the authors' and peft's forward passes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import diffusers
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import train_network_deft
from library.models.reading import CONFIGS
from library.options.parse import parse
from library.options.rooms import Run
from networks import deft
from networks.deft_module import DeftModule
from tests import small_models, small_omnigen
from tests.conftest import ROOT, perturb, relative_error
from tests.test_architectures import omnigen_transformer, sd_unet, sdxl_unet

FOLDER = ROOT / "configs" / "published"
Formula = Callable[[Tensor, Tensor, Tensor], Tensor]


def unconstrained(W: Tensor, P: Tensor, R: Tensor) -> Tensor:
    """deft/injection.py with decomposition_method "None"."""
    return W - P @ torch.relu(P).T @ W + P @ R


def no_basis(W: Tensor, P: Tensor, R: Tensor) -> Tensor:
    """dreambench_plus/modules/main.py with orthonormalize=False."""
    return W - (P @ P.T) @ W + P @ R


def orthogonal(W: Tensor, P: Tensor, R: Tensor) -> Tensor:
    """deft/injection.py with "qr": the signs of LAPACK's Q are those of ours here, as R's would follow them."""
    Q = torch.linalg.qr(P).Q
    Q = Q * (Q.detach() * P.detach()).sum(0).sign()
    return W - (Q @ Q.T) @ W + Q @ R


def removed(W: Tensor, P: Tensor, R: Tensor) -> Tensor:
    """PaRaRankReductionLayer; and dreambench_plus/modules/main.py with use_gating "0" and orthonormalize=True."""
    Q = torch.linalg.qr(P).Q
    return W - (Q @ Q.T) @ W


@dataclass(frozen=True)
class Published:
    """:param layers: pattern that fits the key names of all layers that are adapted, and of no other
    :param together: whether queries, keys and values have one P
    :param steps: how far R's entries, and P's, move at the first step at real widths beside theirs, least and most;
        of an orthogonal P, how fast it turns; None where it does not learn
    """

    model: Callable[[], nn.Module]
    formula: Formula
    layers: str
    rank: int
    steps: tuple[tuple[float, float] | None, tuple[float, float] | None]
    scale: float = 1.0
    together: bool = True


OMNIGEN = r"_self_attn_to_([qkv]|out_0)$"
ATTENTION = r"_attn[12]_to_([qkv]|out_0)$"
ALL = {
    "omnigen_joint": Published(omnigen_transformer, orthogonal, OMNIGEN, 64, ((1, 1), None)),
    "omnigen_paper": Published(omnigen_transformer, orthogonal, OMNIGEN, 64, ((1, 1), (1, 2**0.5))),
    "omnigen_single": Published(omnigen_transformer, unconstrained, OMNIGEN, 8, ((1, 1), (0.816, 1))),
    "omnigen_para": Published(omnigen_transformer, removed, OMNIGEN, 64, (None, (1, 1))),
    "dreambench_plus_sdxl": Published(
        sdxl_unet, no_basis, ATTENTION, 4, ((0.638, 1.141), (0.358, 0.561)), together=False
    ),
    "dreambench_plus_sdxl_para": Published(sdxl_unet, removed, ATTENTION, 4, (None, (0.358, 0.561)), together=False),
    "peft_sd21": Published(
        lambda: sd_unet(1024), orthogonal, r"_attn[12]_to_[qv]$", 8, ((0.322, 0.646), (0.506, 1.012)), 2.0, False
    ),
}


def run_of(name: str) -> Run:
    return parse(["--config_file", str(FOLDER / f"{name}.toml")])


def network_of(name: str, model: nn.Module, most: int = 1000) -> deft.DeftNetwork:
    """:param most: a limit of the rank, for a small model"""
    options = run_of(name).network
    rank = min(options.network_dim, most)
    sizes = rank, options.network_alpha * rank / options.network_dim
    net = deft.create_network(1.0, *sizes, None, [], model, **options.network_args)
    net.apply_to([], model)
    return net


def test_every_file_of_the_folder_is_here():
    assert {path.stem for path in FOLDER.glob("*.toml")} == set(ALL)


@pytest.mark.parametrize("name", ALL)
def test_the_network_has_the_published_layers_ranks_and_matrices(name):
    published, model = ALL[name], ALL[name].model().requires_grad_(False)
    net = network_of(name, model)
    pieces = [piece.file_name for m in net.all_modules for piece in m.target.pieces]
    assert pieces
    assert all(re.search(published.layers, piece) for piece in pieces)
    linear = [path for path, layer in model.named_modules() if isinstance(layer, nn.Linear)]
    wanted = [path for path in linear if re.search(published.layers, "_" + path.replace(".", "_"))]
    assert len(pieces) == len(wanted)
    assert all(m.rank == min(published.rank, *m.target.shape) for m in net.all_modules)
    assert {m.scale for m in net.all_modules} == {published.scale}
    assert any(len(m.target.pieces) == 3 for m in net.all_modules) == published.together


@pytest.mark.parametrize("name", ALL)
def test_answers_and_gradients_are_those_of_the_published_formula(name):
    """Of each layer, as if trained: W' applied to an input, and the gradients of P and R, in float64."""
    published, model = ALL[name], ALL[name].model().requires_grad_(False)
    net = network_of(name, model, 8).train()
    perturb(net)
    for module in net.all_modules:
        x = torch.randn(3, module.target.shape[1])
        found = torch.cat([place.layer(x) for place in module.target.places], -1)
        found.square().sum().backward()
        W = module.base_weight().double()
        P, R = (None if p is None else p.detach().double().requires_grad_() for p in (module.P, module.R))
        theirs = P * module.P_rate, None if R is None else paper_R(module, R, W)
        biases = [place.layer.bias for place in module.target.places]
        expected = x.double() @ published.formula(W, *theirs).T
        expected = expected + (0 if biases[0] is None else torch.cat(biases).double())
        expected.square().sum().backward()
        assert relative_error(found.double(), expected) < 1e-5, module.lora_name
        if R is not None:
            assert relative_error(module.R.grad.double(), R.grad) < 1e-4, module.lora_name
        if module.P.requires_grad:
            assert relative_error(module.P.grad.double(), P.grad) < 1e-4, module.lora_name
        assert module.P.requires_grad == (name != "omnigen_joint")


def paper_R(module: DeftModule, R: Tensor, W: Tensor) -> Tensor:
    """s R of theirs, which holds the base's own part as well, of our deviation from the start."""
    return module.scale * module.R_rate * R + module.config.removal * module.E0.double().T @ W


@pytest.mark.parametrize("name", ALL)
def test_it_starts_as_published(name):
    """P and R of theirs at the first step: normal, of size 0.02; of peft, the base model."""
    torch.manual_seed(0)
    model = ALL[name].model().requires_grad_(False)
    net = network_of(name, model)
    module = max(net.all_modules, key=lambda m: m.P.numel())
    if name == "peft_sd21":
        assert all(not (m.lora_factors()[1].abs() > 1e-6).any() for m in net.all_modules)
        return
    assert all(not m.E0.any() for m in net.all_modules)
    if module.config.basis in ("relu", "none"):
        assert float(module.effective_P.detach().std()) == pytest.approx(0.02, rel=0.15)
    if module.R is not None:
        assert float(module.effective_R.detach().std()) == pytest.approx(0.02, rel=0.15)
        assert abs(float(module.effective_R.detach().mean())) < 0.004


def real_model(name: str) -> nn.Module:
    """The widths that the configuration is for, without weights; of OmniGen one block."""
    with torch.device("meta"):
        if name.startswith("omnigen"):
            factors = {"long_factor": [1.0] * 48, "short_factor": [1.0] * 48}
            return diffusers.OmniGenTransformer2DModel(num_layers=1, rope_scaling=factors)
        kind = "sd2" if name == "peft_sd21" else "sdxl"
        config = diffusers.UNet2DConditionModel.load_config(Path(CONFIGS) / kind / "unet")
        return diffusers.UNet2DConditionModel.from_config(config)


@pytest.mark.parametrize("name", ALL)
def test_the_first_steps_are_as_far_as_the_comments_say(name):
    """Adam moves every entry of what it sees by the rate. Theirs sees P and R themselves."""
    published, run = ALL[name], run_of(name)
    net = network_of(name, real_model(name))
    groups, _ = net.prepare_optimizer_params(None, run.optimizer.unet_lr, run.optimizer.learning_rate)
    rates = {parameter: group["lr"] for group in groups for parameter in group["params"]}
    theirs = {"omnigen": 1e-3, "dreambe": 5e-5, "peft_sd": 1e-4}[name[:7]]
    of_P = theirs * (0.1 if name in ("omnigen_paper", "omnigen_single") else 1)
    moved_R = [rates[m.R] * m.R_rate / theirs for m in net.all_modules if m.R is not None]
    moved_P = []
    for m in net.all_modules:
        if m.P in rates:
            size = 1.0  # of what an entry's step is to be compared with
            if m.config.basis == "qr":
                std = 1 / (3 * m.rank) ** 0.5 if name == "omnigen_para" else 0.02
                size = float(m.P.detach().norm(dim=0).mean()) / (std * m.target.shape[0] ** 0.5)
            moved_P.append(rates[m.P] * m.P_rate / of_P / size)
    for moved, expected in zip((moved_R, moved_P), published.steps, strict=True):
        assert bool(moved) == (expected is not None)
        if expected is not None:
            assert (min(moved), max(moved)) == pytest.approx(expected, abs=5e-3)


@pytest.mark.parametrize("name", ALL)
def test_the_trainer_takes_two_steps_with_it(name, tmp_path, photos, fresh_accelerator):
    """With a small model and pictures in the places of the paths, and a size that fits them."""
    kind = "omnigen" if name.startswith("omnigen") else "sd2" if name == "peft_sd21" else "sdxl"
    model = small_omnigen.build(tmp_path) if kind == "omnigen" else small_models.build(kind, tmp_path / "model")
    given = {
        "pretrained_model_name_or_path": model, "output_dir": tmp_path / "out", "output_name": "x", "resolution": 64,
        "max_train_steps": 2, "mixed_precision": "no", "save_precision": "float", "min_bucket_reso": 64,
    }  # fmt: skip
    if kind == "omnigen":
        rows = [{"instruction": "a photo of sks cat", "input_images": [], "output_image": p.name}
                for p in sorted(photos.glob("*.jp*g"))]  # fmt: skip
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        given |= {"train_jsonl": tmp_path / "rows.jsonl", "image_path": photos, "network_dim": 4}
        given |= {"max_train_epochs": 1} if name == "omnigen_single" else {}
    else:
        given |= {"train_data_dir": photos.parent} | ({"vae": model / "vae"} if kind == "sdxl" else {})
    words = [word for key, value in given.items() for word in (f"--{key}", str(value))]
    assert train_network_deft.main(["--config_file", str(FOLDER / f"{name}.toml"), *words]) == 0
    names = {key.partition(".")[0] for key in load_file(tmp_path / "out" / "x.safetensors")}
    assert names
    assert all(re.search(ALL[name].layers, one) for one in names)
