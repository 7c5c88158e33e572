"""Which adapter learns a new thing and forgets least? On the shipped model: `python benchmarks/personalization.py`.

    python benchmarks/personalization.py                              # a GPU: twenty concepts, three seeds
    python benchmarks/personalization.py --reduced --jobs 2           # a CPU with two cores
    python benchmarks/personalization.py --adapters lora --deft "ratio=0.1" "basis=relu dim=4"

Every adapter is trained for the same steps on the same pictures and noise, with as many parameters as a LoRA of rank 8
(or as near as its sizes allow), at every rate of one grid on tuning concepts. The rate with the highest likeness whose
old-world accuracy has fallen by at most 0.1 is its best, which is trained on the test concepts; some adapters at
other rates as well (`BESIDE`), so that they can be compared at equal likeness. All adapters are merged into the
weights before they are measured. Each finished run is written to the results at once; runs that are there are not
repeated. Tables and plots: `personalization_plot.py`, also by itself.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import sys
import time
import traceback
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import diffusers
import peft
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import personalization_adapters as table  # noqa: E402
import personalization_measure as measuring  # noqa: E402
import personalization_plot as plot  # noqa: E402
import personalization_train as training  # noqa: E402

RESULTS = Path(__file__).parent / "results"
DROP = 0.1  # of old-world accuracy that a best rate may cost
RATES = (1e-4, 3e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2e-2, 4e-2)
FULL = {"adapters": ["lora", "dora", "oft", "peft-deft", "para", "full", "deft"],
        "deft": ["removal=1", "removal=0.3", "keep=64", "keep=32", "keep=16"], "rates": list(RATES),
        "concepts": 20, "skip": 0, "tuning": 2, "seeds": 3,
        "steps": 250, "pictures": 12, "tuning_pictures": 6, "sampling": 25}  # fmt: skip
# rates that are tested beside the best: LoRA's make the curve that the others are compared with
BESIDE = {"lora": (1e-3, 2.5e-3, 3.5e-3, 5e-3, 1e-2), "deft": (5e-3, 1e-2, 2e-2), "deft removal=1": (5e-3, 1e-2),
          "deft keep=64": (2e-2, 4e-2), "para": (3e-4,), "dora": (2.5e-3,),
          "full": (3e-4,)}  # fmt: skip
REDUCED = FULL | {"adapters": ["lora", "deft", "dora"], "deft": [], "rates": [5e-3, 2e-2], "concepts": 2, "tuning": 0,
                  "seeds": 1, "steps": 100, "pictures": 4}  # fmt: skip
QUICK = REDUCED | {"adapters": ["lora", "deft"], "rates": [2.5e-3], "steps": 2, "pictures": 1,
                   "sampling": 2}  # fmt: skip
FIXED = ("steps", "pictures", "tuning_pictures", "sampling")  # results of other numbers do not belong into one file

Job = dict[str, Any]  # adapter, size, rate, seed, concepts, pictures
Finished = tuple[dict[str, dict], dict[str, Tensor], str]  # runs and pictures by key, and why there are none


# --- runs ------------------------------------------------------------------------------------------------------------


def key_of(adapter: str, rate: float, concepts: Sequence[int], seed: int) -> str:
    """A run's name in the results."""
    return f"{adapter}|{rate:g}|{'+'.join(map(str, concepts))}|{seed}"


def pairs_of(concepts: Sequence[int]) -> list[list[int]]:
    """Those that are composed."""
    return [list(concepts[i : i + 2]) for i in range(0, len(concepts) - 1, 2)]


def keys_of(job: Job) -> list[str]:
    """A job's runs: each concept, and two by two composed."""
    groups = [[c] for c in job["concepts"]] + pairs_of(job["concepts"])
    return [key_of(job["adapter"], job["rate"], group, job["seed"]) for group in groups]


_bench: measuring.Bench | None = None  # a process's own model and judge
_queue: Any = None  # to the main process


