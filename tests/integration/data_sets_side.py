"""Runs in sd-scripts' own Python: `python data_sets_side.py FOLDER CASES.json`, FOLDER having tokenizers/.

Each case's command line goes through sd-scripts' own parser, sanitizer and blueprints into its data sets, and those are
asked for every batch of some epochs, with its own tokenizers. NAME.json and NAME.npz are what they gave.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from dataset_config_side import module
from library.utils import setup_logging

from library import custom_train_functions, strategy_flux

TRAINERS = {"train_network": "NetworkTrainer", "sdxl_train_network": "SdxlNetworkTrainer",
            "flux_train_network": "FluxNetworkTrainer"}  # fmt: skip
PIXELS = 8  # of a latent's side


class Pixels(torch.nn.Module):
    """A VAE whose latents are the pixels themselves, 8 x 8 of them in the channels of one latent."""

    device, dtype = torch.device("cpu"), torch.float32

    def encode(self, images: torch.Tensor) -> Any:
        latents = torch.nn.functional.pixel_unshuffle(images, PIXELS)
        return SimpleNamespace(latent_dist=SimpleNamespace(sample=lambda: latents))


class Randoms:
    """Python's random numbers begun anew for each picture and purpose, from the text that ours begin with."""

    def __init__(self, seed: int):
        self.seed, self.epoch, self.place = seed, 0, -1
        self.places: Iterator[int] = iter(())

    def begin(self, purpose: str) -> None:
        random.seed(f"{purpose} {self.seed} {self.epoch} {self.place}")

    def watch(self, dataset: Any) -> None:
        """Has the data set begin anew where it draws for a picture."""
        randoms = self

        class Subsets(dict):
            """What a picture's turn begins with being looked up in."""

            def __getitem__(self, key: str) -> Any:
                randoms.place = next(randoms.places, -1)
                randoms.begin("mirror")
                return super().__getitem__(key)

        dataset.image_to_subset = Subsets(dataset.image_to_subset)
        self._before(dataset, "load_image_with_face_info", "crop")
        self._before(dataset.aug_helper, "color_aug", "colour")
        self._before(dataset, "process_caption", "caption")

    def _before(self, owner: Any, name: str, purpose: str) -> None:
        original = getattr(owner, name)

        def begun(*given: Any, **named: Any) -> Any:
            self.begin(purpose)
            return original(*given, **named)

        setattr(owner, name, begun)


def inner(dataset: Any) -> Any:
    """The data set with the pictures, which one with masks has within it."""
    return getattr(dataset, "dreambooth_dataset_delegate", dataset)


def group_of(script: str, argv: list[str]) -> tuple[Any, Any]:
    """As the trainer's train() makes it; its options."""
    trainer_module = importlib.import_module(script)
    parser = trainer_module.setup_parser()
    # a simple log, because rich, which colours it otherwise, draws from the same random numbers with every line
    argv = [*argv, "--debug_dataset", "--console_log_simple"]
    sys.argv = [f"{script}.py", *argv]
    reading, preparing = module("args", "train_util"), module("accelerator_setup", "train_util")
    args = reading.read_config_from_file(parser.parse_args(argv), parser)
    trainer = getattr(trainer_module, TRAINERS[script])()
    reading.verify_training_args(args)
    preparing.prepare_dataset_args(args, True)
    setup_logging(args, reset=True)
    set_seed(args.seed)
    base, config_util = module("strategy_base"), module("config_util")
    if script == "flux_train_network":  # whose trainer looks into the model's file for the length
        tokenizing = strategy_flux.FluxTokenizeStrategy(args.t5xxl_max_token_length, args.tokenizer_cache_dir)
    else:
        tokenizing = trainer.get_tokenize_strategy(args)
    base.TokenizeStrategy._strategy = tokenizing
    base.LatentsCachingStrategy._strategy = trainer.get_latents_caching_strategy(args)
    sanitizer = config_util.ConfigSanitizer(True, True, args.masked_loss, True)
    if args.dataset_config is not None:
        config = config_util.load_user_config(args.dataset_config)
    elif args.in_json is not None:
        config = {"datasets": [{"subsets": [{"image_dir": args.train_data_dir, "metadata_file": args.in_json}]}]}
    else:
        subsets = config_util.generate_dreambooth_subsets_config_by_subdirs(args.train_data_dir, args.reg_data_dir)
        subsets.sort(key=lambda subset: (subset["is_reg"], subset["image_dir"]))  # they come as the system lists them
        config = {"datasets": [{"subsets": subsets}]}
    blueprint = config_util.BlueprintGenerator(sanitizer).generate(config, args)
    group, _ = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    group.set_current_strategies()
    for dataset in group.datasets:
        inner(dataset).set_max_train_steps(args.max_train_steps)
    if args.cache_latents:
        group.new_cache_latents(Pixels(), Accelerator(cpu=True))
    return group, args


