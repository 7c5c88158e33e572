"""The stages that the paper's benchmarks share, each of which does what is missing: prepare, train, generate, score,
report."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch

from benchmarks.paper import choosing, generating, report, results, scoring, subjects, training
from benchmarks.paper.choosing import Criterion
from benchmarks.paper.metrics import PRIOR, Choice, Drawn, choose
from benchmarks.paper.metrics.scorer import Scorer
from benchmarks.paper.plan import BASE, REAL, Asked, Benchmark, Subject
from benchmarks.paper.processes import Together, share
from benchmarks.paper.records import Record, Records
from benchmarks.paper.settings import Method, Settings, Training, name_of_file, seed_of
from networks.deft_config import DeftError
from networks.deft_progress import Bar

RESULTS = "results.json"
T = TypeVar("T")


class Drawing(NamedTuple):
    """The pictures of one adapter on one subject; without an adapter, of the base model."""

    method: Method | None
    subject: Subject
    seed: int

    @property
    def key(self) -> str:
        """Of the method."""
        return BASE if self.method is None else self.method.key

    def pictures(self) -> Iterator[tuple[Asked, int]]:
        """What is drawn: each prompt so many times."""
        return ((asked, k) for asked in self.subject.asked for k in range(asked.number))

    def path(self, asked: Asked, k: int) -> str:
        """Of a picture, relative to the output's folder."""
        folder = BASE if self.method is None else self.method.folder
        return f"pictures/{folder}/{name_of_file(self.subject.name)}/{asked.index}_{k}_{self.seed}.png"


