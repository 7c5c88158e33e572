"""Tasks of Graph200K, VisualCloze's data, learnt by OmniGen: edges, depth and others to picture, with examples or not.

    python benchmarks/visualcloze.py --data graph200k --model OMNIGEN --output out/visualcloze --rank 32 \\
        --clip clip-vit-base-patch32 --dino_vits8 dino-vits8 --dinov2 dinov2-small --depth_model DIR --dry_run

What is needed, what is compared, and what the paper's authors do otherwise: docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.paper import command
from benchmarks.paper.metrics import METRICS as ALL
from benchmarks.paper.plan import BASE, Benchmark, Published, Source, Subject

METRICS = ("clip_i", "dinov1", "dinov2", "clip_t", "ssim", "f1", "depth_rmse", "fid", "fd_dinov2", "musiq", "maniqa")
OF_ONE_TASK = {"f1": "canny", "depth_rmse": "depth"}  # metric -> the condition that it looks for
CONTEXT_SIZE = 384  # pixels a side of what is shown in context: VisualCloze's
SIZE, STEPS = 512, 4000

CLOZE, NOTE = "VisualCloze (arXiv 2504.07960), Table 1", "a note on DEFT's paper, en.papernotes.org"
# task, metrics, where they were read, and method -> values
FIGURES: tuple[tuple[str, tuple[str, ...], str, Mapping[str, tuple[float, ...]]], ...] = (
    ("canny", ("f1", "fid", "ssim", "maniqa", "musiq", "clip_t"), CLOZE, {
        "ControlNet": (0.13, 46.06, 0.34, 0.31, 45.45, 0.3410),
        "OminiControl": (0.47, 29.58, 0.61, 0.44, 61.40, 0.3440),
        "OneDiffusion": (0.39, 32.76, 0.55, 0.46, 59.99, 0.3499),
        "OmniGen": (0.43, 51.58, 0.47, 0.47, 62.66, 0.3366),
        "VisualCloze, dev": (0.39, 30.36, 0.61, 0.48, 61.13, 0.3503),
        "VisualCloze, Fill": (0.35, 30.60, 0.55, 0.49, 64.39, 0.3498),
    }),
    ("depth", ("depth_rmse", "fid", "ssim", "maniqa", "musiq", "clip_t"), CLOZE, {
        "ControlNet": (23.70, 36.83, 0.41, 0.44, 60.17, 0.3449),
        "OminiControl": (21.44, 36.23, 0.52, 0.44, 60.18, 0.3408),
        "OneDiffusion": (10.35, 39.03, 0.49, 0.49, 60.49, 0.3471),
        "OmniGen": (15.07, 86.08, 0.26, 0.49, 64.90, 0.2972),
        "VisualCloze, dev": (25.06, 42.14, 0.53, 0.46, 58.95, 0.3480),
        "VisualCloze, Fill": (10.31, 33.88, 0.54, 0.48, 64.85, 0.3510),
    }),
    ("canny", ("clip_i", "dinov1", "dinov2"), NOTE, {
        "OmniGen": (0.9545, 0.8713, 0.8760),
        "DEFT, rank 32": (0.9578, 0.9037, 0.9065),
    }),
    ("depth", ("clip_i", "dinov1", "dinov2"), NOTE, {
        "OmniGen": (0.9202, 0.8516, 0.7739),
        "DEFT, rank 32": (0.9318, 0.8898, 0.8575),
    }),
)  # fmt: skip
OWN = {"OmniGen": BASE, "DEFT, rank 32": "deft-frozen"}  # what the authors' script trains with their options


def add_options(parser: ArgumentParser) -> None:
    """VisualCloze's own."""
    cloze = parser.add_argument_group("VisualCloze")
    cloze.add_argument("--tasks", nargs="+", default=["canny", "depth"], metavar="TASK", help="names in data.json: a "
                       "condition, several as reference+depth, another target as target:depth (default: canny "
                       "depth)")  # fmt: skip
    cloze.add_argument("--context", type=int, choices=(0, 1, 2), default=0, help="solved rows that are shown before "
                       "the one that is asked (default: 0, as the paper's authors)")  # fmt: skip
    cloze.add_argument("--train_rows", type=int, default=2000, metavar="N", help="of each task, the first of train "
                       "(default: 2000)")  # fmt: skip
    cloze.add_argument("--rows", type=int, default=200, metavar="N", help="drawn for each task, the first of test "
                       "(default: 200)")  # fmt: skip
    cloze.add_argument("--instruction", metavar="TEMPLATE", help="with {text}, {given} or {conditions}, {target}, "
                       "{examples} (default: docs/benchmarks.md)")  # fmt: skip


def benchmark_of(args: Namespace) -> Benchmark:
    """Of these tasks.

    :raises DeftError: for what is no task
    """
    from benchmarks.paper import visualcloze_data

    tasks = [visualcloze_data.task_of(text) for text in args.tasks]
    columns = {title(metric, task.name): (metric, task.name) for task in tasks for metric in of(task.given)}

    def subjects(data: Path) -> Sequence[Subject]:
        from benchmarks.paper.cuts import Cuts

        cuts = Cuts(args.output / "cuts", CONTEXT_SIZE)
        protocol = visualcloze_data.Protocol(
            tuple(args.tasks), args.context, args.train_rows, args.rows, args.instruction
        )
        found = visualcloze_data.subjects(data, cuts, protocol)
        if not args.dry_run:
            cuts.make()
        return found

    return Benchmark(
        name=f"VisualCloze, {args.context} rows in context",
        subjects=subjects,
        data=Source("Graph200K, unpacked by VisualCloze's processing.py",
                    "https://huggingface.co/datasets/VisualCloze/Graph200K", "Apache-2.0"),
        metrics=tuple(name for name in METRICS if any(name == metric for metric, _ in columns.values())),
        steps=STEPS,
        size=SIZE,
        published=tuple(one for one in published() if one.figures.keys() <= columns.keys()),
        columns=columns,
        notes=(
            "the instructions are this project's: those of the paper's authors were not found",
            "VisualCloze's own figures: which CLIP, which depth estimator and how many pictures is not known",
        ),
        sets_each=True,
    )  # fmt: skip


def of(given: Sequence[str]) -> list[str]:
    """The metrics of a task with these conditions."""
    return [name for name in METRICS if OF_ONE_TASK.get(name) in (None, *given)]


def title(metric: str, task: str) -> str:
    """Of a column about one task."""
    return f"{ALL[metric].title}, {task}"


def published() -> Iterator[Published]:
    """Others' figures, by the columns of their task."""
    for task, metrics, source, methods in FIGURES:
        for method, values in methods.items():
            figures = {title(name, task): value for name, value in zip(metrics, values, strict=True)}
            yield Published(method, figures, source, OWN.get(method, ""))


def main(argv: Sequence[str] | None = None) -> int:
    """:returns: the exit status"""
    return command.main(str(__doc__), METRICS, benchmark_of, add_options, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
