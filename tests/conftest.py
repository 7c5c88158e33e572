"""Fixtures: the small model, and pieces that several files need."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from networks import deft, deft_save
from networks.deft_factors import Factors
from tests import processes

ROOT = Path(__file__).resolve().parents[1]
PHOTOS = ROOT / "configs" / "quickstart" / "photos"


LONG = {"test_world", "test_resume", "test_personalization", "test_meters", "test_out_of_memory"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What takes long comes first: at the end workers share what is left, and would wait for a long test."""
    items.sort(key=lambda item: item.path.stem not in LONG)


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


DEPTHS = (1, 4)  # layers of a block of the small model's U-Net, and of its text encoder: time goes by their number
TEXT, UNET = 24, 120  # of them that are adapted


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory) -> Path:
    tiny_model = pytest.importorskip("library.world.tiny_model")
    return tiny_model.build(tmp_path_factory.mktemp("model"), depths=DEPTHS)


@pytest.fixture(scope="session")
def whole_folder(tmp_path_factory) -> Path:
    """With as many layers as Stable Diffusion 1.5."""
    tiny_model = pytest.importorskip("library.world.tiny_model")
    return tiny_model.build(tmp_path_factory.mktemp("whole"))


@pytest.fixture
def whole(whole_folder):
    return loaded(whole_folder)


@pytest.fixture
def model(model_folder):
    return loaded(model_folder)


def loaded(path, **options):
    """A model as the trainer loads it."""
    from library.models.loading import load
    from library.options.rooms import ModelOptions

    return load(ModelOptions(str(path), **options))


@pytest.fixture
def latents():
    return torch.randn(2, 4, 16, 16)


@pytest.fixture
def photos(tmp_path) -> Path:
    """The quickstart's pictures, one repeat each."""
    folder = tmp_path / "photos" / "1_sks cat"
    shutil.copytree(PHOTOS / "8_sks cat", folder)
    return folder


def arguments(model_folder, photos, tmp_path, **changes) -> list[str]:
    """Of a short training on the small model."""
    values = {
        "pretrained_model_name_or_path": model_folder,
        "train_data_dir": photos.parent,
        "output_dir": tmp_path / "out",
        "output_name": "cat",
        "resolution": "64",
        "max_train_steps": 3,
        "save_precision": "float",
        "seed": 1,
    } | changes
    given: list[str] = []
    for key, value in values.items():
        if value is True:
            given.append(f"--{key}")
        elif isinstance(value, list):
            given += [f"--{key}", *map(str, value)]
        elif value is not None:
            given += [f"--{key}", str(value)]
    return given


def reset_accelerator() -> None:
    """accelerate keeps one state for the whole process."""
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


@pytest.fixture
def fresh_accelerator():
    reset_accelerator()
    yield
    reset_accelerator()


@pytest.fixture
def run(model_folder, photos, tmp_path, fresh_accelerator):
    """Runs the trainer in this process; returns its exit code."""
    import train_network_deft

    return lambda **changes: train_network_deft.main(arguments(model_folder, photos, tmp_path, **changes))


def in_two_processes(folder: Path, code: str, *arguments: str) -> None:
    """Runs a script in two processes of one training, as torchrun starts them, but without its own process.

    :param folder: where the script is written to
    """
    script = folder / "script.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{code}", encoding="utf-8")
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # keeps its free port
    common = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(store.port), "TORCHELASTIC_USE_AGENT_STORE": "True",
              "ACCELERATE_USE_CPU": "true", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2",
              "OMP_NUM_THREADS": "1"}  # fmt: skip
    children, told = [], [folder / f"errors{rank}.txt" for rank in range(2)]
    for rank, errors in enumerate(told):
        environment = os.environ | common | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
        children.append(processes.start([str(script), *arguments], environment, errors, anew=rank == 1))
    try:
        end = time.monotonic() + 300
        while any(child.is_alive() for child in children) and not any(child.exitcode for child in children):
            assert time.monotonic() < end
            time.sleep(0.05)
        for child, errors in zip(children, told, strict=True):
            assert not child.exitcode, errors.read_text(errors="replace")[-3000:]
    finally:
        for child in children:
            child.kill()
            child.join()


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """A family's name -> the Diffusers folder of a small model, made once."""
    from tests import small_flux, small_models, small_omnigen

    made: dict[str, Any] = {}

    def folder(family: str) -> Any:
        if family not in made:
            to = tmp_path_factory.mktemp(family)
            small: dict[str, Any] = {
                "flux": lambda: small_flux.build(to).folder,
                "omnigen": lambda: small_omnigen.build(to),
            }
            made[family] = small.get(family, lambda: small_models.build(family, to))()
        return made[family]

    return folder


def layer_of(kind: str) -> nn.Module:
    """A frozen layer with weights of the usual size."""
    layers = {
        "linear": lambda: nn.Linear(48, 40),
        "linear without bias": lambda: nn.Linear(24, 56, bias=False),
        "conv 1x1": lambda: nn.Conv2d(24, 32, 1),
        "conv 3x3": lambda: nn.Conv2d(12, 40, 3, stride=2, padding=1),
    }
    return layers[kind]().requires_grad_(False)


LAYER_KINDS = ["linear", "linear without bias", "conv 1x1", "conv 3x3"]


def input_of(layer: nn.Module, batch: int = 3) -> Tensor:
    if isinstance(layer, nn.Conv2d):
        return torch.randn(batch, layer.in_channels, 7, 6)
    return torch.randn(batch, 5, layer.in_features)


def perturb(network: nn.Module, size: float = 0.3) -> None:
    """As if trained: every parameter moves by a part of its own size, or from zero."""
    with torch.no_grad():
        for parameter in network.parameters():
            scale = parameter.std() if parameter.numel() > 1 and parameter.any() else torch.tensor(0.05)
            parameter += size * scale * torch.randn_like(parameter)


def network_of(
    model, dim: int | None = 4, alpha: float | None = 4, trained: bool = True, **options
) -> deft.DeftNetwork:
    """A network applied to the small model; with all of the removal, so that W takes part."""
    options = {"removal": "1"} | options
    network = deft.create_network(1.0, dim, alpha, None, model.text_encoders, model.denoiser, **options)
    network.apply_to(model.text_encoders, model.denoiser)
    if trained:
        perturb(network)
    return network.eval()


def deltas(network: deft.DeftNetwork) -> dict[str, Tensor]:
    with torch.no_grad():
        return {m.lora_name: torch.matmul(*m.lora_factors()) for m in network.all_modules}


def file_factors(net: deft.DeftNetwork) -> dict[str, Factors]:
    """What its file would have of each weight."""
    return deft_save.file_factors(net.all_modules, [module.lora_factors() for module in net.all_modules])


def relative_error(a: Tensor, b: Tensor) -> float:
    return float(((a - b).norm() / b.norm().clamp(min=1e-12)).detach())


def largest_error(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    assert a.keys() == b.keys()
    return max(relative_error(a[name], b[name]) for name in b)


@pytest.fixture
def in_order(monkeypatch):
    """Pictures come as their names do, whatever the batches' size."""
    from library.data.batches import Loader

    monkeypatch.setattr(Loader, "shuffle", property(lambda self: False, lambda self, value: None), raising=False)


@pytest.fixture(autouse=True)
def _own_cache(tmp_path_factory, monkeypatch):
    """What the trainer keeps for later runs stays in a folder of the tests."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))
