"""Which options of data sets do not go together, which do nothing, and what sd-scripts makes of odd ones."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from library.options.rooms import BucketOptions, DatasetOptions, SubsetOptions
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)

BUCKET_STEPS = 32  # the least that any model of sd-scripts takes
_EACH_TIME = ("color_aug", "random_crop")  # give another picture each time
_IGNORED_WITH_FILE = ("train_data_dir", "reg_data_dir", "in_json", "train_jsonl", "image_path", "conditioning_data_dir")
# change tags, or the picture that is wanted and not those that it is made of
_OF_TAGS = ("shuffle_caption", "enable_wildcard", "caption_tag_dropout_rate", "token_warmup_step",
            "secondary_separator")  # fmt: skip
_DROPPED = ("caption_dropout_rate", "caption_dropout_every_n_epochs")
_OF_ONE_PICTURE = ("flip_aug", "color_aug", "random_crop", "face_crop_aug_range")


@dataclass
class _Findings:
    """What was found, each once, however many subsets have it."""

    dash: str  # before options: `--` where all come from the command line
    problems: dict[str, None] = field(default_factory=dict)
    remarks: dict[str, None] = field(default_factory=dict)

    def refuse(self, place: str, line: str) -> None:
        self.problems[f"{place}: {line}" if place else line] = None

    def tell(self, place: str, line: str) -> None:
        self.remarks[f"{place}: {line}" if place else line] = None

    def no_effect(self, place: str, names: Sequence[str], why: str) -> None:
        if names:
            self.tell(place, f"{self.named(names)} {'has' if len(names) == 1 else 'have'} no effect {why}")

    def named(self, names: Sequence[str]) -> str:
        return ", ".join(f"{self.dash}{name}" for name in names)


def settled(datasets: Sequence[DatasetOptions], values: Mapping[str, Any]) -> tuple[DatasetOptions, ...]:
    """The data sets as they are trained on, after sd-scripts' rules; what does nothing is told.

    :param values: the command line's, by the options' names
    :raises DeftError: for all that does not go together
    """
    file = values["dataset_config"]
    findings = _Findings("" if file else "--")
    found = []
    for number, dataset in enumerate(datasets, 1):
        place = f"[[datasets]] {number}" if file else ""
        buckets = _buckets(dataset.buckets, place, findings)
        subsets = _subsets(dataset, values, place, findings)
        if file and all(subset.is_reg for subset in subsets):
            findings.refuse(place, "nothing is left to train on: is_reg and num_repeats of 0 leave all of it out")
        found.append(replace(dataset, subsets=subsets, buckets=buckets))
    for line in _of_the_whole(found, values):
        findings.tell("", line)
    if findings.problems:
        raise DeftError((f"--dataset_config {file}: " if file else "") + "; ".join(findings.problems))
    for line in findings.remarks:
        logger.warning(line)
    return tuple(found)


def _buckets(buckets: BucketOptions, place: str, findings: _Findings) -> BucketOptions:
    """With the least and the largest side as multiples of the steps, as sd-scripts rounds them."""
    sides = ("min_bucket_reso", "max_bucket_reso")
    if not buckets.enable_bucket:
        names = [*sides, "bucket_reso_steps", "bucket_no_upscale"]
        findings.no_effect(place, _changed(buckets, *names), f"without {findings.dash}enable_bucket")
        return buckets
    if buckets.bucket_no_upscale:
        findings.no_effect(place, _changed(buckets, *sides), f"with {findings.dash}bucket_no_upscale")
    steps, (width, height) = buckets.bucket_reso_steps, buckets.resolution
    if steps % BUCKET_STEPS:
        findings.refuse(place, f"{findings.dash}bucket_reso_steps={steps}: must be a multiple of {BUCKET_STEPS}")
        return buckets
    least = buckets.min_bucket_reso // steps * steps
    most = -(-buckets.max_bucket_reso // steps) * steps
    for name, rounded in zip(sides, (least, most), strict=True):
        given = getattr(buckets, name)
        if given != rounded:
            line = f"{findings.dash}{name}={given}: {rounded} is taken, a multiple of {findings.dash}bucket_reso_steps"
            findings.tell(place, line)
    if not least and not buckets.bucket_no_upscale:
        line = f"{findings.dash}min_bucket_reso={buckets.min_bucket_reso}: must not be below "
        findings.refuse(place, f"{line}{findings.dash}bucket_reso_steps={steps}")
    if min(width, height) < least:
        line = f"{findings.dash}min_bucket_reso={least}: must not be above {findings.dash}resolution={width},{height}"
        findings.refuse(place, line)
    if max(width, height) > most:
        line = f"{findings.dash}max_bucket_reso={most}: must not be below {findings.dash}resolution={width},{height}"
        findings.refuse(place, line)
    return replace(buckets, min_bucket_reso=least, max_bucket_reso=most)


def _subsets(
    dataset: DatasetOptions, values: Mapping[str, Any], place: str, findings: _Findings
) -> tuple[SubsetOptions, ...]:
    found: dict[Any, SubsetOptions] = {}
    for i, subset in enumerate(dataset.subsets, 1):
        where = f"{place}, subset {i}" if place else ""
        what = subset.metadata_file or subset.train_jsonl or subset.image_dir
        alike = (subset.metadata_file, subset.train_jsonl, None if subset.metadata_file else subset.image_dir)
        if subset.num_repeats < 1:
            findings.tell(where, f"{what} is left out: num_repeats is {subset.num_repeats}")
        elif alike in found:
            findings.tell(where, f"{what} is left out: the data set has it already")
        else:
            found[alike] = _subset(subset, dataset.buckets.enable_bucket, values, where, findings)
    return tuple(found.values())


def _subset(
    subset: SubsetOptions, enable_bucket: bool, values: Mapping[str, Any], place: str, findings: _Findings
) -> SubsetOptions:
    captions, augment = subset.captions, subset.augment
    if subset.train_jsonl is not None:
        _instructions(subset, place, findings)
    if captions.condition_dropout_prob and (dropped := _changed(captions, *_DROPPED)):
        asked = f"{findings.named(['condition_dropout_prob', *dropped])} do not go together"
        findings.refuse(place, f"{asked}: each leaves out captions with their input pictures; give one of them")
    cached = [name for name in ("cache_latents", "cache_latents_to_disk") if values[name]]
    random = _changed(augment, *_EACH_TIME)
    if cached and random:
        asked = f"{findings.named(random)} and --{cached[0]} do not go together"
        findings.refuse(place, f"{asked}: what is another picture each time cannot be cached; leave one of them out")
    if values["cache_text_encoder_outputs"] and captions.changing:
        asked = f"{findings.named(captions.changing)} and --cache_text_encoder_outputs do not go together"
        findings.refuse(place, f"{asked}: what is another caption each time cannot be cached; leave one of them out")
    if augment.face_crop_aug_range and (cached or enable_bucket):
        why = f"with {f'--{cached[0]}' if cached else f'{findings.dash}enable_bucket'}"
        findings.no_effect(place, ["face_crop_aug_range"], why)
        augment = replace(augment, face_crop_aug_range=None)
    if not (captions.shuffle_caption or captions.token_warmup_step or captions.caption_tag_dropout_rate):
        kept = _changed(captions, "keep_tokens", "keep_tokens_separator")
        findings.no_effect(place, kept, f"without {findings.dash}shuffle_caption, or tags that are left out")
    if not captions.token_warmup_step:
        findings.no_effect(place, _changed(captions, "token_warmup_min"), f"without {findings.dash}token_warmup_step")
    extension = "." + subset.caption_extension.lstrip(".")
    subset = replace(subset, augment=augment, caption_extension=extension)
    return _masked(subset, values, place, findings)


def _instructions(subset: SubsetOptions, place: str, findings: _Findings) -> None:
    """What is not done with --train_jsonl."""
    if names := _changed(subset.captions, *_OF_TAGS):
        asked = f"{findings.named(names)} and {findings.dash}train_jsonl do not go together"
        findings.refuse(place, f"{asked}: instructions are sentences, not tags")
    if names := _changed(subset.augment, *_OF_ONE_PICTURE):
        asked = f"{findings.named(names)} and {findings.dash}train_jsonl do not go together"
        findings.refuse(place, f"{asked}: the input pictures would stay as they are")


def _masked(subset: SubsetOptions, values: Mapping[str, Any], place: str, findings: _Findings) -> SubsetOptions:
    """With the one mask that is used, as in sd-scripts: the picture's own transparency, unless there is a folder."""
    if not values["masked_loss"] or subset.conditioning_data_dir is None:
        return replace(subset, conditioning_data_dir=None)
    if subset.alpha_mask:
        findings.no_effect(place, ["alpha_mask"], f"with {findings.dash}conditioning_data_dir")
    return replace(subset, alpha_mask=False)


