"""What a run is asked for, and how its methods and trainings are named."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paper.plan import Subject

STAGES = ("prepare", "train", "generate", "score", "report")


@dataclass(frozen=True)
class Settings:
    """A parsed command line.

    :param config: of the trainer's further options
    :param models: of the metrics: option's name -> folder or file, None where it is not given
    :param guidance: None: the benchmark's, or the model's own
    :param precision: None: as `config` says
    :param images_per_prompt: None: as many as the benchmark asks for
    :param device: cuda or cpu; None: a GPU where there is one
    """

    data: Path
    model: Path
    output: Path
    config: Path | None
    models: Mapping[str, Path | None]
    adapters: tuple[str, ...]
    rank: int
    rates: tuple[float, ...]
    steps: int
    seeds: int
    size: int
    guidance: float | None
    drawing_steps: int
    precision: str | None
    images_per_prompt: int | None = None
    limit_subjects: int | None = None
    limit_prompts: int | None = None
    device: str | None = None


@dataclass(frozen=True)
class Method:
    """An adapter as it is trained."""

    adapter: str
    rank: int
    rate: float
    steps: int

    @property
    def key(self) -> str:
        """In records and results."""
        return f"{self.adapter}|{self.rank}|{self.rate:g}|{self.steps}"

    @property
    def folder(self) -> str:
        """In file names."""
        return f"{name_of_file(self.adapter)}-r{self.rank}-{self.rate:g}-{self.steps}"


@dataclass(frozen=True)
class Training:
    """One adapter on one subject."""

    method: Method
    subject: Subject
    seed: int

    @property
    def key(self) -> str:
        """In records and results."""
        return f"{self.method.key}|{self.subject.name}|{self.seed}"

    @property
    def name(self) -> str:
        """Of its file."""
        return f"{self.method.folder}-{name_of_file(self.subject.name)}-{self.seed}"


def name_of_file(text: str) -> str:
    """A text as part of a file's name on every system; two texts never share one."""
    safe = re.sub(r"[^\w=+.-]+|[^\x00-\x7f]+", "-", text)[:60].strip(".-")
    return safe if safe == text else f"{safe}-{hashlib.sha256(text.encode()).hexdigest()[:6]}"


def seed_of(subject: str, index: int, k: int, seed: int) -> int:
    """Of a picture's noise, from 0 to 2**32 - 1: the same whatever else is drawn, in whatever order and process.

    :param index: of the prompt
    :param k: of the picture among those of its prompt
    :param seed: of the training
    """
    return int.from_bytes(hashlib.sha256(f"{subject}|{index}|{k}|{seed}".encode()).digest()[:4], "big")
