"""Makes lycoris.safetensors and what its layers are to do, with LyCORIS' own code (f49d30d).

    PYTHONPATH=LYCORIS_CHECKOUT python tests/foreign/make_lycoris.py

Every layer of the file is of another algorithm or setting. What it does to its weight is found by running it: it is
linear, so its outputs for unit inputs are the columns of the weight that it has in effect.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

SIZES = {"linear": (16, 8), "conv": (8, 2, 3, 3), "point": (8, 4, 1, 1)}
WIDE = {"wide linear": (48, 64), "wide conv": (16, 12, 3, 3)}
NAMES = {"linear": "attentions_{}_proj_out", "conv": "resnets_{}_conv1", "point": "attentions_{}_proj_in"}


def cases():
    from lycoris.modules.boft import ButterflyOFTModule
    from lycoris.modules.diag_oft import DiagOFTModule
    from lycoris.modules.full import FullModule
    from lycoris.modules.glora import GLoRAModule
    from lycoris.modules.ia3 import IA3Module
    from lycoris.modules.locon import LoConModule
    from lycoris.modules.loha import LohaModule
    from lycoris.modules.lokr import LokrModule

    low_rank = {"lora_dim": 4, "alpha": 3}
    for layer in SIZES:
        yield layer, LoConModule, low_rank
        yield layer, LoConModule, {"lora_dim": 4, "alpha": 2, "rs_lora": True}
        yield layer, LoConModule, {**low_rank, "weight_decompose": True, "wd_on_out": False}
        yield layer, LoConModule, {**low_rank, "weight_decompose": True, "wd_on_out": True}
        yield layer, LohaModule, {"lora_dim": 2, "alpha": 1}
        yield layer, LohaModule, {"lora_dim": 5, "alpha": 1}
        yield layer, LohaModule, {"lora_dim": 2, "alpha": 1, "weight_decompose": True}
        yield layer, LokrModule, {"lora_dim": 2, "alpha": 1, "factor": 2}
        yield layer, LokrModule, {"lora_dim": 1, "alpha": 0.5, "factor": 4, "decompose_both": True}
        yield layer, LokrModule, {"lora_dim": 100, "alpha": 3, "factor": 4}
        yield layer, LokrModule, {"lora_dim": 4, "alpha": 1, "factor": 4, "full_matrix": True}
        yield layer, LokrModule, {"lora_dim": 2, "alpha": 1, "factor": 2, "weight_decompose": True}
        yield layer, LokrModule, {"lora_dim": 2, "alpha": 1, "factor": 2, "unbalanced_factorization": True}
        yield layer, FullModule, {}
        yield layer, GLoRAModule, low_rank
        yield layer, IA3Module, {"train_on_input": False}
        yield layer, IA3Module, {"train_on_input": True}
        yield layer, DiagOFTModule, {"lora_dim": 4}
        yield layer, DiagOFTModule, {"lora_dim": 4, "constraint": 0.01}
        yield layer, DiagOFTModule, {"lora_dim": 4, "rescaled": True}
        yield layer, ButterflyOFTModule, {"lora_dim": 4}
        yield layer, ButterflyOFTModule, {"lora_dim": 4, "rescaled": True}
    for made_by in (LoConModule, LohaModule, LokrModule):
        yield "conv", made_by, {"lora_dim": 2, "alpha": 1, "use_tucker": True}
    yield "wide linear", LokrModule, {"lora_dim": 2, "alpha": 1, "factor": 4}
    yield "wide conv", LokrModule, {"lora_dim": 2, "alpha": 1, "factor": 2, "use_tucker": True}


def effective(module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The weight (m, n) that a layer has in effect."""
    unit = torch.eye(weight[0].numel()).reshape(-1, *weight.shape[1:])
    return module(unit).flatten(1).T.contiguous()


def main(folder: Path) -> None:
    torch.manual_seed(0)
    tensors, expected, bases = {}, {}, {}
    for number, (layer, made_by, options) in enumerate(cases()):
        shape = (SIZES | WIDE)[layer]
        name = f"lora_unet_down_blocks_0_{NAMES[layer.removeprefix('wide ')].format(number)}"
        base = nn.Conv2d(*shape[1::-1], shape[2:], bias=False) if shape[2:] else nn.Linear(*shape[::-1], bias=False)
        weight = bases.setdefault(layer, base.weight.detach().clone())
        base.weight.data.copy_(weight)
        with torch.no_grad():
            module = made_by(name, base, **options)
            for parameter in module.parameters():
                parameter.normal_(std=0.3)
            if hasattr(module, "dora_scale"):
                module.dora_scale.abs_().add_(0.5)
            state = {key: value.clone() for key, value in module.state_dict().items()}
            if made_by.__name__ == "FullModule":
                state = {"diff": module.weight.clone()}
                new = weight.flatten(1) + module.weight.flatten(1)
            else:
                module.apply_to()
                new = effective(module, weight)
        tensors |= {f"{name}.{key}": value for key, value in state.items()}
        expected[f"{name}.delta"] = new - weight.flatten(1)
        print(number, layer, made_by.__name__, options, {key: tuple(value.shape) for key, value in state.items()})
    whole = {key: value.contiguous() for key, value in tensors.items()}
    save_file(whole, folder / "lycoris.safetensors", {"ss_network_module": "lycoris.kohya"})
    for layer in WIDE:
        bases.pop(layer)
    bases_by_shape = {f"base.{len(value.flatten(1)[0])}": value.flatten(1) for value in bases.values()}
    save_file({**expected, **bases_by_shape}, folder / "lycoris.expected.safetensors")


if __name__ == "__main__":
    main(Path(__file__).parent if len(sys.argv) < 2 else Path(sys.argv[1]))
