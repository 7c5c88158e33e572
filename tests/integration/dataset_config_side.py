"""Runs in sd-scripts' Python, beside test_dataset_config.py: what its parser and data sets make of command lines.

    dataset_config_side.py REQUEST.json RESULT.json

Does what the trainers' train() does up to its data sets, the checks of their options included.
"""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import sys
from pathlib import Path
from typing import Any

DATASET = ("batch_size", "width", "height", "network_multiplier", "enable_bucket", "min_bucket_reso", "max_bucket_reso",
           "bucket_reso_steps", "bucket_no_upscale", "resize_interpolation", "validation_split", "validation_seed",
           "prior_loss_weight", "skip_image_resolution")  # fmt: skip
SUBSET = ("image_dir", "metadata_file", "num_repeats", "class_tokens", "is_reg", "caption_extension",
          "conditioning_data_dir", "alpha_mask", "custom_attributes", "resize_interpolation", "caption_separator",
          "shuffle_caption", "keep_tokens", "keep_tokens_separator", "secondary_separator", "enable_wildcard",
          "caption_prefix", "caption_suffix", "caption_dropout_rate", "caption_dropout_every_n_epochs",
          "caption_tag_dropout_rate", "token_warmup_min", "token_warmup_step", "flip_aug", "color_aug", "random_crop",
          "face_crop_aug_range")  # fmt: skip


def module(*names: str) -> Any:
    """The first of these that this version has."""
    for name in names:
        with contextlib.suppress(ImportError):
            return importlib.import_module(f"library.{name}")
    raise ImportError(names)


def subsets_of(dataset: Any, planned: Any) -> list[Any]:
    """A data set with masks, which has another within it, hands its subsets on without where the masks are."""
    return [subset.params for subset in planned.subsets] if planned.is_controlnet else dataset.subsets


def described(script: str, argv: list[str]) -> dict[str, Any]:
    trainer_module = importlib.import_module(script)
    parser = trainer_module.setup_parser()
    sys.argv = [f"{script}.py", *argv]
    reading, preparing = module("args", "train_util"), module("accelerator_setup", "train_util")
    args = reading.read_config_from_file(parser.parse_args(argv), parser)
    given = {key: value for key, value in vars(args).items() if isinstance(value, (int, float, str, list, type(None)))}
    trainer = {
        "train_network": "NetworkTrainer",
        "sdxl_train_network": "SdxlNetworkTrainer",
        "flux_train_network": "FluxNetworkTrainer",
    }
    made = getattr(trainer_module, trainer[script])()
    reading.verify_training_args(args)
    preparing.prepare_dataset_args(args, True)
    base, config_util = module("strategy_base"), module("config_util")
    base.LatentsCachingStrategy._strategy = made.get_latents_caching_strategy(args)
    generator = config_util.BlueprintGenerator(config_util.ConfigSanitizer(True, True, args.masked_loss, True))
    if args.dataset_config is not None:
        user_config = config_util.load_user_config(args.dataset_config)
    elif args.in_json is not None:
        user_config = {"datasets": [{"subsets": [{"image_dir": args.train_data_dir, "metadata_file": args.in_json}]}]}
    else:
        subsets = config_util.generate_dreambooth_subsets_config_by_subdirs(args.train_data_dir, args.reg_data_dir)
        user_config = {"datasets": [{"subsets": subsets}]}
    blueprint = generator.generate(user_config, args)
    group, validation = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    assert len(group) > 0, "No data found"
    if args.cache_latents:
        assert group.is_latent_cacheable(), "not cacheable"
    if script == "flux_train_network":
        made.model_type = "flux"
    made.assert_extra_args(args, group, validation)
    datasets = [
        {name: getattr(getattr(one, "dreambooth_dataset_delegate", one), name, None) for name in DATASET}
        | {"subsets": [{name: getattr(subset, name, None) for name in SUBSET} for subset in subsets_of(one, planned)]}
        for one, planned in zip(group.datasets, blueprint.dataset_group.datasets, strict=True)
    ]
    return {"args": given, "datasets": datasets}


def main(request: str, result: str) -> None:
    results = []
    for case in json.loads(Path(request).read_text()):
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                results.append(described(case["script"], case["arguments"]))
        except ImportError:
            raise
        except (Exception, SystemExit) as error:
            results.append({"error": f"{type(error).__name__}: {error}"})
    Path(result).write_text(json.dumps(results, default=str))


if __name__ == "__main__":
    main(*sys.argv[1:])
