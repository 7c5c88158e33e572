"""What was drawn, as the tree of samples that DreamBench++'s own scripts read.

Read from yuangpeng/dreambench_plus: generate_images.py, utils/image_utils.py.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from benchmarks.paper.plan import Subject
from benchmarks.paper.scored import Method, Scored
from networks.deft_config import DeftError
from networks.deft_io import write_whole
from networks.deft_progress import Bar


class Drawing(NamedTuple):
    """How pictures were drawn, for the tree's name.

    :param precision: as --mixed_precision
    """

    steps: int
    precision: str


def sample_name(method: Method) -> str:
    """A method as upstream's scripts can take it: they split file names at "-" and "."."""
    told = method.key if method.rate is None else f"{method.adapter} r{method.rank} {method.rate:g} {method.steps}"
    return re.sub(r"[^a-z0-9]+", "_", told.lower()).strip("_")


def write_samples(
    scored: Scored, methods: Iterable[Method], subjects: Sequence[Subject], drawing: Drawing, folder: Path
) -> dict[str, Path]:
    """Writes what was drawn of the counted subjects as upstream's generate_images.py does, a tree a method and seed.

    Pictures are JPEG of Pillow's own quality, as upstream's are. What is there and not older than its source stays.

    :param subjects: those of the data
    :param folder: usually `samples`
    :return: a tree's name -> its folder
    """
    dtype = {"fp16": "float16", "bf16": "bfloat16"}.get(drawing.precision, "float32")
    counted, by_name = set(scored.counted()), {subject.name: subject for subject in subjects}
    shown = {method.key: sample_name(method) for method in methods}
    records = [r for r in scored.records.values() if r["method"] in shown and r["subject"] in counted & by_name.keys()]
    trees: dict[str, Path] = {}
    with Bar(len(records), "samples for upstream's scripts") as bar:
        for record in records:
            guidance = "own" if record["guidance"] is None else float(record["guidance"])  # "own": the model's
            told = f"gs{guidance}_step{drawing.steps}_seed{record['seed']}_torch_{dtype}"
            name = f"{shown[record['method']]}_{told.replace('.', '_')}"
            if name not in trees:
                trees[name] = folder / name
                write_whole(trees[name] / "negative_prompt.txt", b"")
            _write_sample(scored.folder / record["picture"], record, by_name[record["subject"]], trees[name])
            bar.add(1)
    return trees


def _write_sample(picture: Path, record: Mapping, subject: Subject, tree: Path) -> None:
    if not picture.is_file():  # the report says that it is missing
        return
    text = next(asked.text for asked in subject.asked if asked.index == record["index"])
    name = f"{record['index']}_{record['k']}"
    _write_jpeg(subject.references[0], tree / "src_image" / subject.name / f"{name}.jpg")
    _write_jpeg(picture, tree / "tgt_image" / subject.name / f"{name}.jpg")
    write_whole(tree / "text" / subject.name / f"{name}.txt", text.encode())


def _write_jpeg(source: Path, file: Path) -> None:
    if file.is_file() and file.stat().st_mtime >= source.stat().st_mtime:
        return
    written = io.BytesIO()
    opened(source).save(written, "JPEG")
    write_whole(file, written.getvalue())


def opened(path: Path) -> Image.Image:
    """A picture as upstream's load_image gives it: upright, RGB, on white where it is transparent.

    :raises DeftError: when it cannot be read
    """
    try:
        with Image.open(path) as picture:
            upright = ImageOps.exif_transpose(picture)
            if upright.mode == "RGBA":
                upright = Image.alpha_composite(Image.new("RGBA", upright.size, "white"), upright)
            return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DeftError(f"{path}: cannot be read as a picture ({error})") from None
