"""Runs in sd-scripts' own Python: `python captions_side.py FOLDER`, FOLDER having rows.json, the small models,
tokenizers/ and, for each data set, files.

Writes what sd-scripts' own data sets make of captions and of metadata, and its strategies of weighted captions.
"""

from __future__ import annotations

import inspect
import json
import random
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from library.strategy_base import LatentsCachingStrategy, TokenizeStrategy
from safetensors.torch import save_file
from texts_side import encoders_of

from library import strategy_flux, strategy_sd, strategy_sdxl

try:  # v0.11.1
    from library.dataset import BaseDataset
    from library.dreambooth_dataset import DreamBoothDataset
    from library.finetuning_dataset import FineTuningDataset
    from library.subset import DreamBoothSubset, FineTuningSubset
except ImportError:
    from library.train_util import (
        BaseDataset,
        DreamBoothDataset,
        DreamBoothSubset,
        FineTuningDataset,
        FineTuningSubset,
    )


def captions_of(rows: list[dict[str, Any]]) -> list[Any]:
    """Each caption several times from one random state, and the number that is drawn next."""
    found = []
    for row in rows:
        dataset = SimpleNamespace(
            current_epoch=row["epoch"], current_step=row["step"], max_train_steps=row["steps"], replacements={}
        )
        options = row["options"]
        # a share of the steps becomes a number of steps in the first caption that is not dropped
        first = SimpleNamespace(**options | {"caption_dropout_rate": 0, "caption_dropout_every_n_epochs": 0})
        BaseDataset.process_caption(dataset, first, "a")
        subset = SimpleNamespace(**options | {"token_warmup_step": first.token_warmup_step})
        random.seed(row["seed"])
        captions = [BaseDataset.process_caption(dataset, subset, row["caption"]) for _ in range(row["times"])]
        found.append([captions, random.random()])
    return found


def made(kind: Any, **given: Any) -> Any:
    """With None, False or 0 for all that is not given."""
    blank = {"bool": False, "int": 0, "float": 0.0}
    names = list(inspect.signature(kind.__init__).parameters.values())[1:]
    values = {one.name: blank.get(getattr(one.annotation, "__name__", ""))
              if one.default is one.empty else one.default for one in names}  # fmt: skip
    return kind(**values | {key: value for key, value in given.items() if key in values})


def pictures_of(row: dict[str, Any]) -> list[Any]:
    """Of a data set: key, path, caption and size of each picture, in its order."""
    kind, subset_kind = (
        (FineTuningDataset, FineTuningSubset) if "metadata_file" in row else (DreamBoothDataset, DreamBoothSubset)
    )
    subset = made(subset_kind, num_repeats=1, caption_dropout_rate=0.0, **row)
    given = {"batch_size": 1, "resolution": (64, 64), "network_multiplier": 1.0, "is_training_dataset": True}
    dataset = made(kind, subsets=[subset], validation_split=0.0, prior_loss_weight=1.0, **given)
    return [[key, info.absolute_path, info.caption, info.image_size] for key, info in dataset.image_data.items()]


def strategy(kind: str, length: int | None, cache: str) -> TokenizeStrategy:
    if kind == "sdxl":
        return strategy_sdxl.SdxlTokenizeStrategy(length, cache)
    return strategy_sd.SdTokenizeStrategy(kind == "sd2", length, cache)


@torch.no_grad()
def main(folder: Path) -> None:
    torch.manual_seed(0)
    asked = json.loads((folder / "rows.json").read_text(encoding="utf-8"))
    found = {"captions": captions_of(asked["rows"])}
    LatentsCachingStrategy.set_strategy(strategy_sd.SdSdxlLatentsCachingStrategy(True, False, 1, False))
    found["pictures"] = {name: pictures_of(row) for name, row in asked["pictures"].items()}
    (folder / "found.json").write_text(json.dumps(found), encoding="utf-8")

    models = {kind: encoders_of(folder / kind) for kind in ("sd15", "sd2", "sdxl")}
    tensors = {}
    for cache in asked["tokenizers"]:
        for kind in models:
            for length in asked["lengths"]:
                name = f"{cache} {kind} {length}"
                tokenizing = strategy(kind, length, str(folder / cache))
                for i, ids in enumerate(tokenizing.tokenize(asked["texts"])):
                    tensors[f"{name} plain {i}"] = ids
                ids, weights = tokenizing.tokenize_with_weights(asked["texts"])
                for i, (one, weight) in enumerate(zip(ids, weights, strict=True)):
                    tensors[f"{name} ids {i}"], tensors[f"{name} weights {i}"] = one, weight
                if cache != "tokenizers":
                    continue
                few = asked["encoded"]
                encoding = (strategy_sdxl.SdxlTextEncodingStrategy() if kind == "sdxl"
                            else strategy_sd.SdTextEncodingStrategy(asked["clip_skip"]))  # fmt: skip
                states = encoding.encode_tokens_with_weights(
                    tokenizing, models[kind], [one[:few] for one in ids], [one[:few] for one in weights]
                )
                tensors[f"{name} hidden"] = torch.cat(states[:2], -1)
                if kind == "sdxl":
                    tensors[f"{name} pooled"] = states[2]
    flux = strategy_flux.FluxTokenizeStrategy(asked["t5"], str(folder / "flux" / "tokenizers"))
    for i, ids in enumerate(flux.tokenize(asked["flux"])):
        tensors[f"flux {i}"] = ids
    save_file({key: value.clone().contiguous() for key, value in tensors.items()}, folder / "found.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
