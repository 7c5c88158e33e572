"""DreamBench++ for every adapter on equal terms: 150 pictures, an adapter each, 9 prompts each.

    python benchmarks/dreambench_plus.py --data dreambench_plus/data --model MODEL --output out \\
        --clip CLIP --dino_vits8 DINO --dinov2 DINOV2 --adapters lora deft --dry_run

Trained on "a photo of SUBJECT" and the one picture, drawn at guidance 7.5 in 100 steps, compared with the one picture.
`--protocol sd15` trains 100 steps at 512 pixels, `sdxl` 500 at 1024, as upstream does its LoRA. With one rate
(upstream's are 1e-4 and 5e-5) all subjects count; with several, four serve to choose each adapter's best and do not.
What was drawn is also written to OUTPUT/samples as upstream's own scripts read it: as JPEG, which upstream compares
and rates, while the tables here are of the pictures as they were drawn.

Ratings by a language model: `--stage report --requests FILE --upstream CHECKOUT` writes what is to be asked, for the
batch interface of whoever is to rate; `--stage report --ratings ANSWERS --rater NAME` reads the answers.
"""

from __future__ import annotations

import json
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.paper import command
from benchmarks.paper.dreambench_plus_data import CATEGORIES, DATA, GROUPS, subjects
from benchmarks.paper.metrics import METRICS as TABLE
from benchmarks.paper.plan import Benchmark, Published
from networks.deft_config import DeftError

if TYPE_CHECKING:
    from benchmarks.paper.settings import Settings

METRICS = ("clip_i", "dinov1", "dinov2", "clip_t")
PROTOCOLS = {"sd15": (100, 512), "sdxl": (500, 1024)}  # upstream's generate_models.py: steps, pixels
RATES = (5e-5, 1e-4, 3e-4, 1e-3)  # upstream's for SDXL and for SD 1.5, and above
NOTES = "notes on arXiv 2509.22793; CLIP-T of a prompt's first sentence"
ABOUT = (
    "a subject has one picture: there is none to compare it with, as an upper anchor",
    "figures are of pictures as they were drawn; upstream's own scripts compare them as JPEG, as in samples/",
)
PUBLISHED = {  # CLIP-T; protocol, method, the adapter of this benchmark that it is
    "sd15": (("Textual Inversion SD 1.5", 0.302, ""), ("DreamBooth SD 1.5", 0.323, "")),
    "sdxl": (("DreamBooth LoRA SDXL", 0.341, "lora"), ("PaRa SDXL", 0.354, "para"), ("DEFT SDXL", 0.361, "deft-none")),
}

RATED = {"DreamBooth LoRA SDXL": 0.865, "DreamBooth SD": 0.721, "Emu2": 0.690, "IP-Adapter ViT-G SDXL": 0.640,
         "Textual Inversion SD": 0.624, "BLIP-Diffusion": 0.495, "IP-Adapter-Plus ViT-H SDXL": 0.413}  # PF  # fmt: skip
RATED_BY = "gpt-4o-2024-05-13; DreamBench++'s leaderboard"


def benchmark_of(args: Namespace) -> Benchmark:
    """DreamBench++ with a protocol's steps and size.

    :raises DeftError: for options that lack others
    """
    if args.requests and not args.upstream:
        raise DeftError("--requests: the prompts are upstream's; give --upstream, a checkout of "
                        "https://github.com/yuangpeng/dreambench_plus")  # fmt: skip
    if (args.requests or args.ratings) and args.stage not in ("all", "report"):
        raise DeftError(f"--stage {args.stage}: requests are written and ratings read at the report")
    if args.ratings and not args.rater:
        raise DeftError("--ratings: tables name who rated; give --rater")
    steps, size = PROTOCOLS[args.protocol]
    published = tuple(
        Published(method, {"clip_t": value}, NOTES, adapter if protocol == args.protocol else "")
        for protocol, rows in PUBLISHED.items()
        for method, value, adapter in rows
    )
    parts = [(metric, part) for metric in METRICS for part in (CATEGORIES if metric == "clip_t" else GROUPS)]
    columns = {f"{TABLE[metric].title} {part}": (metric, part) for metric, part in parts}
    read = partial(subjects, tuning=len(set(args.rates)) > 1)
    return Benchmark("DreamBench++", read, DATA, METRICS, steps, size, guidance=7.5, drawing_steps=100,
                     published=published, columns=columns, hundredfold=METRICS, notes=ABOUT)  # fmt: skip


def add_options(parser: ArgumentParser) -> None:
    """The protocol, and the ratings."""
    own = parser.add_argument_group("DreamBench++")
    own.add_argument("--protocol", choices=PROTOCOLS, default="sd15", help="steps and size, as upstream's for this "
                     "model (default: sd15)")  # fmt: skip
    parser.set_defaults(rates=list(RATES))
    rating = parser.add_argument_group("ratings by a language model, at the report")
    rating.add_argument("--upstream", type=Path, metavar="DIR", help="a checkout of yuangpeng/dreambench_plus, for its "
                        "prompts")  # fmt: skip
    rating.add_argument("--requests", type=Path, metavar="FILE", help="JSONL to be written, in files of at most 190 MB")
    rating.add_argument("--ratings", type=Path, nargs="+", metavar="FILE|DIR", help="answers: JSONL of the batch "
                        "interface, or upstream's data_gpt_rating")  # fmt: skip
    rating.add_argument("--rater", metavar="NAME", help="the model that rates (default of --requests: upstream's, "
                        "gpt-4o-2024-05-13)")  # fmt: skip
    rating.add_argument("--rating_runs", type=int, choices=(1, 2, 3), default=3, help="requests of each (default: 3)")


def finish(args: Namespace, settings: Settings) -> None:
    """Behind the report: upstream's tree of samples, requests, ratings."""
    from benchmarks.paper import ratings
    from benchmarks.paper.dreambench_plus_samples import Drawing, write_samples
    from benchmarks.paper.scored import read
    from benchmarks.paper.tables import shown, table
    from benchmarks.paper.training import run_of
    from networks.deft_io import write_whole

    scored = read(settings.output / "results.json")
    drawing = Drawing(settings.drawing_steps, run_of(settings).process.mixed_precision)
    trees = write_samples(scored, shown(scored), subjects(settings.data), drawing, settings.output / "samples")
    print("samples for upstream's scripts:", *(f"  {tree}" for tree in trees.values()), sep="\n")
    if args.requests:
        rater = args.rater or ratings.MODEL
        for file in ratings.write_requests(trees.values(), args.upstream, rater, args.requests, args.rating_runs):
            print(f"requests for {rater}: {file} ({file.stat().st_size / 1e6:.1f} MB)")
    if args.ratings:
        rated = ratings.rated(args.rater, list(trees.values()), ratings.read_answers(args.ratings))
        others = table(["published method", "PF (not ours)", "rated by; source"],
                       [[name, f"{value:.3f}", RATED_BY] for name, value in RATED.items()])  # fmt: skip
        print(text := f"{ratings.markdown(rated)}\n\n{others}")
        write_whole(settings.output / "ratings.md", f"{text}\n".encode())
        write_whole(settings.output / "ratings.json", json.dumps(ratings.as_json(rated), indent=1).encode())


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; see `command.main`."""
    return command.main(__doc__ or "", METRICS, benchmark_of, add_options, finish, argv)


if __name__ == "__main__":
    sys.exit(main())
