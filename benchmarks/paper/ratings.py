"""DreamBench++'s ratings by a language model: requests are written, answers are read, and nobody is asked.

Requests are lines for OpenAI's batch interface, which other services take as well; answers are its lines, or the
folder that upstream's scripts write. Prompts come from the user's checkout of yuangpeng/dreambench_plus. Read there:
eval_concept_preservation.py, eval_prompt_following.py, merge_data.py, benchmarking.py, utils/gpt_utils.py.
"""

from __future__ import annotations

import base64
import hashlib
import io
import json
import math
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from benchmarks.paper.bootstrap import Interval, interval
from benchmarks.paper.dreambench_plus_data import CATEGORIES, GROUPS, IMAGINATIVE, PHOTOREALISTIC, STYLE_TRANSFER
from benchmarks.paper.dreambench_plus_samples import opened
from benchmarks.paper.records import lines_of
from benchmarks.paper.tables import table
from networks.deft_config import DeftError, read_text
from networks.deft_io import write_whole
from networks.deft_progress import Bar

CP, PF = "cp", "pf"
FOLDERS = {CP: "concept_preservation", PF: "prompt_following"}  # upstream's: <folder>_<run>
RUNS = ("full", "full2", "full3")
SIDE = 512  # pixels of what a rater sees
HIGHEST = 4
MODEL = "gpt-4o-2024-05-13"  # upstream's rater
UPSTREAM = "https://github.com/yuangpeng/dreambench_plus"
LARGEST, MOST = 190_000_000, 50_000  # bytes and requests that OpenAI takes in a file
_SCORE = re.compile(r"(score|Score):\s*[a-zA-Z]*\s*(\d+)")


class Item(NamedTuple):
    """What is rated once.

    :param method: the name of its tree of samples
    :param collection: its subject
    :param prompt: its index
    """

    method: str
    kind: str
    collection: str
    prompt: int
    run: str

    @property
    def custom_id(self) -> str:
        """In requests and answers."""
        return "/".join(map(str, self))


def item_of(custom_id: str) -> Item:
    """:raises ValueError: for another program's"""
    method, kind, collection, prompt, run = custom_id.split("/")
    if kind not in FOLDERS or run not in RUNS:
        raise ValueError(custom_id)
    return Item(method, kind, collection, int(prompt), run)


def score_of(content: str | None) -> int | None:
    """The score in an answer; None where there is none or more than one, or one that is not on the scale."""
    found = [int(score) for _, score in _SCORE.findall(content or "")]
    return found[0] if len(found) == 1 and found[0] <= HIGHEST else None


# --- requests --------------------------------------------------------------------------------------------------------


def items_of(tree: Path, runs: int = len(RUNS)) -> list[Item]:
    """What upstream rates of a tree of samples: the first picture of each prompt, twice, in each run."""
    pictures = sorted((tree / "tgt_image").glob("*/*_0.jpg"))
    found = [(path.parent.name, int(path.stem.split("_")[0])) for path in pictures]
    return [Item(tree.name, kind, *one, run) for one in found for kind in FOLDERS for run in RUNS[:runs]]


def messages_of(item: Item, tree: Path, prompts: Mapping[str, str]) -> list[dict[str, Any]]:
    """What upstream sends, in whichever run.

    :param prompts: `read_prompts`'
    """
    name, folder = f"{item.prompt}_0", item.collection
    drawn = _picture(tree / "tgt_image" / folder / f"{name}.jpg")
    if item.kind == CP:
        about = "style" if folder.startswith("style_") else "subject"
        shown = [_picture(tree / "src_image" / folder / f"{name}.jpg"), drawn]
    else:
        about = "text"
        text = read_text(tree / "text" / folder / f"{name}.txt", f"{tree}:").split("\n")[0].strip()
        shown = [{"type": "text", "text": text}, drawn]
    return [
        {"role": "user", "content": prompts[f"user_prompt_{about}"]},
        {"role": "assistant", "content": prompts[f"gpt_prompt_{about}"]},
        {"role": "user", "content": shown},
    ]


def request_of(item: Item, messages: Sequence[Mapping[str, Any]], model: str) -> dict[str, Any]:
    """A line for the batch interface; upstream's seeds are random, these are the item's own."""
    seed = int.from_bytes(hashlib.sha256(item.custom_id.encode()).digest()[:4], "big") >> 1
    body = {"model": model, "messages": messages, "temperature": 1, "seed": seed}
    return {"custom_id": item.custom_id, "method": "POST", "url": "/v1/chat/completions", "body": body}


def _picture(path: Path) -> dict[str, Any]:
    written = io.BytesIO()
    opened(path).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(written, "JPEG")
    url = f"data:image/jpeg;base64,{base64.b64encode(written.getvalue()).decode()}"
    return {"type": "image_url", "image_url": {"url": url, "detail": "high"}}


