"""Runs in sd-scripts' own Python: `python pictures_side.py FOLDER`, FOLDER having cases.json, buckets.json, sizes.npy.

Builds each case's data set by sd-scripts' own blueprints and writes what its batches are, and the bucket of each size.
"""

from __future__ import annotations

import json
import random
import sys
from multiprocessing import Value
from pathlib import Path

import numpy as np
import torch
import train_network
from accelerate.utils import set_seed
from library.utils import setup_logging

from library import config_util, custom_train_functions, model_util, strategy_base, train_util

try:  # v0.11.1
    from library.caching import load_images_and_masks_for_caching
except ImportError:
    from library.train_util import load_images_and_masks_for_caching


class Untokenized(strategy_base.TokenizeStrategy):
    def tokenize(self, text):
        return [torch.zeros(1, 77, dtype=torch.long)]


def group_of(case: dict):
    """Seeded and built as train_network.py does it."""
    # a simple log, because rich, which colours it otherwise, draws from the same random numbers with every line
    arguments = train_network.setup_parser().parse_args(["--debug_dataset", "--console_log_simple"])
    setup_logging(arguments, reset=True)
    set_seed(case["seed"])
    sanitizer = config_util.ConfigSanitizer(True, True, case.get("masked", False), True)
    blueprint = config_util.BlueprintGenerator(sanitizer).generate(case["config"], arguments)
    group, _ = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    group.set_current_strategies()
    return group


def to_bytes(images: torch.Tensor) -> np.ndarray:
    """(b, 3, h, w) in [-1, 1] as (b, h, w, 3) uint8, without a loss."""
    return ((images * 0.5 + 0.5) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def batch_of(example: dict) -> tuple[dict, dict]:
    facts = {"keys": example["image_keys"], "flippeds": [bool(flipped) for flipped in example["flippeds"]],
             "captions": example["captions"], "weights": example["loss_weights"].tolist()}  # fmt: skip
    sizes = ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
    facts["sizes"] = torch.cat([example[name] for name in sizes], 1).tolist()
    arrays = {"images": to_bytes(example["images"])}
    if example.get("alpha_masks") is not None:
        arrays["alpha"] = (example["alpha_masks"] * 255).round().to(torch.uint8).numpy()
    if "conditioning_images" in example or "alpha" in arrays:
        height, width = (side // 8 for side in example["images"].shape[2:])
        ones = torch.ones(len(example["images"]), 4, height, width)
        arrays["loss"] = custom_train_functions.apply_masked_loss(ones, example)[:, :1].numpy()
    return facts, arrays


def cached_of(info) -> tuple[dict, dict]:
    """What would be encoded once, for a picture's cached latents."""
    images, _, originals, crops = load_images_and_masks_for_caching([info], False, False)
    facts = {"keys": [info.image_key], "sizes": [[*originals[0][::-1], int(crops[0][1]), int(crops[0][0]),
                                                  *info.bucket_reso[::-1]]]}  # fmt: skip
    return facts, {"images": to_bytes(images)}


def epochs_of(group, epochs: int) -> tuple[list, dict]:
    """Every batch of each epoch, all its random numbers drawn from a seed of its own."""
    found, arrays = [], {}
    for epoch in range(1, epochs + 1):
        group.set_current_epoch(epoch)
        found.append([])
        for i in range(len(group)):
            random.seed(1000 * epoch + i)
            facts, more = batch_of(group[i])
            found[-1].append(facts)
            arrays |= {f"{epoch}/{i}/{name}": value for name, value in more.items()}
    return found, arrays


def loaded_of(group, epochs: int) -> list:
    """The batches of each epoch as they come out of a DataLoader without workers that does not shuffle them."""
    epoch, step = Value("i", 0), Value("i", 0)
    collator = train_util.collator_class(epoch, step, group)
    loader = torch.utils.data.DataLoader(group, batch_size=1, shuffle=False, collate_fn=collator, num_workers=0)
    found = []
    for number in range(1, epochs + 1):
        epoch.value = number
        found.append([{"keys": example["image_keys"]} for example in loader])
    return found


def buckets_of(options: dict, sizes: np.ndarray) -> np.ndarray:
    """(n, 4): bucket and resized size; 0 where sd-scripts fails."""
    resolution = tuple(options["resolution"])
    if options["enable_bucket"]:
        limits = train_util.BaseDataset.adjust_min_max_bucket_reso_by_steps(
            None, resolution, options["min_bucket_reso"], options["max_bucket_reso"], options["bucket_reso_steps"]
        )
        no_upscale = options["bucket_no_upscale"]
        manager = train_util.BucketManager(no_upscale, resolution, *limits, options["bucket_reso_steps"])
        if not no_upscale:
            manager.make_buckets()
    else:
        manager = train_util.BucketManager(False, resolution, None, None, None)
        manager.set_predefined_resos([resolution])
    found = np.zeros((len(sizes), 4), np.int64)
    for i, (width, height) in enumerate(sizes.tolist()):
        try:
            bucket, resized, _ = manager.select_bucket(width, height)
        except (ZeroDivisionError, AssertionError):
            continue
        found[i] = [*bucket, *resized]
    return found


def main(folder: Path) -> None:
    strategy_base.TokenizeStrategy.set_strategy(Untokenized())
    facts, version = {}, {"resolutions": model_util.make_bucket_resolutions((512, 512))}
    sizes = np.load(folder / "sizes.npy")
    for i, options in enumerate(json.loads((folder / "buckets.json").read_text())):
        np.save(folder / f"buckets_{i}.npy", buckets_of(options, sizes))
    for case in json.loads((folder / "cases.json").read_text()):
        group, arrays = group_of(case), {}
        if case.get("cached"):
            found = [[]]
            for i, info in enumerate(group.datasets[0].image_data.values()):
                described, more = cached_of(info)
                found[0].append(described)
                arrays |= {f"1/{i}/{name}": value for name, value in more.items()}
        elif case.get("loader"):
            found = loaded_of(group, case["epochs"])
        else:
            found, arrays = epochs_of(group, case["epochs"])
        facts[case["name"]] = {"epochs": found, "seed": group.datasets[0].seed}
        np.savez(folder / f"{case['name']}.npz", **arrays)
    (folder / "facts.json").write_text(json.dumps({"cases": facts, **version}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
