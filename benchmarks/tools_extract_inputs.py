"""What benchmarks/tools_extract.py measures with: an adapter, pairs of checkpoints, and what is wrong in what is made.

    python benchmarks/tools_extract_inputs.py lora FILE --shapes SHAPES.json --every 6
    python benchmarks/tools_extract_inputs.py pair ORG TUNED --shapes SHAPES.json --depth 2
    PYTHON-OF-SD-SCRIPTS benchmarks/tools_extract_inputs.py shallow 2 SCRIPT OPTION...

`lora` has random factors for SDXL's U-Net, of all layers or of some of every shape. `pair` has random weights and the
same with a change of falling singular values in the U-Net's layers, all in float16. A `depth` leaves that many
transformer blocks in each of SDXL's attentions, which have two or ten; `shallow` runs a script of sd-scripts on such a
model. Shapes come from `tools_inputs.py shapes`.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import runpy
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import tools_inputs
import torch

UNET = "model.diffusion_model."
RANK, SHARE = 256, 0.02  # of a change: its rank, and its norm by that of the weight


def is_layer(key: str, shape: list[int]) -> bool:
    """Whether it is a matrix in the U-Net's attentions, which are what a LoRA without conv_dim adapts there."""
    return key.startswith(UNET) and len(shape) == 2 and bool(re.search(r"transformer_blocks\.|\.proj_(in|out)\.", key))


def kohya(key: str) -> str:
    return "lora_unet_" + key.removeprefix(UNET).removesuffix(".weight").replace(".", "_")


def cut(shapes: Mapping[str, list[int]], depth: int) -> dict[str, list[int]]:
    """Without the transformer blocks behind the first few of each of the U-Net's attentions."""

    def block(key: str) -> int:
        found = re.search(r"\.transformer_blocks\.(\d+)\.", key)
        return int(found[1]) if found and key.startswith(UNET) else 0

    return {key: shape for key, shape in shapes.items() if block(key) < depth}