def _of_the_whole(datasets: Sequence[DatasetOptions], values: Mapping[str, Any]) -> Iterator[str]:
    """What of the command line does nothing."""
    subsets = [subset for dataset in datasets for subset in dataset.subsets]
    ignored = [f"--{name}" for name in _IGNORED_WITH_FILE if values[name]]
    if values["dataset_config"]:
        if ignored:
            yield f"{', '.join(ignored)}: no effect with --dataset_config, which names the folders"
    elif values["in_json"]:
        ignored = [f"--{name}" for name in ("reg_data_dir", "conditioning_data_dir") if values[name]]
        if ignored:
            yield f"{', '.join(ignored)}: no effect with --in_json"
    elif values["image_path"] and not values["train_jsonl"]:
        yield "--image_path: no effect without --train_jsonl"
    elif values["conditioning_data_dir"] and not values["masked_loss"]:
        yield "--conditioning_data_dir: no effect without --masked_loss"
    elif values["dataset_repeats"] != 1 and not values["train_jsonl"]:
        yield "--dataset_repeats: no effect on folders, whose names say how often"
    if not subsets:
        return
    if values["prior_loss_weight"] != 1 and not any(subset.is_reg for subset in subsets):
        yield "--prior_loss_weight: no effect without regularisation pictures, --reg_data_dir"
    if values["masked_loss"] and not any(subset.alpha_mask or subset.conditioning_data_dir for subset in subsets):
        yield "--masked_loss: no effect without masks, --alpha_mask or --conditioning_data_dir"


def _changed(room: Any, *names: str) -> list[str]:
    """Those of a room's fields that are not as they are by default."""
    return [one.name for one in fields(room) if one.name in names and getattr(room, one.name) != one.default]
