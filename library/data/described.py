"""What a file's metadata says of its pictures, in sd-scripts' fields (train_network.py, commit 48d368fa)."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from library.data.plan import Dataset, Picture, Plan, by_subset, pictures
from library.options.rooms import SubsetOptions


def fields(plan: Plan, from_folders: bool) -> dict[str, str]:
    """:param from_folders: whether the data set is that of --train_data_dir or --in_json; else of --dataset_config"""
    trained = [picture for picture in pictures(plan) if not picture.subset.is_reg]
    found = {
        "ss_num_train_images": sum(picture.repeats for picture in trained),
        "ss_num_reg_images": sum(p.repeats for p in pictures(plan) if p.subset.is_reg),
        "ss_dataset_dirs": _counts(trained),
        "ss_tag_frequency": _tag_frequency(trained),
    }
    if not from_folders:
        return _as_text(found | {"ss_datasets": [_dataset(dataset) for dataset in plan]})
    (dataset,) = plan
    width, height = dataset.options.buckets.resolution
    return _as_text(
        found
        | {
            "ss_resolution": f"({width}, {height})",
            "ss_reg_dataset_dirs": _counts([picture for picture in dataset.pictures if picture.subset.is_reg]),
            "ss_bucket_info": _buckets(dataset),
        }
    )


def _as_text(values: dict[str, Any]) -> dict[str, str]:
    return {name: value if isinstance(value, str) else json.dumps(value) for name, value in values.items()}


def _counts(found: Sequence[Picture]) -> dict[str, dict[str, int]]:
    """Folder -> {"n_repeats", "img_count"}; a folder's second data set is "folder (2)"."""
    counts: dict[str, dict[str, int]] = {}
    for subset, group in by_subset(found):
        name, number = subset.name, 1
        while (key := name if number == 1 else f"{name} ({number})") in counts:
            number += 1
        counts[key] = {"n_repeats": subset.num_repeats, "img_count": len(group)}
    return counts


def _tag_frequency(found: Sequence[Picture]) -> dict[str, dict[str, int]]:
    """Folder -> tag -> number of captions with it, tags being separated by commas; a folder's first data set counts."""
    frequency: dict[str, dict[str, int]] = {}
    for subset, group in by_subset(found):
        tags = (tag.strip().lower() for picture in group for tag in picture.caption.split(","))
        frequency.setdefault(subset.name, dict(Counter(tag for tag in tags if tag)))
    return frequency


def _buckets(dataset: Dataset) -> dict[str, Any] | None:
    if not dataset.options.buckets.enable_bucket:
        return None
    errors = [abs(p.fit.bucket[0] / p.fit.bucket[1] - p.size[0] / p.size[1]) for p in dataset.pictures]
    counts = enumerate(dataset.buckets().items())
    return {
        "buckets": {str(i): {"resolution": list(size), "count": count} for i, (size, count) in counts},
        "mean_img_ar_error": sum(errors) / len(errors),
    }


def _dataset(dataset: Dataset) -> dict[str, Any]:
    options, found = dataset.options, dataset.pictures
    return {
        "is_dreambooth": all(subset.metadata_file is None and subset.train_jsonl is None for subset in options.subsets),
        "batch_size_per_device": options.batch_size,
        "num_train_images": sum(picture.repeats for picture in found if not picture.subset.is_reg),
        "num_reg_images": sum(picture.repeats for picture in found if picture.subset.is_reg),
        "resolution": list(options.buckets.resolution),
        "enable_bucket": options.buckets.enable_bucket,
        "min_bucket_reso": options.buckets.min_bucket_reso,
        "max_bucket_reso": options.buckets.max_bucket_reso,
        "tag_frequency": _tag_frequency(found),
        "bucket_info": _buckets(dataset),
        "subsets": [_subset(subset, group) for subset, group in by_subset(found)],
    }


def _subset(subset: SubsetOptions, group: Sequence[Picture]) -> dict[str, Any]:
    augment, captions = subset.augment, subset.captions
    found = {
        "img_count": len(group),
        "num_repeats": subset.num_repeats,
        "color_aug": augment.color_aug,
        "flip_aug": augment.flip_aug,
        "random_crop": augment.random_crop,
        "shuffle_caption": captions.shuffle_caption,
        "keep_tokens": captions.keep_tokens,
        "keep_tokens_separator": captions.keep_tokens_separator,
        "secondary_separator": captions.secondary_separator,
        "enable_wildcard": captions.enable_wildcard,
        "caption_prefix": captions.caption_prefix,
        "caption_suffix": captions.caption_suffix,
        "resize_interpolation": subset.resize_interpolation,
    }
    if subset.image_dir:
        found["image_dir"] = Path(subset.image_dir).name
    if subset.train_jsonl:  # which sd-scripts does not have
        inputs = sum(len(picture.inputs) for picture in group)
        return found | {"train_jsonl": Path(subset.train_jsonl).name, "input_img_count": inputs}
    if subset.metadata_file:
        return found | {"metadata_file": Path(subset.metadata_file).name}
    return found | {"class_tokens": subset.class_tokens, "is_reg": subset.is_reg}
