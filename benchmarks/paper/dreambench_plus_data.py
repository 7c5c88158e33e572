"""DreamBench++'s data as it is published; read from yuangpeng/dreambench_plus, dreambench_plus_dataset.py."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from benchmarks.paper.plan import Asked, Row, Source, Subject
from networks.deft_config import DeftError, read_text

DATA = Source(
    "DreamBench++'s data: images/ and captions/",
    "https://huggingface.co/datasets/yuangpeng/dreambench_plus (data.zip)",
    'code Apache-2.0; pictures from several places, "verified for academic suitability"',
)
GROUPS = {"animal": "live_subject_animal", "human": "live_subject_human", "object": "object", "style": "style"}
PHOTOREALISTIC, STYLE_TRANSFER, IMAGINATIVE = "photorealistic", "style transfer", "imaginative"
CATEGORIES = (*[PHOTOREALISTIC] * 4, *[STYLE_TRANSFER] * 3, *[IMAGINATIVE] * 2)  # by a prompt's index


def subjects(folder: Path, tuning: bool = True) -> list[Subject]:
    """The data's subjects in the order of their collection ids.

    :param folder: with `images/**/NN.jpg` and `captions/**/NN.txt`, or with `data/` that holds them
    :param tuning: whether the first of each group serves to choose rates, and does not count
    :raises DeftError: for a folder or file that is missing, or is not as DreamBench++ has it
    """
    root = folder / "data" if (folder / "data" / "images").is_dir() else folder
    pictures, captions = _files(root / "images", ".jpg"), _files(root / "captions", ".txt")
    if not pictures:
        raise DeftError(f"--data {folder}: there is no images/ with pictures; {DATA.what} are to be had at "
                        f"{DATA.published}")  # fmt: skip
    for one, other, wanted in ((pictures, captions, "captions/{}.txt"), (captions, pictures, "images/{}.jpg")):
        if lacking := sorted(one.keys() - other.keys()):
            more = f", and {len(lacking) - 1} more" if len(lacking) > 1 else ""
            raise DeftError(f"--data {folder}: {wanted.format(lacking[0])} is missing{more}")
    found: dict[str, Subject] = {}
    for stem in sorted(pictures):
        subject = _subject(pictures[stem], captions[stem])
        if subject.name in found:
            raise DeftError(f"{captions[stem]}: {subject.name} is there twice")
        found[subject.name] = subject
    ordered = [found[name] for name in sorted(found)]
    first = {subject.group: subject.name for subject in reversed(ordered)} if tuning else {}
    return [replace(subject, tuning=first.get(subject.group) == subject.name) for subject in ordered]


def _files(folder: Path, ending: str) -> dict[str, Path]:
    """By the part of their path that pictures and captions share."""
    return {
        path.relative_to(folder).with_suffix("").as_posix(): path
        for path in folder.rglob(f"*{ending}")
        if not any(part.startswith((".", "__MACOSX")) for part in path.relative_to(folder).parts)
    }


def _subject(picture: Path, caption: Path) -> Subject:
    group = picture.parent.name
    if group not in GROUPS:
        raise DeftError(f"{picture}: its folder is none of {', '.join(GROUPS)}")
    subject, *prompts = (line.strip() for line in read_text(caption, f"{caption}:").rstrip().split("\n"))
    if not subject or re.search(r'[/\\:*?"<>|]', subject):
        raise DeftError(f"{caption}: its first line, {subject!r}, names no subject")
    if len(prompts) != len(CATEGORIES) or not all(prompts):
        raise DeftError(f"{caption}: a line with the subject and {len(CATEGORIES)} with prompts are wanted, and there "
                        f"are {len(list(filter(None, prompts)))} prompts")  # fmt: skip
    asked = tuple(
        Asked(index, prompt, prompt, category=category)
        for index, (prompt, category) in enumerate(zip(prompts, CATEGORIES, strict=True))
    )
    name = f"{GROUPS[group]}_{picture.stem}_{subject.lower().replace(' ', '_')}"
    return Subject(name, (Row(picture, f"a photo of {subject}"),), asked, (picture,), group)
