"""Captions as sd-scripts makes them (commit 48d368fa, train_util.py; v0.11.1, dataset.py): read, and then anew for each
step, with the same draws in the same order from a random source."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

from library.data.remarks import Remarks
from library.options.rooms import CaptionOptions
from networks.deft_config import DeftError, read_text

CONDITION_DROPOUT = 0.01  # where nothing is asked for, as OmniGen's own training (docs/fine-tuning.md)
_WILDCARD = re.compile(r"\{([^}]+)\}")


def beside(picture: Path, extension: str) -> list[Path]:
    """Where a picture's caption may be: under its name, or under that without the face's place and size, which
    sd-scripts' tools append as `_1_2_3_4`.

    :param extension: with its dot
    """
    parts = picture.stem.split("_")
    names = [picture.stem] if len(parts) < 5 else [picture.stem, "_".join(parts[:-4])]
    return [picture.with_name(name + extension) for name in names]


def read(file: Path, options: CaptionOptions, remarks: Remarks) -> str:
    """A caption's first line or, with wildcards, all of its lines, separated by \\n; blank ones are left out.

    :param remarks: learns of lines that are not used
    :raises DeftError: when the file cannot be read or is empty
    """
    lines = [line.strip() for line in read_text(file, f"{file}:").split("\n") if line.strip()]
    if not lines:
        raise DeftError(f"{file}: the caption is empty; write one, or delete the file to use the folder's name")
    if options.enable_wildcard:
        return "\n".join(lines)
    if len(lines) > 1:
        remarks.add("{n} caption{s} ({one}) of several lines: only the first is used; join them", file)
    return lines[0]


def process(caption: str, options: CaptionOptions, *, epoch: int, step: int, steps: int, random: Random) -> str:
    """A caption as it is for one step; "" where it is dropped.

    :param caption: of `read`, or of a metadata file; its lines end in \\n
    :param epoch: from 1
    :param step: optimizer steps made before
    :param steps: of the whole training
    :param random: all is drawn from it
    """
    if options.caption_prefix:
        caption = f"{options.caption_prefix} {caption}"
    if options.caption_suffix:
        caption = f"{caption} {options.caption_suffix}"
    dropped = options.caption_dropout_rate > 0 and random.random() < options.caption_dropout_rate
    if dropped or (options.caption_dropout_every_n_epochs > 0 and epoch % options.caption_dropout_every_n_epochs == 0):
        return ""
    caption = _without_wildcards(caption, random) if options.enable_wildcard else caption.split("\n")[0]
    warmup = _warmup_steps(options, steps)
    if options.shuffle_caption or warmup > 0 or options.caption_tag_dropout_rate > 0:
        first, tags, last = _parts(caption, options)
        if step < warmup:
            least = options.token_warmup_min
            tags = tags[: math.floor(step * ((len(tags) - least) / warmup)) + least]
        if options.shuffle_caption:
            random.shuffle(tags)
        if options.caption_tag_dropout_rate > 0:
            tags = [tag for tag in tags if random.random() >= options.caption_tag_dropout_rate]
        caption = ", ".join(first + tags + last)  # whatever the separator was
    if options.secondary_separator:
        caption = caption.replace(options.secondary_separator, options.caption_separator)
    return caption


def condition_dropout(options: CaptionOptions, takes_pictures: bool) -> float:
    """The share of captions that are left out together with their input pictures, by --condition_dropout_prob.

    :param takes_pictures: whether the model's family does; others leave captions out by --caption_dropout_rate alone
    """
    if options.condition_dropout_prob is not None:
        asked = options.condition_dropout_prob
    else:  # kohya's options ask for it, too
        asked = 0.0 if options.caption_dropout_rate or options.caption_dropout_every_n_epochs else CONDITION_DROPOUT
    return asked if takes_pictures else 0.0


def whole(caption: str, options: CaptionOptions) -> str:
    """A caption with nothing dropped or shuffled; of several lines or wildcards, one choice."""
    kept = replace(
        options, shuffle_caption=False, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0, token_warmup_step=0,
    )  # fmt: skip
    return process(caption, kept, epoch=1, step=0, steps=1, random=Random(0))


def problems(options: CaptionOptions, captions: Sequence[str], weighted: bool = False) -> list[str]:
    """What a user should know of options that do not fit the captions, a line each.

    :param captions: of one subset, as `read` gives them
    :param weighted: whether --weighted_captions is given
    :raises DeftError: for an empty separator where captions have to be split at it
    """
    if not options.caption_separator and _is_split(options):
        raise DeftError("caption_separator is empty, but captions are split at it; leave the option out for a comma")
    captions = [caption for caption in captions if caption]
    if not captions:
        return []
    return [*_of_lines(options, captions), *_of_wildcards(options, captions), *_of_tags(options, captions, weighted)]


def _of_lines(options: CaptionOptions, captions: Sequence[str]) -> Iterator[str]:
    several = [caption for caption in captions if "\n" in caption]
    if several and not options.enable_wildcard:
        yield f"{_told(several)} of several lines: only the first is used; join them, or give enable_wildcard"
    elif several and options.caption_prefix:
        yield "caption_prefix: stands before the first line alone of a caption that has several, as in sd-scripts"
    if several and options.enable_wildcard and options.caption_suffix:
        yield "caption_suffix: stands behind the last line alone of a caption that has several, as in sd-scripts"


def _of_wildcards(options: CaptionOptions, captions: Sequence[str]) -> Iterator[str]:
    if options.enable_wildcard:
        odd = [caption for caption in captions if any(map(_is_unbalanced, caption.split("\n")))]
        if odd:
            yield f"{_told(odd)} with a brace that no other closes, which stays; a wildcard is {{a|b}}, a brace {{{{"
    elif unused := [caption for caption in captions if re.search(r"\{[^}]*\|[^}]*\}", caption)]:
        yield f"{_told(unused)} with something like {{a|b}}, which is trained as it stands without enable_wildcard"


def _is_unbalanced(line: str) -> bool:
    return bool(re.search(r"[{}]", re.sub(r"\{[^{}]*\}", "", line.replace("{{", "").replace("}}", ""))))


def _of_tags(options: CaptionOptions, captions: Sequence[str], weighted: bool) -> Iterator[str]:
    separator, keep, second = options.caption_separator, options.keep_tokens_separator, options.secondary_separator
    lines = [line for caption in captions for line in caption.split("\n")]
    for name, mark in (("keep_tokens_separator", keep), ("secondary_separator", second)):
        if mark and not any(mark in line for line in lines):
            yield f"{name}={mark}: no caption has it"
    if second and second == separator:
        yield f"secondary_separator={second}: is caption_separator too, and has no effect"
    if not _is_split(options):
        if keep and any(keep in line for line in lines):
            yield f"keep_tokens_separator={keep}: stays in the captions, since nothing shuffles or drops their tags"
        if options.keep_tokens > 0:
            yield f"keep_tokens={options.keep_tokens}: has no effect, since nothing shuffles or drops tags"
        return
    if not any(separator in line for line in lines):
        yield f"caption_separator={separator}: no caption has it, so that there are no tags to shuffle or drop"
    elif options.keep_tokens > 0 and all(
        len(line.split(separator)) <= options.keep_tokens for line in lines if not (keep and keep in line)
    ):
        yield f"keep_tokens={options.keep_tokens}: no caption has more tags, so that all of them stay where they are"
    if weighted and (torn := [line for line in lines if re.search(rf"\([^()]*{re.escape(separator)}[^()]*\)", line)]):
        yield f"{_told(torn)} with '{separator}' within ( ), whose weights change when tags are shuffled or dropped"


def _told(captions: Sequence[str]) -> str:
    """How many, and the beginning of one."""
    one = captions[0].replace("\n", " / ")
    return f"{len(captions)} caption{'s' * (len(captions) > 1)} ('{one if len(one) <= 60 else one[:60] + '...'}')"


def _is_split(options: CaptionOptions) -> bool:
    return options.shuffle_caption or options.token_warmup_step > 0 or options.caption_tag_dropout_rate > 0


def _warmup_steps(options: CaptionOptions, steps: int) -> float:
    asked = options.token_warmup_step
    return math.floor(asked * steps) if asked < 1 else asked


def _without_wildcards(caption: str, random: Random) -> str:
    """One of the lines, with one of each `{a|b}`; `{{` and `}}` are braces."""
    if "\n" in caption:
        caption = random.choice(caption.split("\n"))
    unused = (c for c in map(chr, range(0xE000, 0xF900)) if c not in caption)  # of Unicode's private characters
    opening, closing = next(unused), next(unused)
    caption = caption.replace("{{", opening).replace("}}", closing)
    caption = _WILDCARD.sub(lambda found: random.choice(found[1].split("|")), caption)
    return caption.replace(opening, "{").replace(closing, "}")


def _parts(caption: str, options: CaptionOptions) -> tuple[list[str], list[str], list[str]]:
    """Tags that stay first, those that are shuffled and dropped, and those that stay last."""
    separator, keep = options.caption_separator, options.keep_tokens_separator
    if keep and keep in caption:
        first, tags, *last = ([t for tag in part.split(separator) if (t := tag.strip())]
                              for part in caption.split(keep, 2))  # fmt: skip
        return first, tags, last[0] if last else []
    tags = [tag.strip() for tag in caption.strip().split(separator)]
    kept = max(options.keep_tokens, 0)
    return tags[:kept], tags[kept:], []
