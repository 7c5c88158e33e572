"""Which save of a training that was too long? The trainer's meters name one; the judge says what it is worth.

    python benchmarks/meters.py --jobs 10        # a GPU: five creatures in four kinds of training, and what meters cost
    python benchmarks/meters.py --creatures 1 --kinds keep --steps 60 --saves 4 --pictures 32 --pairs 0    # a CPU

Every training is the quickstart's but for its pictures, its seed and three times its steps: 750 where it takes 250, as
`personalization.py` does. A kind changes what its name says. Of every save the judge tells the likeness of pictures of
the creature, and what is right in pictures of the old world, from the same prompts and noise for all saves. Beside the
save that the trainer names stand those that other rules would take. Writes results/meters.json and draws the figure
(`meters_plot.py`, also by itself); trainings and judgements that are there are not repeated. Further options go to the
trainer.
"""

from __future__ import annotations

import argparse
import functools
import json
import multiprocessing
import os
import platform
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import meters_plot as plot  # noqa: E402
import personalization_measure as measuring  # noqa: E402
import personalization_train as training  # noqa: E402

import train_network_deft  # noqa: E402
from library.options.parse import parse  # noqa: E402
from library.options.rooms import ObjectiveOptions  # noqa: E402
from library.training import naming, record  # noqa: E402
from library.training.loop import TrainingLoop  # noqa: E402
from library.training.objective import Diffusion  # noqa: E402
from library.training.record import Record  # noqa: E402
from library.world import draw, judge, measure  # noqa: E402
from networks import deft, deft_io  # noqa: E402

RESULTS = Path(__file__).parent / "results" / "meters.json"
CONFIG = ROOT / "configs" / "quickstart" / "creature.toml"
KEEP = ROOT / "configs" / "quickstart" / "keep.txt"
WORD = "sks"
ENOUGH = 250  # steps of the quickstart, and of personalization.py
TOO_LONG = 3
OLD = ("colour", "shape", "background")
NOISE = 50_000  # first seed of the judged pictures
LEVELS = 8  # timesteps that the bench's own losses are measured at
WITHOUT = ("--meter_every_n_steps", "0")


Wanted = tuple[str, int]  # a kind of training, and a creature


@dataclass(frozen=True)
class Kind:
    """What a training has beside the quickstart's settings.

    :param keep: whether `keep` is given; the meters measure drift on the same prompts anyway
    """

    rate: float = 2e-2
    keep: bool = False
    schedule: str = "cosine"

    def options(self, prompts: Path) -> list[str]:
        """Of the trainer."""
        given = ["conv_dim=8", "conv_alpha=8"] + ([f"keep={prompts}"] if self.keep else [])
        rate, schedule = ["--learning_rate", f"{self.rate:g}"], ["--lr_scheduler", self.schedule]
        return ["--network_args", *given, *rate, *schedule]


KINDS = {"default": Kind(), "high": Kind(rate=6e-2), "keep": Kind(keep=True),
         "constant": Kind(schedule="constant_with_warmup")}  # fmt: skip


def own_folder(args: argparse.Namespace, kind: str, creature: int) -> Path:
    """Of a training's files."""
    return args.work / f"{kind}-{creature}"


def write_pictures(folder: Path, creature: int) -> Path:
    """A creature's training pictures, as `personalization.py` has them, in the trainer's layout."""
    inner = folder / f"20_{WORD}"
    inner.mkdir(parents=True, exist_ok=True)
    for i, (pixels, caption) in enumerate(zip(*training.training_pictures(creature, WORD), strict=True)):
        draw.to_image(pixels).save(inner / f"{i}.png")
        (inner / f"{i}.txt").write_text(f"{caption}\n", encoding="utf-8")
    return folder