def digest(tensor: torch.Tensor) -> str:
    return hashlib.blake2b(tensor.float().contiguous().numpy().tobytes(), digest_size=16).hexdigest()


def batch_of(dataset: Any, example: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    pictures = inner(dataset).image_data
    images = example["images"]
    if images is None:
        images = torch.nn.functional.pixel_shuffle(example["latents"], PIXELS)
    sizes = ("original_sizes_hw", "crop_top_lefts", "target_sizes_hw")
    facts = {
        "paths": [pictures[key].absolute_path for key in example["image_keys"]],
        "flipped": [bool(flipped) for flipped in example["flippeds"]],
        "pixels": [digest(image) for image in images],
        "shape": list(images.shape[-2:]),
        "sizes": torch.cat([example[name] for name in sizes], 1).tolist(),
        "captions": example["captions"],
        "weights": example["loss_weights"].tolist(),
        "preserved": [bool((given or {}).get("diff_output_preservation")) for given in example["custom_attributes"]],
        "multipliers": example["network_multipliers"].tolist(),
    }
    arrays = {f"ids {i}": ids.numpy() for i, ids in enumerate(example["input_ids_list"])}
    if "conditioning_images" in example or example["alpha_masks"] is not None:
        height, width = (side // PIXELS for side in images.shape[2:])
        ones = torch.ones(len(images), 4, height, width)
        arrays["mask"] = custom_train_functions.apply_masked_loss(ones, example)[:, :1].numpy()
    return facts, arrays


def described(dataset: Any) -> list[Any]:
    """Each picture: path, repeats, caption, size, bucket, what it is scaled to, whether it is a regularisation one."""
    return [
        [info.absolute_path, info.num_repeats, info.caption, *map(list, (info.image_size, info.bucket_reso,
         info.resized_size)), info.is_reg] for info in inner(dataset).image_data.values()
    ]  # fmt: skip


def result_of(case: dict[str, Any]) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """:param case: with the places and steps of our pictures' turns, by epoch, data set and batch"""
    group, args = group_of(case["script"], case["arguments"])
    facts = {"seeds": [one.seed for one in group.datasets], "pictures": list(map(described, group.datasets))}
    facts["epochs"] = []
    arrays, randoms = {}, Randoms(args.seed)
    for dataset in group.datasets:
        randoms.watch(inner(dataset))
    for epoch, places in enumerate(case["turns"], start=1):
        group.set_current_epoch(epoch)
        randoms.epoch = epoch
        facts["epochs"].append([[] for _ in group.datasets])
        for number, (dataset, of_dataset) in enumerate(zip(group.datasets, places, strict=True)):
            for i in range(len(dataset)):
                turns, step = of_dataset[i] if i < len(of_dataset) else ([], 0)
                randoms.places = iter(turns)
                inner(dataset).set_current_step(step)
                found, more = batch_of(dataset, dataset[i])
                facts["epochs"][-1][number].append(found)
                arrays |= {f"{epoch}/{number}/{i}/{name}": value for name, value in more.items()}
    return facts, arrays


def main(folder: Path, request: Path) -> None:
    for case in json.loads(request.read_text(encoding="utf-8")):
        facts, arrays = result_of(case)
        (folder / f"{case['name']}.json").write_text(json.dumps(facts), encoding="utf-8")
        np.savez(folder / f"{case['name']}.npz", **arrays)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
