"""Adapters on a model: networks.deft and peft's, on the same layers, trained by one loop and loaded to draw."""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from benchmarks.paper.labels import PEFT
from library.models.family import Family
from library.options.rooms import NetworkOptions, OptimizerOptions
from library.training.adapter import AdapterOf, DeftAdapter
from library.training.given import Given
from networks import deft, deft_io
from networks.deft_config import DeftError

# key names of an attention's queries, keys, values and output; FLUX.1's are of its double blocks, whose files have
# them in one
ATTENTION = r"_to_(q|k|v|out_0)$|_(img|txt)_attn_(qkv|proj)$"
LAYERS: Mapping[str, Any] = {"network_reg_dims": f"^(?!.*({ATTENTION}))=0"}  # network_args that leave all others alone
CONFIG = "peft_config"  # of a file's metadata

ConfigOf = Callable[[int, list[str]], peft.PeftConfig]  # from the rank and the layers' names


def config_of(label: str) -> ConfigOf:
    """Of one of peft's adapters, with alpha = rank as the others have it.

    :raises DeftError: where the installed peft does not have it
    """
    if label.startswith("peft-deft") and not hasattr(peft, "DeftConfig"):
        raise DeftError(f"--adapters {label}: peft {peft.__version__} has none; pip install -U peft, or leave it out")
    made: Mapping[str, ConfigOf] = {
        "lora": lambda r, names: peft.LoraConfig(r=r, lora_alpha=r, target_modules=names),
        "dora": lambda r, names: peft.LoraConfig(r=r, lora_alpha=r, target_modules=names, use_dora=True),
        # (b - 1) n / 2 parameters of a layer with n inputs, where a LoRA of a square one has 2 r n
        "oft": lambda r, names: peft.OFTConfig(
            r=0, oft_block_size=4 * r, target_modules=names, use_cayley_neumann=True
        ),
        "peft-deft": lambda r, names: peft.DeftConfig(r=r, target_modules=names),
        "peft-deft-qr": lambda r, names: peft.DeftConfig(r=r, target_modules=names, decomposition_method="qr"),
    }
    return made[label]


def adapter_of(label: str) -> AdapterOf:
    """What puts it on a model that is to be trained."""
    if label not in PEFT:
        return DeftAdapter
    make = config_of(label)

    def build(
        options: NetworkOptions, given: Given, model: Family, accelerator: Accelerator, folder: Path
    ) -> PeftAdapter:
        assert options.network_dim is not None
        return PeftAdapter(make(options.network_dim, targets_of(model.denoiser)), model.denoiser)

    return build


def targets_of(denoiser: nn.Module) -> list[str]:
    """Names of the layers that networks.deft adapts with `LAYERS`."""
    network = deft.create_network(1.0, 1, 1.0, None, [], denoiser, **LAYERS)
    layers = {id(module.target.layer) for module in network.unet_modules}
    return [name for name, module in denoiser.named_modules() if id(module) in layers]