class Room:
    """A benchmark's run in its folder.

    :raises DeftError: for data, options or a model that it cannot be done with
    """

    def __init__(self, benchmark: Benchmark, settings: Settings, together: Together):
        self.benchmark, self.settings, self.together = benchmark, settings, together
        self.subjects = subjects.limited(benchmark.subjects(settings.data), settings)
        self.choice: Choice = choose(benchmark.metrics, settings.models)
        self.criterion = Criterion.of(self.choice.names)
        out = settings.output
        self.trainings, self.drawn = (Records(out, name, together.index) for name in ("trainings", "records"))
        self.scores = scoring.Scores(self.drawn, Records(out, "scores", together.index), out)
        self.measured: dict[str, Any] = {}  # how, as the scorer tells it

    # --- what there is to do ---

    @property
    def counted(self) -> list[Subject]:
        """That results are means over."""
        return [one for one in self.subjects if not one.tuning]

    @property
    def tuning(self) -> list[Subject]:
        """That rates are chosen on; none where there is but one rate."""
        return [one for one in self.subjects if one.tuning and len(self.settings.rates) > 1]

    def methods(self, rates: Sequence[float] | None = None) -> list[Method]:
        """Every adapter at each of these rates; None: at all."""
        given = self.settings
        rates = given.rates if rates is None else rates
        return [Method(name, given.rank, rate, given.steps) for name in given.adapters for rate in rates]

    def chosen(self) -> dict[str, Method]:
        """Adapter -> the method with its best rate; adapters whose rates are not all scored yet are not in it."""
        if not self.tuning:
            return {method.adapter: method for method in self.methods()}
        if self.criterion is None:
            return {}
        wanted = {
            (one.name, asked.index, k) for one in self.tuning for asked in one.asked for k in range(asked.number)
            if asked.category != PRIOR
        }  # fmt: skip
        # the same pictures of all: another command line may have drawn more of some
        scores = [s for s in self.scores.read() if (s["subject"], s.get("index"), s.get("k")) in wanted]
        lost = self.lost()
        likeness = self.criterion.likeness
        number = Counter((one["method"], one["subject"]) for one in scores if likeness in one)
        pictures = Counter(name for name, _, _ in wanted)

        def is_whole(key: str) -> bool:
            return all(number[key, name] >= asked for name, asked in pictures.items())

        if not is_whole(BASE):
            return {}
        left = [method for method in self.methods() if method.key not in lost]
        waiting = {method.adapter for method in left if not is_whole(method.key)}
        means = choosing.means_of(scores, pictures, self.criterion.names)
        return self.criterion.best((one for one in left if one.adapter not in waiting), means)

    def lost(self) -> set[str]:
        """Methods of which a training on a tuning subject could not go on."""
        names = {one.name for one in self.tuning}
        return {one["method"] for one in self.trainings.read() if "failed" in one and one["subject"] in names}

    def to_train(self, tuning: bool) -> list[Training]:
        """All of it, whether it is there or not."""
        if tuning:
            return [Training(method, subject, 0) for subject in self.tuning for method in self.methods()]
        methods = self.chosen().values()
        seeds = range(self.settings.seeds)
        return [Training(m, subject, seed) for seed in seeds for subject in self.counted for m in methods]

    def to_draw(self, tuning: bool) -> list[Drawing]:
        """Likewise: of every training, and of the base model."""
        trained = [Drawing(*one) for one in ((t.method, t.subject, t.seed) for t in self.to_train(tuning))]
        some, seeds = (self.tuning, 1) if tuning else (self.counted, self.settings.seeds)
        return [Drawing(None, subject, seed) for seed in range(seeds) for subject in some] + trained

    def finished(self) -> dict[str, Record]:
        """Trainings that need not be done again, by key: their file is there, or they cannot go on."""
        folder = self.settings.output / "adapters"
        found = {one["key"]: one for one in self.trainings.read()}
        return {key: one for key, one in found.items() if "failed" in one or (folder / one["file"]).is_file()}

    def missing(self, tuning: bool) -> list[tuple[Drawing, list[tuple[Asked, int]]]]:
        """Pictures that are still to be drawn, by what they are drawn with."""
        out = self.settings.output
        known = {one["picture"] for one in self.drawn.read()}
        found = []
        for drawing in self.to_draw(tuning):
            paths = ((asked, k, drawing.path(asked, k)) for asked, k in drawing.pictures())
            some = [(asked, k) for asked, k, path in paths if path not in known or not (out / path).is_file()]
            if some:
                found.append((drawing, some))
        return found

    # --- doing it ---

    def check(self) -> None:
        """:raises DeftError: for what shows before anything is computed"""
        training.check(self.settings, self.subjects)
        if not self.counted:
            only = ", ".join(one.name for one in self.subjects[:5])
            others = f": {only} serve to choose rates alone" if only else ""
            raise DeftError(f"--data {self.settings.data}: no subject is left to train on{others}")
        if len(self.settings.rates) > 1:
            if not self.tuning:
                raise DeftError("--rates: this data has no subjects to choose rates on; give one rate")
            if self.criterion is None:
                lacking = "; ".join(self.choice.left_out.values())
                raise DeftError(f"--rates: to choose the best of several, pictures have to be compared ({lacking})")

    def run(self, stages: Sequence[str]) -> None:
        """These stages, in their order; rates are chosen on tuning subjects before all others have their turn.

        :raises DeftError: for what cannot be done
        :raises Interrupted: when a signal has ended a training, after saving
        """
        self.check()
        if self.together.first:
            for one in (self.trainings, self.drawn, self.scores.lines):
                one.gather()
            subjects.prepare(self.subjects, self.settings, self.benchmark.name)
        self.together.wait("prepare")
        work = {"train": self.train, "generate": self.generate, "score": self.score}
        for tuning in (True, False) if self.tuning else (False,):
            for stage, do in work.items():
                if stage in stages:
                    do(tuning)
                    self._end(stage)
        if "report" in stages and self.together.first:
            report.report(self.benchmark, self.settings.output / RESULTS)

    def _end(self, stage: str) -> None:
        """All wait for all, and the first brings the records together."""
        self.together.wait(f"{stage} done")
        if self.together.first:
            for one in (self.trainings, self.drawn, self.scores.lines):
                one.gather()
            results.write(self)
        self.together.wait(f"{stage} gathered")

    def train(self, tuning: bool) -> None:
        """This process's share of the trainings that are missing."""
        if not tuning:
            self._tell_what_is_not_chosen("train")
        known = self.finished()
        todo = self._share([one for one in self.to_train(tuning) if one.key not in known])
        for number, one in enumerate(todo, 1):
            record = training.train(self.settings, one)
            self.trainings.add(record)
            told = record.get("failed") or f"{record['parameters']:,} parameters, {record['seconds']:.0f} s"
            print(f"trained {number}/{len(todo)} {one.key}: {told}", flush=True)

    def generate(self, tuning: bool) -> None:
        """This process's share of the pictures that are missing."""
        if not tuning:
            self._tell_what_is_not_chosen("generate")
        known = self.finished()
        todo = self._share(self._drawable(tuning, known))
        if not todo:
            return
        painter = generating.Painter(self.settings, self.benchmark.guidance)
        number = sum(len(some) for _, some in todo)
        with Bar(number, "drawing", "pictures") as bar:
            for drawing, some in todo:
                with painter.using(self._file(drawing, known)):
                    for asked, k in some:
                        self._draw(painter, drawing, asked, k)
                        bar.add(1)
        del painter
        training.tidy_up()
        print(f"drew {number} pictures", flush=True)

    def _share(self, things: Sequence[T]) -> list[T]:
        """This process's part of what all have found missing, before any of them makes it less."""
        part = share(things, self.together)
        self.together.wait("shared out")
        return part

    def _drawable(self, tuning: bool, known: Mapping[str, Record]) -> list[tuple[Drawing, list[tuple[Asked, int]]]]:
        """What is missing of trainings that are done; says of how many others there is nothing to draw with."""
        ready, waiting = [], 0
        for drawing, some in self.missing(tuning):
            record = known.get(_key(drawing), {})
            if drawing.method is None or "file" in record:
                ready.append((drawing, some))
            elif not record:
                waiting += 1
        if waiting and self.together.first:
            print(f"{waiting} trainings are not there yet; --stage train does them", flush=True)
        return ready

    def _file(self, drawing: Drawing, known: Mapping[str, Record]) -> Path | None:
        return None if drawing.method is None else self.settings.output / "adapters" / known[_key(drawing)]["file"]

    def _draw(self, painter: generating.Painter, drawing: Drawing, asked: Asked, k: int) -> None:
        begin, path = time.perf_counter(), drawing.path(asked, k)
        seed, name = drawing.seed, drawing.subject.name
        image = painter.draw(asked, seed_of(name, asked.index, k, seed))
        generating.write(image, self.settings.output / path)
        self.drawn.add({
            "method": drawing.key, "subject": name, "group": drawing.subject.group, "category": asked.category,
            "index": asked.index, "k": k, "seed": seed, "picture": path, "prompt": asked.prompt,
            "guidance": painter.guidance, "seconds": round(time.perf_counter() - begin, 3),
        })  # fmt: skip

    def score(self, tuning: bool) -> None:
        """This process's share of the pictures that have no scores; sets are the first's."""
        out, scores = self.settings.output, self.scores
        device = "cuda" if torch.cuda.is_available() and self.settings.device != "cpu" else "cpu"
        cache = out / "cache" / f"embeddings-{self.together.index}"
        scorer = Scorer(self.choice, self.settings.models, cache, device)
        by = self._records()
        drawings = self.to_draw(tuning)
        methods = list(dict.fromkeys(one.key for one in drawings))
        some = self.tuning if tuning else self.counted
        found: dict[str, Drawn] = {}
        fields: dict[str, Record] = {}
        for subject, method in share([(s, m) for s in some for m in [*methods, REAL]], self.together):
            if method == REAL:
                found |= (pictures := scoring.real(subject))
                fields |= dict.fromkeys(pictures, scoring.real_fields(subject))
            else:
                found |= scores.drawn(subject, by[method, subject.name])
        scores.score(scores.left(found, self.choice), fields, scorer)
        if self.together.first and not tuning:
            for method in methods:
                self._score_sets(method, by, scorer)
        self.measured = scorer.described()

    def _score_sets(self, method: str, by: Mapping[tuple[str, str], list[Record]], scorer: Scorer) -> None:
        """Of the pictures of all subjects together, or of each one's."""
        found: dict[str, list[Drawn]] = defaultdict(list)
        for subject in self.counted:
            records = [r for r in by[method, subject.name] if self.benchmark.sets_of in ("", r["category"])]
            drawn = self.scores.drawn(subject, records).values()
            found[subject.name if self.benchmark.sets_each else ""].extend(drawn)
        for name, pictures in found.items():
            self.scores.score_sets(method, name, pictures, scorer)

    def _records(self) -> dict[tuple[str, str], list[Record]]:
        """Of the pictures that are there, by method and subject."""
        found: dict[tuple[str, str], list[Record]] = defaultdict(list)
        last = {one["picture"]: one for one in self.drawn.read()}
        for one in last.values():
            if (self.settings.output / one["picture"]).is_file():
                found[one["method"], one["subject"]].append(one)
        return found

    def _tell_what_is_not_chosen(self, stage: str) -> None:
        chosen = self.chosen()
        waiting = [name for name in self.settings.adapters if name not in chosen]
        if waiting and self.together.first:
            print(f"{stage}: the rates of {', '.join(waiting)} are not chosen yet: they need --stage train, generate "
                  f"and score on the tuning subjects", flush=True)  # fmt: skip


def _key(drawing: Drawing) -> str:
    """Of the training; "" for the base model."""
    return "" if drawing.method is None else Training(drawing.method, drawing.subject, drawing.seed).key
