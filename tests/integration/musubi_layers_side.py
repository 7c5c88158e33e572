"""Runs in musubi-tuner's own Python: `python musubi_layers_side.py FILE` writes, for every architecture and many
options, the layers and ranks that its own network and networks.deft adapt on a model of the real shapes (meta device).

A rank above a layer's size is that size: Krea 2 has a layer with one output.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import torch

from networks import deft
from tests.integration.musubi_models import REAL

CONV: dict[str, Any] = {"conv_dim": "2", "conv_alpha": "1"}
ALL_BUT = {"exclude_patterns": "['.*']", "include_patterns": r"['.*\\.1\\..*attn.*', '.*mod.*']"}
OPTIONS: dict[str, list[dict[str, str]]] = {
    "kontext": [
        {}, CONV, {"exclude_patterns": "['.*single_blocks.*']"}, {"include_patterns": r"['.*img_mod\\.lin.*']"},
        {"exclude_patterns": "[]"}, ALL_BUT,
    ],
    "flux 2 klein 4b": [{}, {"exclude_patterns": "['.*img_attn.*']"}, {"include_patterns": "['.*modulation.*']"}],
    "qwen image": [{}, {"exclude_patterns": "['.*txt_mlp.*']"}, {"include_patterns": "['.*_mod_.*']"}, ALL_BUT],
    "z image": [{}, CONV, {"include_patterns": "['.*_refiner.*']"}, {"exclude_patterns": "['.*feed_forward.*']"}],
    "wan t2v 14b": [{}, CONV, {"exclude_patterns": "['.*ffn.*']", "include_patterns": r"['blocks\\.3\\..*']"}],
    "hunyuan video": [{}, {"exclude_patterns": "['.*txt_.*']"}, {"include_patterns": "['.*img_mod.*']"}],
    "hunyuan video 1.5": [
        {}, {"exclude_patterns": "['.*_mod.*']"}, {"exclude_patterns": "['.*attn_q','.*fc1']"}, ALL_BUT,
    ],
    "framepack": [{}, CONV, {"include_patterns": "['.*norm.*']"}],
    "kandinsky 5": [
        {}, {"exclude_patterns": "['.*']"}, ALL_BUT, {"exclude_patterns": "['.*feed.*']", "include_patterns": "[]"},
        {"include_patterns": "['.*modulation.*']"},
    ],
    "krea 2": [{}, CONV, {"exclude_patterns": r"['.*\\.mlp\\..*','first','last\\.linear','txtfusion\\..*']"}],
    "ideogram 4": [{}, {"include_patterns": "['.*adaln_modulation.*']"}],
    "hidream o1": [{}, {"exclude_patterns": "['.*mlp.*']"}, {"include_patterns": "['.*lm_head.*']"}, ALL_BUT],
    "hidream o1 edit": [{}, {"exclude_patterns": r"['model\\.visual\\.blocks.*']"}],
}  # fmt: skip


def main(file: Path, names: list[str]) -> None:
    found: dict[str, Any] = {}
    for name in names or REAL:
        own, make = REAL[name]
        module = importlib.import_module(f"musubi_tuner.networks.{own}")
        with torch.device("meta"):
            model = make()
        for options in OPTIONS.get(name, [{}]):
            arguments = 1.0, 4, 1.0, None, None, model
            try:
                with torch.device("meta"):
                    theirs = module.create_arch_network(*arguments, neuron_dropout=None, **options).unet_loras
                ours = deft.create_arch_network(*arguments, neuron_dropout=None, **options).unet_modules
            except Exception as error:
                raise RuntimeError(f"{name} {options}") from error
            found[f"{name} {options}"] = [
                [[m.lora_name, min(m.lora_dim, *m.org_module.weight.shape), float(m.scale)] for m in theirs],
                [[m.target.own_name, m.rank, m.scale] for m in ours],
            ]
            print("---", name, options, len(theirs), flush=True)
    file.write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2:])