class PeftAdapter:
    """One of peft's, in the interface of `library.training.adapter.Adapter`.

    :param denoiser: that it is put into, in place
    """

    def __init__(self, config: peft.PeftConfig, denoiser: nn.Module):
        self.config, self.denoiser, self.on = config, denoiser, True
        self.layers = _inject(config, denoiser)
        self.trained = [p for p in denoiser.parameters() if p.requires_grad]
        self.module: nn.Module = nn.ParameterList(self.trained)

    def fields(self) -> dict[str, object]:
        """See `Adapter`."""
        return {"ss_network_module": "peft", CONFIG: _as_json(self.config)}

    def groups(self, rates: OptimizerOptions) -> tuple[list[dict[str, Any]], list[str]]:
        """See `Adapter`; its values are float32, whatever the model has been placed in."""
        _in_float32(self.trained)
        rate = rates.learning_rate if rates.unet_lr is None else rates.unet_lr
        return [{"params": self.trained, "lr": rate}], ["unet"]

    def parameters(self) -> Iterable[nn.Parameter]:
        """See `Adapter`."""
        return self.trained

    def start_epoch(self) -> None:
        """See `Adapter`."""

    def start_step(self, ahead: bool) -> None:
        """See `Adapter`."""

    def skip_pass(self) -> None:
        """See `Adapter`."""

    def after_step(self) -> None:
        """See `Adapter`."""

    def set_multiplier(self, multiplier: float) -> None:
        """See `Adapter`; 0 and 1 alone, since not all of peft's can be scaled."""
        if multiplier not in (0, 1):
            raise ValueError(f"multiplier {multiplier}: peft's adapters are on or off")
        if self.on != bool(multiplier):
            self.on = bool(multiplier)
            for layer in self.layers:
                layer.enable_adapters(self.on)

    def save(self, path: Path, dtype: torch.dtype, metadata: Mapping[str, str]) -> None:
        """See `Adapter`."""
        found = peft.get_peft_model_state_dict(self.denoiser, save_embedding_layers=False)
        tensors = {name: tensor.detach().to("cpu", dtype).contiguous() for name, tensor in found.items()}
        deft_io.write_safetensors(tensors, path, metadata)

    def apart(self, path: Path) -> tuple[str, float]:
        """See `Adapter`; of the tensors."""
        read = deft_io.read_tensors(path)[0]
        found = peft.get_peft_model_state_dict(self.denoiser, save_embedding_layers=False)
        if missing := found.keys() - read.keys():
            raise DeftError(f"{path}: lacks {min(missing)}")
        shares = {
            name: float((read[name].double() - tensor.cpu().double()).norm() / tensor.double().norm().clamp(min=1e-30))
            for name, tensor in found.items()
        }
        worst = max(shares, key=lambda name: shares[name])
        return worst, shares[worst]


def _inject(config: peft.PeftConfig, denoiser: nn.Module) -> list[BaseTunerLayer]:
    """Its layers, their parameters in float32; in place."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of block sizes that do not fit, which the number of parameters shows
        peft.inject_adapter_in_model(config, denoiser)
    _in_float32(p for p in denoiser.parameters() if p.requires_grad)
    return [module for module in denoiser.modules() if isinstance(module, BaseTunerLayer)]


def _in_float32(parameters: Iterable[nn.Parameter]) -> None:
    for parameter in parameters:
        parameter.data = parameter.data.float()


def _as_json(config: peft.PeftConfig) -> str:
    values = {key: sorted(value) if isinstance(value, set) else value for key, value in config.to_dict().items()}
    return json.dumps(values)


@contextlib.contextmanager
def attached(model: Family, file: Path | None) -> Iterator[None]:
    """Within it, the model computes with the adapter of a file; behind it, as it did before.

    :param model: that has been placed
    :param file: of a training's; None for the base model
    :raises DeftError: for a file that cannot be read or does not fit
    """
    if file is None:
        yield
        return
    metadata = deft_io.read_metadata(file)
    with _peft(model.denoiser, file, metadata[CONFIG]) if CONFIG in metadata else _deft(model, file):
        yield


@contextlib.contextmanager
def _deft(model: Family, file: Path) -> Iterator[None]:
    """As any program reads the file."""
    adapter = deft_io.read_adapter(file)
    network = deft.network_of_adapter(1.0, adapter, model.text_encoders, model.denoiser, for_inference=True)
    network.apply_to(model.text_encoders, model.denoiser)
    try:
        network.load_adapter(adapter)
        network.to(next(model.denoiser.parameters()).device)
        network.eval()
        yield
    finally:
        network.remove()


@contextlib.contextmanager
def _peft(denoiser: nn.Module, file: Path, config: str) -> Iterator[None]:
    device = next(denoiser.parameters()).device
    try:
        layers = _inject(peft.get_peft_config(json.loads(config)), denoiser)
        found: Any = peft.set_peft_model_state_dict(denoiser, deft_io.read_tensors(file)[0])
        if found.unexpected_keys:
            raise DeftError(f"{file}: fits another model; {found.unexpected_keys[0]} is not in this one")
        nn.ModuleList(layers).to(device)  # type: ignore[arg-type]
        denoiser.requires_grad_(False)
        yield
    finally:
        _eject(denoiser)


def _eject(denoiser: nn.Module) -> None:
    """Puts the layers back that peft's stand for."""
    for parent in list(denoiser.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, BaseTunerLayer):
                setattr(parent, name, child.get_base_layer())
    if hasattr(denoiser, "peft_config"):
        del denoiser.peft_config
