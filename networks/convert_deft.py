"""Converts adapter files between the forms that programs know, repairs them, and edits what they say of themselves.

    python networks/convert_deft.py cat.safetensors --save_to cat_diffusers.safetensors --to diffusers
    python networks/convert_deft.py cat.safetensors --save_to cat_good.safetensors --repair
    python networks/convert_deft.py cat.safetensors --save_to cat_shared.safetensors \\
        --set trigger="sks cat" --set preview=shot.png --sidecars

FILE is a LoRA, LoCon, LoHa, LoKr, OFT, DoRA or DEFT of any known program. What is written is exact wherever it can be:
the same change of every weight. Where a change is no product of two small matrices, --rank or --energy says how much of
it is kept, and the relative error of each layer is told (--verbose), and stored in the file. Metadata alone (--set,
--unset) leaves every byte of the tensors, so the hashes by which Automatic1111 and Civitai know a file.

A DEFT of removal=1 (save_format=deft) depends on the base model: --base MODEL makes a plain LoRA for that model, and
--removal and --injection set the strength of what it takes out and of what it puts there.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: its folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import argparse
import math
from collections.abc import Mapping, Sequence

from networks import deft_card, deft_conversion, deft_io, deft_pictures, deft_sharing, deft_tools
from networks.deft_config import DeftError
from networks.deft_conversion import FORMATS, Limit, Made


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the tool; its exit code."""
    args = _parser().parse_args(argv)

    def work() -> None:
        file = Path(args.file)
        output = _output(args.save_to, file, args.to)
        edits = bool(args.set or args.unset or args.sidecars or args.model_card)
        making = bool(args.to or args.repair or args.base or args.save_precision or (args.save_to and not edits))
        _check(making, output, vars(args))
        dtype = deft_tools.PRECISIONS.get(args.save_precision)
        if args.repair:
            made = deft_conversion.repaired(file, dtype)
        elif making:
            limit = Limit(args.rank, args.energy, args.base, args.removal, args.injection)
            made = deft_conversion.converted(file, args.to or "kohya", dtype, limit, args.verbose)
        else:
            made = Made({}, deft_io.read_metadata(file), ())
        metadata = deft_sharing.edited(made.metadata, args.set, args.unset)
        for line in made.told:
            print(line)
        if output is not None:
            if making:
                deft_conversion.write(output, made.tensors, metadata, args.to)
            else:
                deft_sharing.write_with_metadata(file, output, metadata)
                print(f"{output}: the tensors of {file.name} byte by byte, so its hash in A1111 and AutoV3 stay")
        if args.sidecars:
            given, pictures = _given(args.set)
            for line in deft_sharing.write_sidecars(output or file, metadata, pictures, given):
                print(line)
        if args.model_card:
            for line in deft_card.write(output or file, metadata, _given(args.set)[1]):
                print(line)

    return deft_tools.run(work)


def _parser() -> argparse.ArgumentParser:
    parser = deft_tools.parser(__doc__)
    parser.add_argument("file", metavar="FILE", help="an adapter: .safetensors, or a peft folder")
    parser.add_argument("--save_to", metavar="OUT", help="what to write: .safetensors; with --to peft a folder")
    parser.add_argument("--to", choices=FORMATS, help="the form (default: kohya's, which most programs read)")
    parser.add_argument("--rank", type=int, metavar="N", help="of layers that cannot be converted exactly")
    parser.add_argument(
        "--energy", type=float, metavar="E", help="instead: the part of the change's squares to keep, 0.99"
    )
    parser.add_argument("--base", metavar="MODEL", help="the base model: a checkpoint, or a Diffusers folder")
    parser.add_argument("--removal", type=float, metavar="X", help="strength of what a DEFT of removal=1 takes out (1)")
    parser.add_argument("--injection", type=float, metavar="Y", help="strength of what a DEFT puts there (1)")
    parser.add_argument("--repair", action="store_true", help="write the file that every client reads right")
    parser.add_argument("--save_precision", choices=deft_tools.PRECISIONS, help="of the tensors (default: as in FILE)")
    friendly = ", ".join([*deft_sharing.FRIENDLY, "preview"])
    parser.add_argument(
        "--set", action="append", default=[], metavar="KEY=VALUE", help=f"metadata: {friendly}, or a key"
    )
    parser.add_argument("--unset", action="append", default=[], metavar="KEY", help="metadata to take out")
    parser.add_argument("--sidecars", action="store_true", help="write the files that UIs read beside it")
    parser.add_argument(
        "--model_card", action="store_true", help="write a page about it: Civitai, README.md of the Hub"
    )
    parser.add_argument("--verbose", action="store_true", help="tell each layer's error")
    return parser


def _check(making: bool, output: Path | None, given: Mapping[str, object]) -> None:
    """:raises DeftError: for options that do not go together"""
    edits = bool(given["set"] or given["unset"])
    if output is None and (making or edits):
        raise DeftError("--save_to: give the file to write; FILE itself is never changed")
    beside = [name for name in ("sidecars", "model_card") if given[name]]
    if not (making or edits or beside):
        raise DeftError(
            "--save_to: give the file to write, with --to, --repair, --base, --set or --unset; or --sidecars or "
            "--model_card"
        )
    if given["repair"] and (given["to"] not in (None, "kohya") or given["base"]):
        raise DeftError("--repair: writes kohya's form of what is there; leave --to and --base away, or convert first")
    if given["to"] == "peft" and beside:
        raise DeftError(f"--{beside[0]}: a peft folder has none")
    for name in ("rank", "energy", "removal", "injection"):
        value = given[name]
        if isinstance(value, float) and not math.isfinite(value):
            raise DeftError(f"--{name} {value}: give a number")
        if value is not None and not (making and not given["repair"]):
            raise DeftError(f"--{name}: has no effect without --to or --base")
    if isinstance(given["rank"], int) and given["rank"] < 1:
        raise DeftError(f"--rank {given['rank']}: give 1 or more")
    if isinstance(given["energy"], float) and not 0 < given["energy"] <= 1:
        raise DeftError(f"--energy {given['energy']}: give a number above 0 and up to 1")


def _output(save_to: str | None, file: Path, to: str | None) -> Path | None:
    if save_to is None:
        return None
    if to != "peft":
        return deft_tools.output_path("--save_to", save_to, [file])
    deft_tools.check_native("--save_to", save_to)
    found = Path(save_to)
    if found.exists() and (not found.is_dir() or any(found.iterdir())):
        raise DeftError(f"--save_to {save_to}: with --to peft, give a folder that is not there yet or empty")
    return found


def _given(settings: Sequence[str]) -> tuple[set[str], Path | None]:
    """The metadata keys that this run sets, and its picture."""
    found = dict(setting.split("=", 1) for setting in settings)
    keys = {deft_sharing.FRIENDLY.get(name.strip(), name.strip()) for name in found}
    picture = found.get("preview")
    return keys | ({deft_pictures.COVER} if picture else set()), Path(picture) if picture else None


if __name__ == "__main__":
    sys.exit(main())
