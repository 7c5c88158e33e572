"""The command line that the paper's benchmarks share: what each script adds is its data."""

from __future__ import annotations

import os
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NoReturn

from benchmarks.paper import processes
from benchmarks.paper.labels import ADAPTERS
from benchmarks.paper.metrics import table
from benchmarks.paper.plan import Benchmark
from benchmarks.paper.settings import STAGES, Settings
from networks.deft_config import DeftError

RATES = (1e-4, 3e-4, 1e-3)


class _Parser(ArgumentParser):
    """Raises DeftError instead of printing the whole usage."""

    def error(self, message: str) -> NoReturn:
        raise DeftError(message)


def main(
    description: str,
    metrics: Sequence[str],
    benchmark_of: Callable[[Namespace], Benchmark],
    add_options: Callable[[ArgumentParser], None] | None = None,
    finish: Callable[[Namespace, Settings], None] | None = None,
    argv: Sequence[str] | None = None,
) -> int:
    """Runs a benchmark; 0, 2 for a mistake of the user's, 1 where a training or the machine could not go on, 128 and
    a signal's number.

    :param metrics: all that the benchmark may ask for, whose models get an option each
    :param benchmark_of: from the parsed options; cheap, and reads no file
    :param add_options: the script's own
    :param finish: the script's own doing at the end of `--stage report`, in the first process
    """
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        args = parser_of(description, metrics, add_options).parse_args(argv)
        benchmark = benchmark_of(args)
        settings = _settings(args, benchmark, metrics)
        if args.jobs > 1 and not args.dry_run and "RANK" not in os.environ:
            _check(benchmark, settings)  # a mistake is told once
            return processes.start(args.jobs, argv)
        return _run(args, benchmark, settings, finish)
    except DeftError as error:
        print(f"error: {' '.join(str(error).splitlines())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return 130


def parser_of(
    description: str, metrics: Sequence[str], add_options: Callable[[ArgumentParser], None] | None
) -> ArgumentParser:
    """The options, in the order of `--help`."""
    parser = _Parser(description=description, formatter_class=RawDescriptionHelpFormatter, allow_abbrev=False)
    places = parser.add_argument_group("places, all of them local: nothing is downloaded")
    places.add_argument("--data", type=Path, required=True, metavar="DIR", help="the benchmark's data")
    places.add_argument("--model", type=Path, required=True, metavar="DIR|FILE", help="base model, as the trainer's "
                        "--pretrained_model_name_or_path")  # fmt: skip
    places.add_argument("--output", type=Path, required=True, metavar="DIR", help="where everything is written; the "
                        "same command goes on from what is there")  # fmt: skip
    places.add_argument("--config", type=Path, metavar="TOML", help="further options of the trainer's, as "
                        "configs/flux.toml has them; paths, sizes, rates and steps are the benchmark's")  # fmt: skip
    table.add_options(parser, metrics)
    what = parser.add_argument_group("what is compared")
    what.add_argument("--adapters", nargs="+", metavar="NAME", default=["lora", "deft"],
                      help=f"{', '.join(ADAPTERS)}, or 'deft KEY=VALUE ...' with --network_args "
                      f"(default: lora deft)")  # fmt: skip
    what.add_argument("--rank", type=int, default=4, help="of all of them (default: 4)")
    what.add_argument("--rates", nargs="+", type=float, default=list(RATES), help="learning rates; with several, each "
                      "adapter's best is chosen on tuning subjects (default: %(default)s)")  # fmt: skip
    what.add_argument("--steps", type=int, help="of a training (default: the benchmark's)")
    what.add_argument("--seeds", type=int, default=1, help="trainings of each subject (default: 1)")
    what.add_argument("--size", type=int, help="pixels a side, of training and drawing (default: the benchmark's)")
    what.add_argument("--guidance", type=float, help="of drawing (default: the benchmark's; of FLUX.1 and OmniGen "
                      "the model's own)")  # fmt: skip
    what.add_argument("--drawing_steps", type=int, help="of a picture (default: the benchmark's)")
    what.add_argument("--precision", choices=("no", "bf16", "fp16"), help="as --mixed_precision (default: "
                      "--config's, or no)")  # fmt: skip
    less = parser.add_argument_group("less of it")
    less.add_argument("--images_per_prompt", type=int, help="(default: the benchmark's)")
    less.add_argument("--limit_subjects", type=int, metavar="N", help="the first N, and N to choose rates on")
    less.add_argument("--limit_prompts", type=int, metavar="N", help="the first N of each kind")
    how = parser.add_argument_group("how it runs")
    how.add_argument("--stage", choices=("all", *STAGES), default="all")
    how.add_argument("--jobs", type=int, default=1, metavar="N", help="processes on this machine, one a GPU; or start "
                     "the script with accelerate launch")  # fmt: skip
    how.add_argument("--device", choices=("cuda", "cpu"), help="(default: a GPU where there is one)")
    how.add_argument("--dry_run", action="store_true", help="tells what is needed, what is missing, how much there is "
                     "to do, and ends")  # fmt: skip
    if add_options is not None:
        add_options(parser)
    return parser


def _settings(args: Namespace, benchmark: Benchmark, metrics: Sequence[str]) -> Settings:
    """:raises DeftError: for numbers that cannot be"""
    for name in ("rank", "steps", "seeds", "size", "drawing_steps", "images_per_prompt", "limit_subjects",
                 "limit_prompts", "jobs"):  # fmt: skip
        value = getattr(args, name)
        if value is not None and value < 1:
            raise DeftError(f"--{name} {value}: give at least 1")
    if not all(0 < rate < 1e6 for rate in args.rates):
        raise DeftError(f"--rates {' '.join(map(str, args.rates))}: must be above 0")
    if args.guidance is not None and not 0 <= args.guidance < 1e6:
        raise DeftError(f"--guidance {args.guidance:g}: give 0 or more")
    models = {one.option: getattr(args, one.option) for one in table.models_of(metrics)}
    return Settings(
        data=_whole(args.data), model=args.model, output=_whole(args.output), config=_config(args.config),
        models=models, adapters=tuple(dict.fromkeys(args.adapters)), rank=args.rank,
        rates=tuple(sorted(set(args.rates))), steps=args.steps or benchmark.steps, seeds=args.seeds,
        size=args.size or benchmark.size, guidance=args.guidance,
        drawing_steps=args.drawing_steps or benchmark.drawing_steps, precision=args.precision,
        images_per_prompt=args.images_per_prompt, limit_subjects=args.limit_subjects,
        limit_prompts=args.limit_prompts, device=args.device,
    )  # fmt: skip


def _config(file: Path | None) -> Path | None:
    """As the trainer finds it, which takes names without .toml too."""
    return file.with_name(f"{file.name}.toml") if file and file.suffix != ".toml" and not file.is_file() else file


def _whole(path: Path) -> Path:
    """The same from wherever a later command is given: pictures are known by their paths."""
    return Path(os.path.abspath(path))


def _check(benchmark: Benchmark, settings: Settings) -> None:
    from benchmarks.paper.stages import Room

    Room(benchmark, settings, processes.Alone()).check()


def _run(
    args: Namespace,
    benchmark: Benchmark,
    settings: Settings,
    finish: Callable[[Namespace, Settings], None] | None,
) -> int:
    if args.dry_run:
        from benchmarks.paper import dry_run

        print(dry_run.told(benchmark, settings))
        return 0
    together = processes.join()
    from benchmarks.paper.stages import Room  # behind join: it says which GPU torch is to see
    from library.training.interrupts import EndedAtOnce, Interrupted
    from library.training.saves import TrainingStopped

    try:
        with processes.on(settings.device):
            Room(benchmark, settings, together).run(STAGES if args.stage == "all" else (args.stage,))
        if finish is not None and args.stage in ("all", "report") and together.first:
            finish(args, settings)
    except TrainingStopped as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (Interrupted, EndedAtOnce) as ended:
        print("interrupted: the same command goes on from here", file=sys.stderr)
        return ended.exit_code
    return 0
