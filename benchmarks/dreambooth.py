"""DreamBooth (Ruiz 2023): one adapter for each of thirty subjects, drawn in 25 new scenes, four pictures each.

    python benchmarks/dreambooth.py --data google-dreambooth/dataset --model SD15 --output out/dreambooth --dry_run
    python benchmarks/dreambooth.py --data google-dreambooth/dataset --model SD15 --output out/dreambooth \\
        --clip DIR --dino DIR --dinov2 DIR --alexnet FILE --adapters lora dora oft para deft deft-published --rank 4

The data are google/dreambooth's `dataset/`, with its pictures. Training as in DreamBench++'s LoRA (1e-4 there, batch 1,
constant, 512 pixels), on "a photo of sks <class>", without the paper's prior preservation. Four subjects serve to
choose rates, and do not count. Every picture's noise depends on its subject, prompt and number alone.
"""

from __future__ import annotations

import re
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.paper import command
from benchmarks.paper.metrics import METRICS as TABLE
from benchmarks.paper.metrics import PRIOR
from benchmarks.paper.plan import REAL, Asked, Benchmark, Published, Row, Source, Subject
from networks.deft_config import DeftError, read_text

LIST = "prompts_and_classes.txt"
PROMPTS = 25  # of objects, and as many of what lives
LIVE = ("cat", "dog")  # classes
TUNING = ("can", "cat2", "dog5", "teapot")  # two that live and two objects, of classes that others have or are like
PICTURES = (".jpg", ".jpeg", ".png", ".webp")
METRICS = ("dino", "clip_i", "clip_t", "dinov2", "pres", "div")
SCENE, OUTFIT, PROPERTY = "scene", "outfit", "property"  # kinds of prompts
_PAPER = "Ruiz 2023 (arXiv 2208.12242), Table 1; 30 subjects, with prior preservation"
PUBLISHED = (
    Published("real pictures", {"dino": 0.774, "clip_i": 0.885}, _PAPER, REAL),
    Published("DreamBooth, Imagen", {"dino": 0.696, "clip_i": 0.812, "clip_t": 0.306}, _PAPER),
    Published("DreamBooth, Stable Diffusion", {"dino": 0.668, "clip_i": 0.803, "clip_t": 0.305}, _PAPER),
    Published("Textual Inversion, Stable Diffusion", {"dino": 0.569, "clip_i": 0.780, "clip_t": 0.255}, _PAPER),
)
DATA = Source(
    "DreamBooth's 30 subjects with their pictures and prompts (dataset/)",
    "https://github.com/google/dreambooth",
    "CC-BY-4.0; some pictures Unsplash's (dataset/references_and_licenses.txt)",
)


def classes_of(text: str) -> dict[str, str]:
    """Subject -> class, of the table behind "Classes".

    :param text: of `prompts_and_classes.txt`
    """
    _, _, table = text.partition("subject_name,class\n")
    rows = table.partition("\nPrompts")[0].split("\n")
    return dict(row.strip().split(",", 1) for row in rows if "," in row)


def prompts_of(text: str) -> tuple[list[str], list[str]]:
    """Prompts of objects and of what lives, with {0} for the token and {1} for the class. Read, never run.

    :raises DeftError: where they are not twice 25
    """
    found = re.findall(r"^\s*'(.*?)'\.format\(unique_token, class_token\),?\s*$", text, re.MULTILINE)
    if len(found) != 2 * PROMPTS:
        raise DeftError(f"{LIST}: {len(found)} prompts are in it, and not {2 * PROMPTS}; it has been changed")
    return found[:PROMPTS], found[PROMPTS:]


def subjects_of(data: Path, token: str) -> list[Subject]:
    """The subjects of google/dreambooth's `dataset/`.

    :raises DeftError: where the folder has another layout, or a subject no pictures
    """
    file = data / LIST
    if not file.is_file():
        raise DeftError(f"--data {data}: has no {LIST}; give dataset/ of {DATA.published}")
    text = read_text(file, f"{file}:")
    classes, (of_objects, of_live) = classes_of(text), prompts_of(text)
    if not classes:
        raise DeftError(f"{file}: names no subjects")
    return [_subject(data / name, kind, token, of_live if kind in LIVE else of_objects)
            for name, kind in classes.items()]  # fmt: skip


def _subject(folder: Path, kind: str, token: str, prompts: Iterable[str]) -> Subject:
    files = folder.iterdir() if folder.is_dir() else ()
    pictures = tuple(sorted(path for path in files if path.suffix.lower() in PICTURES))
    if not pictures:
        raise DeftError(f"--data {folder.parent}: no pictures of {folder.name}; give dataset/ of {DATA.published}")
    rows = tuple(Row(picture, f"a photo of {token} {kind}") for picture in pictures)
    asked = tuple(_asked(prompts, kind, token))
    group = "live" if kind in LIVE else "object"
    return Subject(folder.name, rows, asked, pictures, group, folder.name in TUNING)


def _asked(prompts: Iterable[str], kind: str, token: str) -> Iterator[Asked]:
    """The prompts, and the class alone, for PRES."""
    for index, prompt in enumerate(prompts):
        text = prompt.replace("{0}", token).replace("{1}", kind)
        # the identifier says nothing to CLIP, but the paper's prompts have it in them
        category = PROPERTY if index >= 20 else OUTFIT if kind in LIVE and index >= 10 else SCENE
        yield Asked(index, text, text, 4, category)
    yield Asked(PROMPTS, f"a {kind}", f"a {kind}", 4, PRIOR)


def benchmark_of(args: Namespace) -> Benchmark:
    """As the paper has it, at Stable Diffusion 1.5's size."""
    columns = {f"{TABLE[metric].title}, {of}": (metric, of)
               for metric in ("dino", "clip_t") for of in ("object", "live", SCENE, OUTFIT, PROPERTY)}  # fmt: skip
    return Benchmark(
        name="DreamBooth",
        subjects=partial(subjects_of, token=args.token),
        data=DATA,
        metrics=METRICS,
        steps=400,
        size=512,
        published=PUBLISHED,
        columns=columns,
        notes=("trained without prior preservation, which DreamBooth's own figures have",),
    )


def add_options(parser: ArgumentParser) -> None:
    """This benchmark's own."""
    parser.add_argument("--token", default="sks", help="that stands for the subject in prompts (default: sks)")


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `command.main`."""
    return command.main(__doc__ or "", METRICS, benchmark_of, add_options, argv=argv)


if __name__ == "__main__":
    sys.exit(main())