def begin_worker(queue: Any, args: argparse.Namespace) -> None:
    """In each process: its device."""
    global _queue
    _queue = queue
    if args.device == "cuda":
        identity = multiprocessing.current_process()._identity
        torch.cuda.set_device((identity[0] if identity else 0) % torch.cuda.device_count())
    else:
        torch.set_num_threads(1)


def work(jobs: list[Job], args: argparse.Namespace) -> None:
    """Jobs of one adapter on the same concepts, each reported when it is done; a failure costs these and no others."""
    done = 0
    try:
        for outcome in work_on(jobs, args):
            _queue.put((*outcome, ""))
            done += 1
    except Exception:
        for job in jobs[done:]:
            why = f"{job['adapter']} at {job['rate']:g} failed\n{traceback.format_exc()}" if job is jobs[done] else ""
            _queue.put(({}, {}, why))


def work_on(jobs: list[Job], args: argparse.Namespace) -> Iterator[tuple[dict[str, dict], dict[str, Tensor]]]:
    """Trains a job's concepts side by side and measures them; runs and the first seed's pictures, by key."""
    global _bench
    if _bench is None:
        _bench = measuring.Bench(args.device, args.sampling)
    group = training.Group(jobs[0]["adapter"], jobs[0]["size"], _bench.unet)
    concepts = jobs[0]["concepts"]
    words = [measuring.WORDS[i % 2] for i in range(len(concepts))]
    for job in jobs:
        start = time.time()
        sets = [training.data_set(_bench.model, concept, word, job["seed"], args.steps)
                for concept, word in zip(concepts, words, strict=True)]  # fmt: skip
        trained = group.train(job["rate"], sets)
        seconds = (time.time() - start) / len(concepts)
        found: dict[str, dict] = {}
        pictures: dict[str, Tensor] = {}
        same = {name: job[name] for name in ("adapter", "rate", "seed")}
        for concept, word, outcome in zip(concepts, words, trained, strict=True):
            start = time.time()
            key = key_of(job["adapter"], job["rate"], [concept], job["seed"])
            found[key], pictures[key] = _bench.measure(outcome, concept, word, job["seed"], job["pictures"])
            found[key] |= {"training_seconds": seconds, "measuring_seconds": time.time() - start}
            found[key] |= same | {"size": job["size"], "concept": concept}
        for i, pair in enumerate(pairs_of(concepts)):
            key = key_of(job["adapter"], job["rate"], pair, job["seed"])
            found[key] = (
                _bench.compose(trained[2 * i : 2 * i + 2], pair, job["seed"], job["pictures"])
                | same
                | {"concepts": pair}
            )
        yield found, pictures if job["seed"] == 0 else {}


