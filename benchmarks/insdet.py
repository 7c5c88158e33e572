"""Objects and scenes of InsDet, learnt from some of their pictures and compared with others.

    python benchmarks/insdet.py --what objects --data InsDet-FULL --model MODEL --output out/objects \\
        --clip clip-vit-base-patch32 --dino dino-vits16 --dinov2 dinov2-small --dry_run

What is needed, what is compared, and what the paper's authors do otherwise: docs/benchmarks.md.
"""

from __future__ import annotations

import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.paper import command
from benchmarks.paper.metrics import METRICS as ALL
from benchmarks.paper.plan import Benchmark, Source, Subject

METRICS = ("clip_i", "dino", "dinov2", "clip_t")
OF_SCENES = ("div", "fd_dinov2", "kid")
SIZE, STEPS = 512, 500


def add_options(parser: ArgumentParser) -> None:
    """InsDet's own."""
    insdet = parser.add_argument_group("InsDet")
    insdet.add_argument("--what", choices=("objects", "scenes"), default="objects", help="(default: objects)")
    insdet.add_argument("--objects", default="20", metavar="N|all|'NAME ...'", help="which objects: so many of them, "
                        "evenly spread, or these (default: 20)")  # fmt: skip
    insdet.add_argument("--reference", action="store_true", help="OmniGen is also shown the first picture that was "
                        "trained on, as by the paper's authors")  # fmt: skip


def benchmark_of(args: Namespace) -> Benchmark:
    """Of objects or of scenes."""
    of_scenes = args.what == "scenes"

    def subjects(data: Path) -> Sequence[Subject]:
        from benchmarks.paper import insdet_data
        from benchmarks.paper.cuts import Cuts

        cuts = Cuts(args.output / "cuts", args.size or SIZE)
        protocol = insdet_data.Protocol(args.objects, args.reference)
        found = insdet_data.WHAT[args.what](data, cuts, protocol)
        if not args.dry_run:
            cuts.make()
        return found

    parts = ("scene", "change", "easy", "hard") if of_scenes else ()
    return Benchmark(
        name=f"InsDet {args.what}",
        subjects=subjects,
        data=Source(
            "InsDet-FULL or InsDet-mini", "https://github.com/insdet/instance-detection", "no licence stated there"
        ),
        metrics=(*METRICS, *OF_SCENES) if of_scenes else METRICS,
        steps=STEPS,
        size=SIZE,
        columns={f"{ALL[metric].title}, {of}": (metric, of) for metric in METRICS for of in parts},
        notes=("the protocol is this project's: neither the authors' captions and split nor their results were found",),
        sets_of="scene" if of_scenes else "",
    )


def main(argv: Sequence[str] | None = None) -> int:
    """:returns: the exit status"""
    return command.main(str(__doc__), (*METRICS, *OF_SCENES), benchmark_of, add_options, argv=argv)


if __name__ == "__main__":
    raise SystemExit(main())