def falling(m: int, n: int, rank: int, randoms: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of norm about 1 whose k-th direction is about 1 / sqrt(k) of the first."""
    sizes = torch.arange(1, rank + 1).rsqrt()
    sizes /= sizes.norm() * math.sqrt(m * n)
    return torch.randn(m, rank, generator=randoms) * sizes, torch.randn(rank, n, generator=randoms)


def write_lora(file: Path, shapes: Mapping[str, list[int]], rank: int, every: int) -> None:
    """Alpha is half the rank."""
    from safetensors.torch import save_file

    randoms = torch.Generator().manual_seed(3)
    of_shape: dict[tuple[int, ...], list[str]] = defaultdict(list)
    for key, shape in shapes.items():
        if is_layer(key, shape):
            of_shape[tuple(shape)].append(key)
    tensors: dict[str, torch.Tensor] = {}
    for (m, n), keys in of_shape.items():
        for key in keys[::every]:
            up, down = falling(m, n, rank, randoms)
            tensors[f"{kohya(key)}.lora_up.weight"] = (up * math.sqrt(n)).half()
            tensors[f"{kohya(key)}.lora_down.weight"] = (down / math.sqrt(n)).half()
            tensors[f"{kohya(key)}.alpha"] = torch.tensor(rank / 2).half()
    save_file(tensors, file, {"ss_network_module": "networks.lora", "ss_network_dim": str(rank)})


def write_pair(org: Path, tuned: Path, shapes: Mapping[str, list[int]]) -> None:
    """Both at once, one tensor in memory at a time."""
    header: dict[str, Any] = {}
    end = 0
    for key, shape in shapes.items():
        start, end = end, end + math.prod(shape) * 2
        header[key] = {"dtype": "F16", "shape": shape, "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    randoms = torch.Generator().manual_seed(4)
    with open(org, "wb") as first, open(tuned, "wb") as second:
        for out in (first, second):
            out.write(struct.pack("<Q", len(text)) + text)
        for (key, shape), W in zip(shapes.items(), tools_inputs.tensors_of(shapes, torch.float16, 4), strict=True):
            changed = W
            if is_layer(key, shape):
                up, down = falling(shape[0], shape[1], RANK, randoms)
                changed = torch.addmm(W.float(), up, down, alpha=SHARE * float(W.float().norm())).half()
            for out, tensor in ((first, W), (second, changed)):
                out.write(tensor.flatten().view(torch.uint8).numpy().data)


def factors_of(lora: Any, name: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Of a layer of an open kohya file, with its scale."""
    up, down = (lora.get_tensor(f"{name}.lora_{part}.weight").double().flatten(1) for part in ("up", "down"))
    return up, down * float(lora.get_tensor(f"{name}.alpha")) / len(down)


def errors(exact: Mapping[str, Any], layers: list[str], written: Mapping[str, Path]) -> dict[str, Any]:
    """Of each file, by the norm of what was to be expressed: in a layer at most, and of all layers together.

    :param exact: key name -> the change (m, n), float64, when called
    """
    from safetensors import safe_open

    files = {way: safe_open(path, "pt") for way, path in written.items()}
    found: dict[str, list[float]] = {way: [] for way in files}
    norms = []
    for name in layers:
        D = exact[name]()
        norms.append(float(D.norm()))
        for way, file in files.items():
            up, down = factors_of(file, name)
            found[way].append(float((D - up @ down).norm()))
    of_all = math.hypot(*norms)
    return {
        "layers_compared": len(layers),
        "error": {
            way: {
                "most": round(max(lost / norm for lost, norm in zip(each, norms, strict=True)), 4),
                "whole": round(math.hypot(*each) / of_all, 4),
            }
            for way, each in found.items()
        },
    }


def of_lora(lora: Path, written: Mapping[str, Path]) -> dict[str, Any]:
    """What was lost of an adapter."""
    from safetensors import safe_open

    with safe_open(lora, "pt") as file:
        names = sorted({key.partition(".")[0] for key in file.keys()})

        def change(name: str) -> torch.Tensor:
            up, down = factors_of(file, name)
            return up @ down

        return errors({name: lambda name=name: change(name) for name in names}, names[::4], written)


def of_pair(org: Path, tuned: Path, every: int, written: Mapping[str, Path]) -> dict[str, Any]:
    """What was lost of the difference of two checkpoints, and how little could have been."""
    from safetensors import safe_open

    with safe_open(org, "pt") as base, safe_open(tuned, "pt") as model:
        keys = [key for key in base.keys() if is_layer(key, base.get_slice(key).get_shape())][::every]

        def change(key: str) -> torch.Tensor:
            return model.get_tensor(key).double() - base.get_tensor(key).double()

        return errors({kohya(key): lambda key=key: change(key) for key in keys}, [*map(kohya, keys)], written)


def run_shallow(depth: int, script: str, arguments: list[str]) -> None:
    """A script of sd-scripts, whose SDXL has fewer transformer blocks; run by its Python, in its folder."""
    sys.path[:0] = [str(Path.cwd()), str(Path(script).parent)]
    from library import sdxl_original_unet  # sd-scripts' own

    built = sdxl_original_unet.Transformer2DModel.__init__

    def shallow(self: Any, *args: Any, num_transformer_layers: int = 1, **kwargs: Any) -> None:
        built(self, *args, num_transformer_layers=min(depth, num_transformer_layers), **kwargs)

    sdxl_original_unet.Transformer2DModel.__init__ = shallow
    sys.argv = [script, *arguments]
    runpy.run_path(script, run_name="__main__")


def pairs(words: list[str]) -> Iterator[tuple[str, Path]]:
    for word in words:
        way, _, path = word.rpartition("=")
        yield way, Path(path)


def main() -> None:
    """One command."""
    if sys.argv[1:2] == ["shallow"]:
        run_shallow(int(sys.argv[2]), sys.argv[3], sys.argv[4:])
        return
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    lora, pair, of_lora_, of_pair_ = (commands.add_parser(name) for name in ("lora", "pair", "of_lora", "of_pair"))
    lora.add_argument("files", type=Path, nargs=1)
    lora.add_argument("--rank", type=int, default=128)
    lora.add_argument("--every", type=int, default=1)
    pair.add_argument("files", type=Path, nargs=2)
    pair.add_argument("--depth", type=int, default=10)
    for maker in (lora, pair):
        maker.add_argument("--shapes", type=Path, required=True)
    of_lora_.add_argument("files", type=Path, nargs=1)
    of_pair_.add_argument("files", type=Path, nargs=2)
    of_pair_.add_argument("--every", type=int, default=1)
    for check in (of_lora_, of_pair_):
        check.add_argument("--written", nargs="+", metavar="WAY=FILE")
    given = parser.parse_args()
    if given.command == "of_lora":
        print(json.dumps(of_lora(*given.files, dict(pairs(given.written)))))
    elif given.command == "of_pair":
        print(json.dumps(of_pair(*given.files, given.every, dict(pairs(given.written)))))
    elif not all(file.exists() for file in given.files):
        shapes = json.loads(given.shapes.read_text())["checkpoint"]
        if given.command == "lora":
            write_lora(given.files[0], shapes, given.rank, given.every)
        else:
            write_pair(*given.files, cut(shapes, given.depth))


if __name__ == "__main__":
    main()
