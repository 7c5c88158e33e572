"""What a benchmark of the paper's is made of: subjects to train on, what is asked for, pictures to compare with."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

BASE, REAL = (
    "base",
    "real",
)  # the anchors among the methods: the model without an adapter; real pictures beside real ones


@dataclass(frozen=True)
class Row:
    """One training picture.

    :param inputs: pictures that its caption refers to as `<img><|image_1|></img>` and so on; OmniGen alone reads them
    """

    picture: Path
    caption: str
    inputs: tuple[Path, ...] = ()


@dataclass(frozen=True)
class Asked:
    """One prompt that is drawn from, `number` times.

    :param index: of the prompt in its subject's list, as the benchmark numbers it: part of file names and seeds
    :param prompt: as the model is given it
    :param text: as pictures are compared with it: without placeholders of pictures
    :param category: by which tables group prompts; "" for none
    :param inputs: pictures that the model is given; OmniGen alone reads them
    :param references: pictures that what is drawn is compared with; None: the subject's
    """

    index: int
    prompt: str
    text: str
    number: int = 1
    category: str = ""
    inputs: tuple[Path, ...] = ()
    references: tuple[Path, ...] | None = None


@dataclass(frozen=True)
class Subject:
    """What one adapter is trained on.

    :param name: in file names and results; unique in its benchmark
    :param group: by which tables group subjects
    :param references: the real pictures that what is drawn is compared with
    :param tuning: whether it serves to choose rates, and does not count
    """

    name: str
    rows: tuple[Row, ...]
    asked: tuple[Asked, ...]
    references: tuple[Path, ...]
    group: str = ""
    tuning: bool = False


@dataclass(frozen=True)
class Published:
    """Figures of others, for the report.

    :param figures: column's name -> value, in the scale of the results: cosines from 0 to 1
    :param source: where they were read
    :param adapter: whose own figures are laid beside it; "" for none
    """

    method: str
    figures: Mapping[str, float]
    source: str
    adapter: str = ""


@dataclass(frozen=True)
class Source:
    """Something that a run needs from the user's disk.

    :param what: in words
    :param published: where it is to be had
    :param licence: its licence as published
    """

    what: str
    published: str
    licence: str


@dataclass(frozen=True)
class Benchmark:
    """A benchmark as its own script states it. Everything else is the shared room's.

    :param subjects: reads the data folder; raises DeftError for what is missing or does not fit
    :param data: what the data folder has to hold
    :param metrics: names of `metrics.METRICS` that are computed, in the tables' order
    :param steps: of training, by default
    :param size: pixels of a side, of training and drawing
    :param guidance: of drawing
    :param drawing_steps: of the sampler
    :param published: figures of others
    :param columns: of further tables: name -> (metric, category or group of which it is the mean)
    :param notes: what a reader of the tables has to know
    :param hundredfold: metrics that the benchmark's own tables give times 100
    :param sets_of: category of prompts whose pictures alone count where sets are compared, as by FID; "": all
    :param sets_each: whether each subject's pictures are a set, and not those of all together
    """

    name: str
    subjects: Callable[[Path], Sequence[Subject]]
    data: Source
    metrics: tuple[str, ...]
    steps: int
    size: int
    guidance: float = 7.5
    drawing_steps: int = 50
    published: tuple[Published, ...] = ()
    columns: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    hundredfold: tuple[str, ...] = ()
    sets_of: str = ""
    sets_each: bool = False