def argv_of(args: argparse.Namespace, kind: str, creature: int, folder: Path, steps: int) -> list[str]:
    """The trainer's command line: the quickstart's, without samples."""
    pictures = write_pictures(args.work / f"pictures-{creature}", creature)
    return [
        "--config_file", str(CONFIG), "--train_data_dir", str(pictures), "--pretrained_model_name_or_path",
        str(measure.MODEL), "--output_dir", str(folder), "--output_name", WORD, "--logging_dir", str(folder / "logs"),
        "--sample_prompts", str(CONFIG.parent / "creature_prompts.txt"), "--sample_every_n_steps", str(10**6),
        "--max_train_steps", str(steps), "--seed", str(creature), "--console_log_level", "WARNING",
        *KINDS[kind].options(args.prompts), *args.rest,
    ]  # fmt: skip


# --- a training and the judge's word on its saves --------------------------------------------------------------------

_bench: measuring.Bench | None = None  # a process's own model and judge


def begin(args: argparse.Namespace) -> None:
    """In each process."""
    global _bench
    torch.set_num_threads(1)
    _bench = measuring.Bench(args.device, args.sampling)


def begin_worker(args: argparse.Namespace) -> None:
    """What it says stands in a file of its own."""
    args.work.mkdir(parents=True, exist_ok=True)
    sys.stderr = open(args.work / f"process-{os.getpid()}.log", "w", encoding="utf-8")  # noqa: SIM115
    begin(args)