class Results:
    """The file: written whole after every chunk. Pictures lie beside the repository's files, in output/."""

    def __init__(self, path: Path, pictures: Path, args: argparse.Namespace):
        self.path, self.pictures = path, pictures
        self.failed = False
        settings = {name: getattr(args, name) for name in FIXED}
        self.data: dict[str, Any] = {"settings": settings, "adapters": {}, "runs": {}}
        if path.is_file():
            self.data = json.loads(path.read_text(encoding="utf-8"))
            if self.data["settings"] != settings:
                sys.exit(f"error: {path} is of {self.data['settings']}, not {settings}: give another --output")
        device = torch.cuda.get_device_name() if args.device == "cuda" else f"cpu, {platform.processor() or 'one core'}"
        versions = {"torch": torch.__version__, "diffusers": diffusers.__version__, "peft": peft.__version__}
        machine = {"device": device, "python": platform.python_version(), **versions}
        if machine not in self.data.setdefault("machines", []):
            self.data["machines"].append(machine)

    def add(self, runs: dict[str, dict], pictures: dict[str, Tensor]) -> None:
        """Takes over finished runs, and the contact sheet's pictures."""
        self.data["runs"] |= runs
        self.save()
        shown = {str(concept) for concept in self.data["concepts"]["test"][: plot.SHOWN_CONCEPTS]}
        pictures = {key: found for key, found in pictures.items() if key.split("|")[2] in shown}
        if pictures:
            kept = load_file(self.pictures) if self.pictures.is_file() else {}
            self.pictures.parent.mkdir(parents=True, exist_ok=True)
            save_file(kept | pictures, self.pictures)

    def save(self) -> None:
        """Whole or not at all."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(json.dumps(self.data, indent=1) + "\n", encoding="utf-8")
        partial.replace(self.path)


def run_all(series: list[list[Job]], results: Results, args: argparse.Namespace) -> None:
    """All jobs of which a run is missing; each series in one process."""
    known = results.data["runs"].keys()
    tasks = [[job for job in jobs if not known >= set(keys_of(job))] for jobs in series]
    tasks = [jobs for jobs in tasks if jobs]
    start, total = time.time(), sum(len(job["concepts"]) for jobs in tasks for job in jobs)
    if not total:
        return
    print(f"{total} trainings in {len(tasks)} series", flush=True)
    done = 0

    def finished(outcome: Finished) -> None:
        nonlocal done
        results.add(*outcome[:2])
        if outcome[2]:
            results.failed = True
            print(outcome[2], file=sys.stderr, flush=True)
        done += sum("likeness" in run for run in outcome[0].values())
        for key, run in outcome[0].items():
            if "likeness" in run:
                shown = ("likeness_share", "follow", "old", "drift")
                print(f"[{time.time() - start:5.0f} s {done}/{total}] {key}: "
                      + ", ".join(f"{name} {run[name]:.3f}" for name in shown), flush=True)  # fmt: skip

    os.environ.setdefault("OMP_NUM_THREADS", "1")
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    with context.Pool(args.jobs, begin_worker, (queue, args)) as pool:
        for jobs in tasks:
            pool.apply_async(work, (jobs, args))
        for _ in range(sum(map(len, tasks))):
            finished(queue.get())


def series_of(
    adapters: dict[str, dict],
    rates: dict[str, list[float]],
    concepts: list[int],
    args: argparse.Namespace,
    seeds: int,
    pictures: int,
) -> list[list[Job]]:
    """Every adapter at its rates on all concepts, so many side by side, from every seed; and the base model."""
    grid = [("none", 0, [0.0])] + [(name, a["size"], rates[name]) for name, a in adapters.items() if rates[name]]
    return [
        [
            {
                "adapter": name,
                "size": size,
                "rate": rate,
                "seed": seed,
                "pictures": pictures,
                "concepts": concepts[i : i + args.lanes],
            }
            for rate in rates
            for seed in range(seeds)
        ]
        for name, size, rates in grid
        for i in range(0, len(concepts), args.lanes)
    ]


# --- the bench -------------------------------------------------------------------------------------------------------


def best_rates(runs: dict[str, dict], adapters: Sequence[str], concepts: Sequence[int]) -> dict[str, float]:
    """The rate of highest likeness among those that cost at most DROP of old-world accuracy; else the cheapest."""
    chosen = {}
    base = plot.mean_of(runs, "none", 0.0, concepts, "old")
    for name in adapters:
        rates = sorted({run["rate"] for run in runs.values() if run["adapter"] == name and "concept" in run})
        found = [(rate, plot.mean_of(runs, name, rate, concepts, "old")) for rate in rates]
        found = [(rate, old) for rate, old in found if old == old]
        cheap = [rate for rate, old in found if old >= base - DROP]
        if cheap:
            chosen[name] = max(cheap, key=lambda rate: plot.mean_of(runs, name, rate, concepts, "likeness_share"))
        elif found:
            chosen[name] = max(found, key=lambda pair: pair[1])[0]
    return chosen


def bench(args: argparse.Namespace, results: Results) -> None:
    """Both stages."""
    labels = args.adapters + [f"deft {spec}" for spec in args.deft]
    known = results.data["adapters"]
    for name in labels:
        if name not in known:
            known[name] = table.matched(name)
            print(f"{name}: size {known[name]['size']}, {known[name]['parameters']:,} parameters", flush=True)
    adapters = {name: known[name] for name in labels}
    tuning, test = measuring.concept_seeds(args.tuning, args.skip + args.concepts)
    test = test[args.skip :]
    results.data["concepts"] = {"tuning": tuning, "test": test}
    rates = dict.fromkeys(labels, sorted(args.rates))
    if tuning:
        run_all(series_of(adapters, rates, tuning, args, 1, args.tuning_pictures), results, args)
        best = best_rates(results.data["runs"], labels, tuning)
        labels = [name for name in labels if name in best]
        adapters = {name: known[name] for name in labels}
        rates = {name: [best[name]] for name in labels}
        beside = {name: [rate for rate in BESIDE.get(name, ()) if rate != best[name]] for name in labels}
        for name in labels:
            at_edge = len(args.rates) > 1 and best[name] in (min(args.rates), max(args.rates))
            print(f"{name}: best rate {best[name]:g}{', at the edge of the grid' if at_edge else ''}", flush=True)
    run_all(series_of(adapters, rates, test, args, args.seeds, args.pictures), results, args)
    if tuning:  # best rates first, in case that time is short
        run_all(series_of(adapters, beside, test, args, args.seeds, args.pictures), results, args)
    best = best if tuning else best_rates(results.data["runs"], labels, test)
    results.data["best"] = results.data.get("best", {}) | best
    results.save()


def arguments() -> argparse.Namespace:
    """From the command line, with the numbers of the chosen form where nothing is given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    form = parser.add_mutually_exclusive_group()
    form.add_argument("--reduced", action="store_true", help="under ten minutes on two CPU cores, with --jobs 2")
    form.add_argument("--quick", action="store_true", help="two steps of everything: the code path only")
    parser.add_argument("--adapters", nargs="*", choices=list(table.ADAPTERS))
    parser.add_argument(
        "--deft",
        nargs="*",
        metavar="'KEY=VALUE ...'",
        help="variants: network_args; keep=N: N directions, shapes=M: of M shapes",
    )
    parser.add_argument("--rates", nargs="+", type=float)
    for name, meaning in (("concepts", "to test on"), ("skip", "concepts before them, which are left out"),
                          ("tuning", "concepts to choose rates on; 0: the tested"), ("seeds", "trainings of each"),
                          ("steps", "of a training"), ("pictures", "of each kind of prompt"),
                          ("tuning_pictures", "the same while rates are chosen"),
                          ("sampling", "steps of a picture")):  # fmt: skip
        parser.add_argument(f"--{name}", type=int, help=meaning)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--jobs", type=int, help="processes (by default one a GPU: several on one slow each other)")
    parser.add_argument("--lanes", type=int, default=0, help="trainings side by side in a process (GPU: 10, CPU: 2)")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--pictures_file", type=Path, help="for the contact sheet")
    parser.add_argument("--figures", type=Path, help="folder of the plot and the contact sheet")
    args = parser.parse_args()
    if args.adapters is not None and args.deft is None:
        args.deft = []
    name = "quick" if args.quick else "reduced" if args.reduced else "full"
    for option, value in {"quick": QUICK, "reduced": REDUCED, "full": FULL}[name].items():
        if getattr(args, option) is None:
            setattr(args, option, value)
    temporary = ROOT / "output" / "personalization"
    args.jobs = args.jobs or (torch.cuda.device_count() if args.device == "cuda" else 1)
    args.lanes = args.lanes or (10 if args.device == "cuda" else 2)
    suffix = "" if name == "full" else f"-{name}"
    args.output = args.output or (temporary if args.quick else RESULTS) / f"personalization{suffix}.json"
    args.pictures_file = args.pictures_file or plot.pictures_of(args.output)
    args.figures = args.figures or plot.figures_of(args.output)
    return args


def main() -> int:
    """Runs what is missing, then prints the tables and draws the figures; 1 when a run has failed."""
    args = arguments()
    results = Results(args.output, args.pictures_file, args)
    bench(args, results)
    plot.report(results.data, args.figures, args.pictures_file)
    return int(results.failed)


if __name__ == "__main__":
    sys.exit(main())
