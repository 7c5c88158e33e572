"""The score stage: what is drawn, as the metrics are given it, and a line of scores for each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paper.metrics import METRICS, PRIOR, Choice, Drawn
from benchmarks.paper.metrics.scorer import Scorer
from benchmarks.paper.plan import REAL, Subject
from benchmarks.paper.records import Record, Records

AT_ONCE = 64  # pictures between two writes


@dataclass(frozen=True)
class Scores:
    """Lines of scores of one run.

    :param records: of drawn pictures
    :param lines: one a picture, `{"picture": path, metric: value, "of": names of metrics that were asked for,
        "siblings": how many others its prompt had}`; of sets `{"method": key, "subject": its name or "" for all,
        metric: value, "of": ...}`
    :param folder: which the records' paths are relative to
    """

    records: Records
    lines: Records
    folder: Path

    def read(self) -> Iterator[Record]:
        """Lines of pictures with their records' fields; of a picture that was scored again, the last."""
        known = {record["picture"]: record for record in self.records.read()}
        last = {line["picture"]: line for line in self.lines.read() if "picture" in line}
        for picture, line in last.items():
            if "method" in line or picture in known:
                yield known.get(picture, {}) | line

    def left(self, pictures: Mapping[str, Drawn], choice: Choice) -> dict[str, Drawn]:
        """Those that have not been asked all these metrics, or have been before others of their prompt were drawn.

        :param pictures: by the path that lines have
        """
        wanted = set(_alone(choice).names)
        known = {one["picture"]: one for one in self.lines.read() if "picture" in one}

        def is_done(path: str, drawn: Drawn) -> bool:
            line = known.get(path, {"of": ()})
            return wanted <= {*line["of"]} and line.get("siblings") == len(drawn.siblings)

        return {path: one for path, one in pictures.items() if not is_done(path, one)}

    def score(self, pictures: Mapping[str, Drawn], more: Mapping[str, Record], scorer: Scorer) -> None:
        """Scores pictures and writes a line for each.

        :param pictures: by the path that lines have
        :param more: further fields of lines
        """
        paths, names = list(pictures), list(_alone(scorer.choice).names)
        for i in range(0, len(paths), AT_ONCE):
            part = paths[i : i + AT_ONCE]
            for path, found in zip(part, scorer.scores([pictures[path] for path in part]), strict=True):
                siblings = len(pictures[path].siblings)
                self.lines.add({"picture": path, **more.get(path, {}), **found, "of": names, "siblings": siblings})

    def drawn(self, subject: Subject, records: Sequence[Record]) -> dict[str, Drawn]:
        """A method's pictures of a subject, as the metrics are given them, by the path that records have."""
        asked = {one.index: one for one in subject.asked}
        found = {}
        for record in records:
            if record["index"] not in asked:  # under a limit
                continue
            one = asked[record["index"]]
            siblings = tuple(
                self.folder / other["picture"]
                for other in records
                if other is not record and (other["index"], other["seed"]) == (record["index"], record["seed"])
            )
            references = subject.references if one.references is None else one.references
            found[record["picture"]] = Drawn(
                self.folder / record["picture"], references, one.text, siblings, one.category == PRIOR
            )
        return found

    def score_sets(self, method: str, subject: str, drawn: Sequence[Drawn], scorer: Scorer) -> None:
        """Scores that a method's pictures have together, unless the same pictures have them already.

        :param subject: of which the pictures are; "" for all
        """
        names = [name for name in scorer.choice.names if METRICS[name].of_sets]
        number = sum(not one.prior for one in drawn)
        key = method, subject
        last = [one for one in self.lines.read() if "picture" not in one and (one["method"], one["subject"]) == key]
        if not names or (last and last[-1].get("drawn") == number and {*names} <= {*last[-1]["of"]}):
            return
        found = scorer.set_scores(drawn)
        if found:
            self.lines.add({"method": method, "subject": subject, **found, "of": names})


def real(subject: Subject) -> dict[str, Drawn]:
    """Each real picture beside the subject's others, the upper anchor; none where there is but one."""
    pictures = dict.fromkeys(subject.references)
    return {
        str(path): Drawn(path, tuple(other for other in pictures if other != path))
        for path in pictures
        if len(pictures) > 1
    }


def real_fields(subject: Subject) -> Record:
    """Of the lines of `real`, which have no records."""
    return {"method": REAL, "subject": subject.name, "group": subject.group}


def _alone(choice: Choice) -> Choice:
    return Choice(tuple(name for name in choice.names if not METRICS[name].of_sets))