def read_prompts(upstream: Path) -> dict[str, str]:
    """Upstream's prompts, from a checkout.

    :raises DeftError: where they are not
    """
    folder = next((p for p in (upstream / "dreambench_plus" / "prompts", upstream / "prompts") if p.is_dir()), None)
    if folder is None:
        raise DeftError(f"--upstream {upstream}: there is no dreambench_plus/prompts; give a checkout of {UPSTREAM}")
    names = [f"{who}_prompt_{about}" for about in ("subject", "style", "text") for who in ("user", "gpt")]
    return {name: read_text(folder / f"{name}_full.txt", "--upstream:").strip() for name in names}


def write_requests(trees: Iterable[Path], upstream: Path, model: str, file: Path, runs: int = len(RUNS)) -> list[Path]:
    """Writes the requests of trees of samples, in as many files as the interface wants: FILE, FILE-2, and so on.

    :return: the files
    :raises DeftError: for prompts or pictures that cannot be read, and a full disk
    """
    prompts = read_prompts(upstream)
    asked = [(item, tree) for tree in trees for item in items_of(tree, runs)]
    if not asked:
        raise DeftError("--requests: no pictures are drawn yet")
    messages: list[dict[str, Any]] = []
    files: list[Path] = []
    lines: list[bytes] = []

    def write() -> None:
        name = file.stem if not files else f"{file.stem}-{len(files) + 1}"
        files.append(file.with_name(f"{name}{file.suffix}"))
        write_whole(files[-1], lines)
        lines.clear()

    size = 0
    with Bar(len(asked), "requests") as bar:
        for item, tree in asked:
            if item.run == RUNS[0]:
                messages = messages_of(item, tree, prompts)
            line = json.dumps(request_of(item, messages, model)).encode() + b"\n"
            if lines and (size + len(line) > LARGEST or len(lines) == MOST):
                write()
                size = 0
            lines.append(line)
            size += len(line)
            bar.add(1)
    write()
    return files


# --- answers ---------------------------------------------------------------------------------------------------------


def read_answers(paths: Iterable[Path]) -> dict[Item, int]:
    """Scores by item; of several answers the first with a score counts, as upstream asks again until there is one.

    :param paths: files of the batch interface's output, or folders as upstream's `data_gpt_rating`
    :raises DeftError: for a path that is not there, and a file that is none of these
    """
    found: dict[Item, int] = {}
    for path in paths:
        if not path.exists():
            raise DeftError(f"--ratings {path}: there is no such file or folder")
        for item, score in _of_folder(path) if path.is_dir() else _of_batch(path):
            if score is not None:
                found.setdefault(item, score)
    return found


def _of_batch(file: Path) -> Iterator[tuple[Item, int | None]]:
    for line in lines_of(file):
        try:
            item = item_of(line["custom_id"])
        except (KeyError, ValueError, AttributeError):
            raise DeftError(f"--ratings {file}: {line.get('custom_id')!r} is no request's custom_id") from None
        try:
            content = line["response"]["body"]["choices"][0]["message"]["content"]
        except (KeyError, IndexError, TypeError):  # it failed there
            content = None
        yield item, score_of(content if isinstance(content, str) else None)


def _of_folder(folder: Path) -> Iterator[tuple[Item, int | None]]:
    """Upstream's: <kind>_<run>/<method>/<method>-<collection>-<index>.json."""
    known = False
    for kind, name in FOLDERS.items():
        for run in RUNS:
            known |= (folder / f"{name}_{run}").is_dir()
            for file in sorted((folder / f"{name}_{run}").glob("*/*.json")):
                try:
                    said = json.loads(read_text(file, f"{file}:"))
                    item = Item(file.parent.name, kind, said["collection_id"], int(said["prompt_index"]), run)
                    score = score_of(said["content"])
                except (ValueError, KeyError, TypeError):
                    raise DeftError(f"--ratings {file}: is no rating of upstream's scripts") from None
                yield item, score
    if not known:
        raise DeftError(f"--ratings {folder}: there is no {FOLDERS[CP]}_{RUNS[0]} in it, as in data_gpt_rating")


# --- figures ---------------------------------------------------------------------------------------------------------


class Rated(NamedTuple):
    """A figure.

    :param mean: of the runs' means, each of scores / 4
    :param deviation: between runs, as upstream has it; None for one run
    :param over_subjects: with the interval of a bootstrap over subjects
    :param missing: items without a score, of `asked`
    """

    mean: float
    deviation: float | None
    over_subjects: Interval
    missing: int
    asked: int

    def text(self) -> str:
        """As upstream prints it, and a star where ratings are missing."""
        spread = "" if self.deviation is None else f" ± {self.deviation:.3f}"
        return f"{self.mean:.3f}{spread}" + "*" * (self.missing > 0)