def train(args: argparse.Namespace, kind: str, creature: int) -> tuple[Path, float]:
    """The folder of a training with its saves and the record that they were named by, and its seconds; 0 where it was
    there."""
    folder, start, best = own_folder(args, kind, creature), time.perf_counter(), naming.best
    if (folder / record.FILE).is_file():
        return folder, 0.0

    def overheard(found: Record, where: Path) -> naming.Best | None:
        found.write(where)
        return best(found, where)

    naming.best = overheard
    try:
        argv = argv_of(args, kind, creature, folder, args.steps)
        train_network_deft.train(parse([*argv, "--save_every_n_steps", str(args.steps // args.saves)]))
    finally:
        naming.best = best
    return folder, time.perf_counter() - start


@dataclass(frozen=True)
class Judged:
    """Of each picture."""

    likeness: list[float]
    old: list[float]

    @staticmethod
    def of(bench: measuring.Bench, eye: measuring.Eye, number: int) -> Judged:
        """Of the model as it is merged."""
        known = measure.known_scenes(number)
        prompts = [*measure.concept_prompts(WORD, number), *(text for _, text in known)]
        readings, _ = bench.read(prompts, NOISE)
        agreed = [judge.agreement(scene, found) for (scene, _), found in zip(known, readings[number:], strict=True)]
        return Judged(
            [eye.like(found) for found in readings[:number]],
            [statistics.mean(one[name] for name in OLD) for one in agreed],
        )


class Losses:
    """The bench's own: of a creature's training pictures at fixed noise, apart for each timestep."""

    def __init__(self, bench: measuring.Bench, creature: int):
        pixels, captions = training.training_pictures(creature, WORD)
        scheduler = bench.model.noise_scheduler()
        objective = Diffusion(ObjectiveOptions(), scheduler)
        steps = scheduler.config.num_train_timesteps
        with torch.no_grad():
            latents = bench.pipeline.vae.encode(pixels.to(bench.device)).latent_dist.mean.cpu()
            text = bench.model.encode_text(captions)["hidden"]
        every = (latents * bench.model.vae.config.scaling_factor).repeat_interleave(LEVELS, 0)
        timesteps = torch.tensor([int((i + 0.5) / LEVELS * steps) for i in range(LEVELS)]).repeat(len(latents))
        noise = torch.randn(every.shape, generator=torch.Generator().manual_seed(creature))
        noised = objective.at(every, noise, timesteps)
        text = text.repeat_interleave(LEVELS, 0)
        self.inputs = noised.noisy.to(bench.device), noised.timesteps.to(bench.device), text
        self.target, self.bench = noised.target.to(bench.device), bench

    @torch.no_grad()
    def __call__(self) -> list[float]:
        """Of each timestep, from little noise to much; of the model as it is merged."""
        off = self.bench.merged(*self.inputs, return_dict=False)[0] - self.target
        return off.square().flatten(1).mean(1).view(-1, LEVELS).mean(0).tolist()


def merge(bench: measuring.Bench, file: Path) -> float:
    """Puts a saved adapter, as any program reads it, into the weights; returns the bench's drift."""
    adapter = deft_io.read_adapter(file)
    bench.merge()
    network = deft.network_of_adapter(1.0, adapter, [], bench.merged, for_inference=True)
    with torch.no_grad():
        network.merge_to([], bench.merged, adapter.tensors)
    off = bench._predict() - bench.base_predictions
    return float(off.square().sum() / bench.base_predictions.square().sum())


def run(args: argparse.Namespace, kind: str, creature: int) -> dict[str, Any]:
    """Trains, and judges every save."""
    assert _bench is not None
    folder, seconds = train(args, kind, creature)
    told = Record.read(folder)
    best = naming.best(told, folder)
    if best is None:
        raise RuntimeError(f"{folder}: the trainer has named no save")
    start, eye = time.perf_counter(), _bench.eye(creature)
    losses = Losses(_bench, creature)
    _bench.merge()
    base, base_losses = Judged.of(_bench, eye, args.pictures), losses()
    drifts, found, lost = {}, {}, {}
    for file in told.files:
        drifts[file.step] = merge(_bench, folder / file.name)
        found[file.step], lost[file.step] = Judged.of(_bench, eye, args.pictures), losses()
    last = found[args.steps]
    saves = [
        {"step": step, "likeness": measure.share(of.likeness), "old": measure.share(of.old),
         "likeness_less": difference(last.likeness, of.likeness), "old_more": difference(of.old, last.old),
         "bench_drift": drifts[step], "losses": lost[step]}
        for step, of in sorted(found.items())
    ]  # fmt: skip
    return {
        "kind": kind, "creature": creature, "named": best.file.step, "of_renders": eye.of_renders,
        "base": {"likeness": measure.share(base.likeness), "old": measure.share(base.old), "losses": base_losses},
        "saves": saves, "curves": {name: asdict(told.curves[name]) for name in (plot.LEARNT, plot.DRIFT)},
        "training_seconds": seconds, "judging_seconds": time.perf_counter() - start,
    }  # fmt: skip


def difference(a: Sequence[float], b: Sequence[float]) -> dict[str, float]:
    """a - b of paired values: mean, and half the width of its 95% interval."""
    return measure.share([x - y for x, y in zip(a, b, strict=True)])


# --- what the meters cost --------------------------------------------------------------------------------------------


def timed(args: argparse.Namespace, name: str, options: Sequence[str]) -> dict[str, float]:
    """Seconds of a quickstart-long training: of all of it, and of its steps with what is measured between them; and of
    the processor's, which other programs on the machine do not add to."""
    seconds, plain = {}, TrainingLoop.run

    def run_timed(loop: TrainingLoop) -> None:
        start = time.perf_counter(), time.process_time()
        plain(loop)
        seconds["steps"], seconds["steps_cpu"] = time.perf_counter() - start[0], time.process_time() - start[1]

    TrainingLoop.run = run_timed  # type: ignore[method-assign]
    try:
        start = time.perf_counter(), time.process_time()
        argv = argv_of(args, "default", args.creature_seeds[0], args.work / name, args.cost_steps)
        train_network_deft.train(parse([*argv, *options]))
        seconds["all"], seconds["all_cpu"] = time.perf_counter() - start[0], time.process_time() - start[1]
    finally:
        TrainingLoop.run = plain  # type: ignore[method-assign]
    return seconds


def cost(args: argparse.Namespace) -> dict[str, Any]:
    """Trainings with and without meters in turn, in this process and alone, after one that counts for nothing."""
    sides: dict[str, Sequence[str]] = {"with": (), "without": WITHOUT}
    timed(args, "cost-with", ())
    pairs = []
    for i in range(args.pairs):
        order = list(sides) if i % 2 == 0 else list(reversed(sides))
        pairs.append({name: timed(args, f"cost-{name}", sides[name]) for name in order})
        print(f"pair {i}: {pairs[-1]}", flush=True)
    shares = {
        part: measure.share([pair["with"][part] / pair["without"][part] - 1 for pair in pairs])
        for part in ("all", "all_cpu", "steps", "steps_cpu")
    }
    return {"steps": args.cost_steps, "pairs": pairs, "share": shares}


# --- the bench -------------------------------------------------------------------------------------------------------


def arguments() -> argparse.Namespace:
    """From the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--creatures", type=int, default=5, help="each from a seed of its own")
    parser.add_argument("--kinds", nargs="+", choices=list(KINDS), default=list(KINDS))
    parser.add_argument("--steps", type=int, default=TOO_LONG * ENOUGH)
    parser.add_argument("--saves", type=int, default=25)
    parser.add_argument("--pictures", type=int, default=96, help="of the creature, and as many of the old world")
    parser.add_argument("--sampling", type=int, default=measure.STEPS, help="steps of a picture")
    parser.add_argument("--tuning", action="store_true", help="on creatures by which settings may be chosen")
    parser.add_argument("--pairs", type=int, default=4, help="trainings with and without meters; 0: no cost")
    parser.add_argument("--cost_steps", type=int, default=ENOUGH)
    parser.add_argument("--prompts", type=Path, default=KEEP, help="whose pictures are kept, and drift is measured on")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    parser.add_argument("--work", type=Path, default=ROOT / "output" / "meters", help="folder of the trainings")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--figure", type=Path, default=ROOT / "docs" / "meters.png")
    args, args.rest = parser.parse_known_args()
    if args.steps % args.saves:
        parser.error(f"--saves {args.saves}: does not divide --steps {args.steps}")
    tuning, test = measuring.concept_seeds(*((args.creatures, 0) if args.tuning else (0, args.creatures)))
    args.creature_seeds = tuning + test
    return args


def run_all(args: argparse.Namespace, wanted: list[Wanted]) -> Iterator[tuple[Wanted, dict[str, Any] | None]]:
    """Each as it is done, with one job in this process; None for one that has failed, which costs no other."""

    def done(one: Wanted, get: Callable[[], dict[str, Any]]) -> tuple[Wanted, dict[str, Any] | None]:
        try:
            return one, get()
        except Exception:
            print(f"{one} failed\n{traceback.format_exc()}", file=sys.stderr, flush=True)
            return one, None

    if wanted and args.jobs == 1:
        begin(args)
        yield from (done(one, functools.partial(run, args, *one)) for one in wanted)
    elif wanted:
        with ProcessPoolExecutor(args.jobs, multiprocessing.get_context("spawn"), begin_worker, (args,)) as pool:
            tasks = {pool.submit(run, args, *one): one for one in wanted}
            yield from (done(tasks[task], task.result) for task in as_completed(tasks))


def main() -> int:
    """Runs what is missing, then prints the tables and draws the figure; 1 when a training has failed."""
    args = arguments()
    device = torch.cuda.get_device_name() if args.device == "cuda" else "cpu"
    result: dict[str, Any] = {
        "device": device, "python": platform.python_version(), "torch": torch.__version__,
        "diffusers": diffusers.__version__, "transformers": transformers.__version__, "steps": args.steps,
        "pictures": args.pictures, "creatures": args.creature_seeds, "kinds": {k: asdict(KINDS[k]) for k in args.kinds},
        "runs": {},
    }  # fmt: skip
    if args.output.is_file():
        before = json.loads(args.output.read_text(encoding="utf-8"))
        same = all(before[name] == result[name] for name in ("device", "steps", "pictures"))
        result |= {name: before[name] for name in ("runs", "cost") if same and name in before}

    def write() -> None:
        partial = args.output.with_suffix(".partial")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        partial.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        partial.replace(args.output)

    wanted = [(kind, creature) for kind in args.kinds for creature in args.creature_seeds]
    failed = False
    for one, found in run_all(args, [one for one in wanted if plot.key_of(*one) not in result["runs"]]):
        failed |= found is None
        if found is not None:
            result["runs"][plot.key_of(*one)] = found
            write()
            print(plot.told(found), flush=True)
    if args.pairs and "cost" not in result:
        result["cost"] = cost(args)
    write()
    plot.report(result, args.figure)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
