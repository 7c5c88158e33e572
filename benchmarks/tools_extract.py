"""resize_deft.py and extract_deft.py beside sd-scripts' own: time, processor time, peak memory, and error.

    python benchmarks/tools_extract.py --sd_scripts DIR --python PYTHON --folder /tmp/tools

resize: an adapter for SDXL's U-Net, rank 128 to 32, of every sixth layer of each shape, since theirs takes half an hour
for all; ours with all layers too. extract: rank 32 of two checkpoints of SDXL in float16, with two of each ten
transformer blocks, so that both programs run whole in little memory and time; ours on whole checkpoints too, or both
with --whole, for which theirs needs more than 24 GB of memory. `tools_extract_inputs.py` says what the files hold.
`--folder` takes up to 20 GB. Writes benchmarks/results/tools_extract.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tools
from tools import OURS, Setting, Way

INPUTS = Path(__file__).with_name("tools_extract_inputs.py")
THEIRS = "sd-scripts"
DEPTH = 2


def made(setting: Setting, command: str, *arguments: object) -> str:
    """What a command of the inputs' program prints."""
    words = [sys.executable, str(INPUTS), command, *map(str, arguments)]
    return subprocess.run(words, check=True, text=True, stdout=subprocess.PIPE, env=threads(setting)).stdout


def threads(setting: Setting) -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": str(setting.threads)}


def shapes(setting: Setting) -> Path:
    """SDXL's, by sd-scripts."""
    file = setting.folder / "sdxl.json"
    words = [setting.python, str(tools.INPUTS), "shapes", str(file), "--kind", "sdxl"]
    words += ["--sd_scripts", str(setting.sd_scripts)]
    subprocess.run(words, check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"})
    return file


def row(
    ways: Mapping[str, Way], rounds: int, check: Sequence[object], setting: Setting, said: Mapping[str, Any]
) -> dict[str, Any]:
    """Measures, and compares what was written with what should have been."""
    found = {**said, **tools.summary(tools.interleaved(ways, rounds))}
    if check:
        written = [f"{name}={way.outputs[0]}" for name, way in ways.items()]
        found |= json.loads(made(setting, *check, "--written", *written))  # type: ignore[arg-type]
    return found


def resize(setting: Setting, parsed: argparse.Namespace) -> dict[str, Any]:
    """One file for both."""
    folder, rounds, every = setting.folder, parsed.rounds, parsed.every
    some, whole = folder / f"every_{every}.safetensors", folder / "whole.safetensors"
    made(setting, "lora", some, "--shapes", shapes(setting), "--every", every)
    made(setting, "lora", whole, "--shapes", shapes(setting))
    given = ["--new_rank", "32", "--save_precision", "fp16"]

    def our(model: Path, output: Path) -> Way:
        return tools.ours(setting, "resize_deft.py", *given, "--model", model, "--save_to", output, output=output)

    mine, other, all_layers = (folder / f"resized_{name}.safetensors" for name in ("ours", "theirs", "whole"))
    its = tools.theirs(setting, "resize_lora.py", *given, "--model", some, "--save_to", other, output=other)
    said = {"file": f"U-Net of SDXL, every {every}th layer of each shape, rank 128, fp16"}
    found = {"part": row({OURS: our(some, mine), THEIRS: its}, rounds, ["of_lora", some], setting, said)}
    said = {"file": "U-Net of SDXL, all layers, rank 128, fp16"}
    return found | {"whole": row({OURS: our(whole, all_layers)}, rounds, [], setting, said)}


def extract(setting: Setting, parsed: argparse.Namespace) -> dict[str, Any]:
    """The same pair for both; then ours on a whole one, or, if so asked, both on a whole one alone."""
    folder = setting.folder
    given = ["--dim", "32", "--save_precision", "fp16"]

    def files(name: str) -> list[Path]:
        return [folder / f"{name}_{part}.safetensors" for part in ("org", "tuned")]

    def options(pair: Sequence[Path], output: Path) -> list[str | Path]:
        return [*given, "--model_org", pair[0], "--model_tuned", pair[1], "--save_to", output]

    def our(pair: Sequence[Path], output: Path) -> Way:
        return tools.ours(setting, "extract_deft.py", *options(pair, output), output=output)

    shallow, whole = files(f"depth_{DEPTH}"), files("deep")
    mine, other = folder / "extracted_ours.safetensors", folder / "extracted_theirs.safetensors"
    name = "extract_lora_from_models.py"
    if parsed.whole:
        made(setting, "pair", *whole, "--shapes", shapes(setting))
        ways = {
            OURS: our(whole, mine),
            THEIRS: tools.theirs(setting, name, "--sdxl", *options(whole, other), output=other),
        }
        said = {"files": "SDXL, whole; fp16"}
        return {"whole": row(ways, parsed.rounds, ["of_pair", *whole, "--every", 24], setting, said)}
    made(setting, "pair", *shallow, "--shapes", shapes(setting), "--depth", DEPTH)
    its = tools.theirs(setting, name, output=other)
    script = setting.sd_scripts / "networks" / name
    command = [setting.python, INPUTS, "shallow", str(DEPTH), script, "--sdxl", *options(shallow, other)]
    its = its._replace(command=command)
    said = {"files": f"SDXL, {DEPTH} of each 10 transformer blocks of the U-Net, all else whole; fp16"}
    check = ["of_pair", *shallow, "--every", 4]
    found = {"shallow": row({OURS: our(shallow, mine), THEIRS: its}, parsed.rounds, check, setting, said)}
    remove(shallow)
    made(setting, "pair", *whole, "--shapes", shapes(setting))
    said = {"files": "SDXL, whole; fp16"}
    found["whole"] = row({OURS: our(whole, mine)}, 1, ["of_pair", *whole, "--every", 24], setting, said)
    remove(whole)
    return found


def remove(files: Sequence[Path]) -> None:
    """Room for the next."""
    for file in files:
        file.unlink(missing_ok=True)


def main() -> None:
    """Both, or one."""
    both = {"resize": resize, "extract": extract}
    parser = tools.parser(__doc__, dict.fromkeys(both))  # type: ignore[arg-type]
    parser.add_argument("--every", type=int, default=6, help="of each shape, how many layers there are for one")
    parser.add_argument("--whole", action="store_true", help="extraction of whole checkpoints, by both")
    parsed = parser.parse_args()
    setting = tools.setting_of(parsed)
    result = tools.RESULTS / "tools_extract.json"
    found: dict[str, Any] = json.loads(result.read_text()) if result.exists() else {}
    for name in parsed.rows or both:
        measured = {**tools.machine(setting), "rounds": parsed.rounds, **both[name](setting, parsed)}
        found[name] = {**found.get(name, {}), **measured}
        tools.write_result("tools_extract", found)


if __name__ == "__main__":
    main()