COLUMNS = {
    **{f"CP {group}": (CP, group) for group in GROUPS},
    "CP": (CP, ""),
    **{f"PF {category}": (PF, category) for category in (PHOTOREALISTIC, STYLE_TRANSFER, IMAGINATIVE)},
    "PF": (PF, ""),
}
PRODUCT = "CP x PF"


@dataclass(frozen=True)
class Ratings:
    """What a rater has said.

    :param rater: its name, which tables show
    :param items: all that were asked for
    """

    rater: str
    items: Sequence[Item]
    scores: Mapping[Item, int]

    def methods(self) -> list[str]:
        """In the order of what was asked for."""
        return list(dict.fromkeys(item.method for item in self.items))

    def figure(self, method: str, kind: str, of: str = "") -> Rated | None:
        """A cell: of `of` alone, a group of subjects or a category of prompts; None without a score."""
        asked = [i for i in self.items if (i.method, i.kind) == (method, kind) and of in ("", *parts_of(i))]
        given = [item for item in asked if item in self.scores]
        if not given:
            return None
        by_run = [self._mean([i for i in given if i.run == run]) for run in RUNS if any(i.run == run for i in given)]
        mean = math.fsum(by_run) / len(by_run)
        squares = math.fsum((value - mean) ** 2 for value in by_run)
        deviation = math.sqrt(squares / (len(by_run) - 1)) if len(by_run) > 1 else None
        of_subjects = {name: [i for i in given if i.collection == name] for name in {i.collection for i in given}}
        over = interval({name: self._mean(items) for name, items in of_subjects.items()})
        return Rated(mean, deviation, over, len(asked) - len(given), len(asked))

    def _mean(self, items: Sequence[Item]) -> float:
        return math.fsum(self.scores[item] for item in items) / len(items) / HIGHEST

    def table(self) -> dict[str, dict[str, Rated | float]]:
        """Method -> column -> figure; of CP x PF, the product of the two means."""
        found: dict[str, dict[str, Rated | float]] = {}
        for method in self.methods():
            cells = {title: self.figure(method, *column) for title, column in COLUMNS.items()}
            found[method] = {title: cell for title, cell in cells.items() if cell}
            cp, pf = cells["CP"], cells["PF"]
            if cp and pf:
                found[method][PRODUCT] = cp.mean * pf.mean
        return found


def rated(rater: str, trees: Sequence[Path], answers: Mapping[Item, int]) -> Ratings:
    """What answers say of trees of samples, in the runs of which there are any.

    :raises DeftError: for answers of which none is of these samples
    """
    names = {short_name(tree.name): tree.name for tree in trees}  # upstream's folders leave out how pictures were drawn
    scores = {item._replace(method=names.get(item.method, item.method)): score for item, score in answers.items()}
    runs = {item.run for item in scores}
    items = [item for tree in trees for item in items_of(tree) if item.run in runs]
    if scores.keys().isdisjoint(items):
        raise DeftError(f"--ratings: no answer is of the samples {', '.join(tree.name for tree in trees)}")
    return Ratings(rater, items, scores)


def short_name(tree: str) -> str:
    """A tree's name without how its pictures were drawn."""
    return re.sub(r"_gs(\d+_\d+|own)_step.*$", "", tree)


def parts_of(item: Item) -> tuple[str, str]:
    """The group of its subject and the category of its prompt."""
    group = next((name for name, prefix in GROUPS.items() if item.collection.startswith(f"{prefix}_")), "")
    return group, CATEGORIES[item.prompt] if item.prompt < len(CATEGORIES) else ""


def markdown(ratings: Ratings) -> str:
    """The table in upstream's form; under the rater's name, since another rater's figures are not comparable."""
    head = ["method", *COLUMNS, PRODUCT]

    def shown(cell: Rated | float | None) -> str:
        return "–" if cell is None else cell.text() if isinstance(cell, Rated) else f"{cell:.3f}"

    found = ratings.table()
    rows = [[name, *(shown(row.get(title)) for title in head[1:])] for name, row in found.items()]
    missing = [f"* {name}, {title}: {cell.missing} of {cell.asked} ratings are missing" for name, row in found.items()
               for title in ("CP", "PF") if isinstance(cell := row.get(title), Rated) and cell.missing]  # fmt: skip
    about = (
        f"Rated by {ratings.rater}; mean of the runs' means, of scores from 0 to {HIGHEST} as 0 to 1, ± between runs."
    )
    return "\n\n".join(filter(None, [f"## Ratings by {ratings.rater}", about, table(head, rows), "\n".join(missing)]))


def as_json(ratings: Ratings) -> dict[str, Any]:
    """The same as numbers, with intervals over subjects."""

    def plain(cell: Rated | float) -> Any:
        return {**cell._asdict(), "over_subjects": cell.over_subjects._asdict()} if isinstance(cell, Rated) else cell

    rows = {name: {title: plain(cell) for title, cell in row.items()} for name, row in ratings.table().items()}
    return {"rater": ratings.rater, "figures": rows}
