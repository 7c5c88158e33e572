"""The tools for files beside sd-scripts' own on the same input: time, processor time, peak memory, and error.

    python benchmarks/tools.py --sd_scripts DIR --python PYTHON --folder /tmp/tools merge_sdxl sum_sdxl

Each way is a process of its own; the ways of a row run in turns, round by round in another order, after the files that
they read have been made (`tools_inputs.py`: real shapes of the models, random values) and what they wrote before is
gone. Processor time and peak are the process's own and its children's, imports included; the peak is resident memory,
and pages of files that it has mapped count. Without names all rows run. `--folder` takes up to 40 GB. Writes
benchmarks/results/tools_ROW.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
INPUTS = ROOT / "benchmarks" / "tools_inputs.py"
OURS = "ours"


class Cost(NamedTuple):
    """What a process took: seconds on the clock, seconds of processors, bytes resident at most."""

    wall: float
    cpu: float
    peak: int


class Way(NamedTuple):
    """One way to do a row's work.

    :param outputs: what it writes, removed before every run
    """

    command: Sequence[str | Path]
    outputs: Sequence[Path] = ()
    environment: Mapping[str, str] = {}
    cwd: Path | None = None


class Setting(NamedTuple):
    """Where the others' tools are, and where big files go."""

    folder: Path
    sd_scripts: Path
    python: str
    threads: int


@dataclass(frozen=True)
class Row:
    """One comparison.

    :param inputs: arguments of `tools_inputs.py` that make what it reads; `shapes` is run by sd-scripts' Python
    :param ways: by name; `OURS` is compared with each of the others
    :param check: arguments of `tools_inputs.py` that print errors of what the ways have written, as JSON
    """

    inputs: Callable[[Setting], Sequence[Sequence[str | Path]]]
    ways: Callable[[Setting], Mapping[str, Way]]
    check: Callable[[Setting], Sequence[str | Path]] | None = None
    said: Mapping[str, Any] = field(default_factory=dict)


def measured(
    command: Sequence[str | Path], environment: Mapping[str, str] | None = None, cwd: Path | None = None
) -> Cost:
    """Runs a command to its end.

    Linux counts a new process's peak from its parent's, so this one has to stay small: no torch here.

    :raises RuntimeError: when it fails, with the end of what it printed
    """
    if "torch" in sys.modules:
        raise RuntimeError("a peak measured from a process with torch in it would be that process's own")
    start = time.perf_counter()
    process = subprocess.Popen(
        [str(word) for word in command],
        env=os.environ | dict(environment or {}),
        cwd=cwd,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
    )
    assert process.stdout is not None
    printed = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    wall = time.perf_counter() - start
    if process.returncode:
        end = printed[-3000:].decode(errors="replace")
        raise RuntimeError(f"{' '.join(map(str, command))} ended with {process.returncode}:\n{end}")
    unit = 1 if sys.platform == "darwin" else 1024
    return Cost(wall, usage.ru_utime + usage.ru_stime, usage.ru_maxrss * unit)


def interleaved(ways: Mapping[str, Way], rounds: int) -> dict[str, list[Cost]]:
    """Every way, `rounds` times, in turns that begin with another one each round."""
    costs: dict[str, list[Cost]] = {name: [] for name in ways}
    names = list(ways)
    for k in range(rounds):
        for name in names[k % len(names) :] + names[: k % len(names)]:
            way = ways[name]
            for output in way.outputs:
                output.unlink(missing_ok=True)
            if hasattr(os, "sync"):
                os.sync()  # what one way left to be written is not the next one's time
            costs[name].append(measured(way.command, way.environment, way.cwd))
            wall, cpu, peak = costs[name][-1]
            print(f"{name}: {wall:.1f} s, {cpu:.1f} s of processors, {peak / 2**30:.2f} GiB", flush=True)
    return costs


def spread(values: Sequence[float], digits: int = 3) -> dict[str, float]:
    """Least, median and most."""
    found = {"min": min(values), "median": statistics.median(values), "max": max(values)}
    return {name: round(value, digits) for name, value in found.items()}


def summary(costs: Mapping[str, Sequence[Cost]]) -> dict[str, Any]:
    """Each way's cost, and ours by every other's, round by round."""
    found: dict[str, Any] = {"ways": {}, "ours_by": {}}
    for name, many in costs.items():
        of_way = {part: spread([getattr(cost, part) for cost in many]) for part in ("wall", "cpu")}
        found["ways"][name] = of_way | {"peak_gib": spread([cost.peak / 2**30 for cost in many])}
    for name in costs.keys() - {OURS} if OURS in costs else ():
        pairs = list(zip(costs[OURS], costs[name], strict=True))
        found["ours_by"][name] = {
            part: spread([getattr(ours, part) / max(getattr(other, part), 1e-9) for ours, other in pairs])
            for part in Cost._fields
        }
    return found


def machine(setting: Setting) -> dict[str, Any]:
    """On what it was measured, asked of processes of their own."""
    versions = "import torch, safetensors; print(torch.__version__, safetensors.__version__)"

    def of(python: str) -> str:
        return subprocess.run([python, "-c", versions], text=True, capture_output=True, check=True).stdout.strip()

    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=setting.sd_scripts, text=True, capture_output=True
    )
    return {
        "machine": f"{platform.machine()}, {os.cpu_count()} cores, no GPU used",
        "threads": setting.threads,
        "torch_and_safetensors": {"ours": of(sys.executable), "theirs": of(setting.python)},
        "python": platform.python_version(),
        "sd_scripts": commit.stdout.strip() or "48d368fa",
        "load": [round(value, 1) for value in os.getloadavg()],
    }


def run_row(name: str, row: Row, setting: Setting, rounds: int, without: Sequence[str]) -> dict[str, Any]:
    """Makes the inputs, measures, checks, and writes the result.

    :param without: ways that are left out; there is no check then
    """
    for arguments in row.inputs(setting):
        python = setting.python if arguments[0] == "shapes" else sys.executable
        subprocess.run(
            [python, str(INPUTS), *map(str, arguments)], check=True, env=os.environ | {"HF_HUB_OFFLINE": "1"}
        )
    facts = machine(setting)
    ways = {way: how for way, how in row.ways(setting).items() if way not in without}
    found = {"row": name, "rounds": rounds, **row.said, **facts, **summary(interleaved(ways, rounds))}
    if row.check is not None and not without:
        command = [sys.executable, str(INPUTS), *map(str, row.check(setting))]
        printed = subprocess.run(command, check=True, text=True, stdout=subprocess.PIPE).stdout
        found["checked"] = json.loads(printed.strip().splitlines()[-1])
    write_result(f"tools_{name}", found)
    return found


def write_result(name: str, found: Mapping[str, Any]) -> None:
    """JSON in benchmarks/results."""
    (RESULTS / f"{name}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found, indent=1))


def theirs(setting: Setting, script: str, *arguments: str | Path, output: Path) -> Way:
    """A script of sd-scripts' networks/, in its own Python."""
    environment = {"PYTHONPATH": str(setting.sd_scripts), "HF_HUB_OFFLINE": "1", **_threads(setting)}
    command = [setting.python, setting.sd_scripts / "networks" / script, *arguments]
    return Way(command, [output], environment, setting.sd_scripts)


def ours(setting: Setting, tool: str, *arguments: str | Path, output: Path) -> Way:
    """One of our tools."""
    command = [sys.executable, ROOT / "networks" / tool, *arguments]
    return Way(command, [output], _threads(setting))


def _threads(setting: Setting) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(setting.threads), "MKL_NUM_THREADS": str(setting.threads)}


def copied(source: Path, output: Path) -> Mapping[str, Way]:
    """The file copied, and copied and on the disk, as what ours writes is when it ends."""
    durable = ["sh", "-c", 'cp "$0" "$1" && sync "$1"', source, output]
    return {"cp": Way(["cp", source, output], [output]), "cp and sync": Way(durable, [output])}


def _lora_inputs(setting: Setting, kind: str, dtype: str) -> list[list[str | Path]]:
    folder = setting.folder
    shapes = folder / f"{kind}.json"
    made: list[list[str | Path]] = [["shapes", shapes, "--kind", kind, "--sd_scripts", setting.sd_scripts]]
    for seed in (1, 2):
        made.append(
            [
                "lora",
                folder / f"{kind}_lora_{seed}.safetensors",
                "--shapes",
                shapes,
                "--seed",
                str(seed),
                "--dtype",
                dtype,
            ]
        )
    return made


def _merge_inputs(setting: Setting, kind: str, dtype: str) -> list[list[str | Path]]:
    shapes, checkpoint = setting.folder / f"{kind}.json", setting.folder / f"{kind}.safetensors"
    made = _lora_inputs(setting, kind, dtype)
    return [*made, ["checkpoint", checkpoint, "--shapes", shapes, "--dtype", dtype]]


RATIOS = ("0.8", "-0.5")


def _sum_ways(setting: Setting) -> Mapping[str, Way]:
    loras = [setting.folder / f"sdxl_lora_{seed}.safetensors" for seed in (1, 2)]
    outputs = _outputs(setting, "sum", SUMS)
    given = ["--models", *loras, "--ratios", *RATIOS, "--save_precision", "fp16", "--save_to"]
    script = "sdxl_merge_lora.py"
    return {
        OURS: ours(setting, "merge_deft.py", *given, outputs[OURS], output=outputs[OURS]),
        SUMS[1]: theirs(setting, script, *given, outputs[SUMS[1]], output=outputs[SUMS[1]]),
        SUMS[2]: theirs(setting, script, "--concat", *given, outputs[SUMS[2]], output=outputs[SUMS[2]]),
    }


SUMS = (OURS, "merge_lora", "merge_lora --concat")
MERGES = (OURS, "sdxl_merge_lora")
FLUX_MERGES = (OURS, "flux_merge_lora", "flux_merge_lora --mem_eff_load_save")


def _outputs(setting: Setting, name: str, ways: Sequence[str]) -> dict[str, Path]:
    return {way: setting.folder / f"{name}_{k}.safetensors" for k, way in enumerate(ways)}


def _sum_check(setting: Setting) -> Sequence[str | Path]:
    loras = [setting.folder / f"sdxl_lora_{seed}.safetensors" for seed in (1, 2)]
    written = [f"{way}={path}" for way, path in _outputs(setting, "sum", SUMS).items()]
    return ["summed", *written, "--loras", *loras, "--ratios", *RATIOS]


def _merge_ways(setting: Setting) -> Mapping[str, Way]:
    """sd-scripts' in fp16, which it has least to convert for."""
    checkpoint, lora = (setting.folder / f"{name}.safetensors" for name in ("sdxl", "sdxl_lora_1"))
    outputs = _outputs(setting, "merged", MERGES)
    given = ["--sd_model", checkpoint, "--models", lora, "--ratios", RATIOS[0], "--save_to"]
    half = ["--precision", "fp16", "--save_precision", "fp16"]
    return {
        OURS: ours(setting, "merge_deft.py", *given, outputs[OURS], output=outputs[OURS]),
        MERGES[1]: theirs(setting, "sdxl_merge_lora.py", *half, *given, outputs[MERGES[1]], output=outputs[MERGES[1]]),
        **copied(checkpoint, setting.folder / "copied.safetensors"),
    }


def _merge_check(setting: Setting) -> Sequence[str | Path]:
    checkpoint, lora = (setting.folder / f"{name}.safetensors" for name in ("sdxl", "sdxl_lora_1"))
    written = [f"{way}={path}" for way, path in _outputs(setting, "merged", MERGES).items()]
    return ["merged", *written, "--base", checkpoint, "--loras", lora, "--ratios", RATIOS[0]]


def _flux_ways(setting: Setting, kind: str) -> Mapping[str, Way]:
    """All write one file in turn, which takes the room of one; sd-scripts' in float, its default."""
    checkpoint, lora = (setting.folder / f"{name}.safetensors" for name in (kind, f"{kind}_lora_1"))
    output = setting.folder / "merged_flux.safetensors"
    given = ["--flux_model", checkpoint, "--models", lora, "--ratios", RATIOS[0], "--save_to", output]
    found = {OURS: ours(setting, "merge_deft.py", *given, output=output)}
    for name in FLUX_MERGES[1:]:
        options = [*name.split()[1:], "--save_precision", "bf16"]
        found[name] = theirs(setting, "flux_merge_lora.py", *options, *given, output=output)
    return found | copied(checkpoint, output)


ROWS: dict[str, Row] = {
    "sum_sdxl": Row(lambda setting: _lora_inputs(setting, "sdxl", "float16"), _sum_ways, _sum_check),
    "merge_sdxl": Row(lambda setting: _merge_inputs(setting, "sdxl", "float16"), _merge_ways, _merge_check),
    **{
        f"merge_{kind}": Row(
            lambda setting, kind=kind: _merge_inputs(setting, kind, "bfloat16"),
            lambda setting, kind=kind: _flux_ways(setting, kind),
        )
        for kind in ("flux", "flux_whole")
    },
}


def setting_of(parsed: argparse.Namespace) -> Setting:
    """The setting that `parser` read."""
    folder = parsed.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    return Setting(folder, parsed.sd_scripts.resolve(), parsed.python, parsed.threads)


def parser(description: str | None, rows: Mapping[str, Row]) -> argparse.ArgumentParser:
    """What `main` takes, with these rows."""
    found = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    found.add_argument("rows", nargs="*", choices=[*rows, []], metavar="ROW", help=f"of {', '.join(rows)}")
    found.add_argument("--sd_scripts", type=Path, default=os.environ.get("SD_SCRIPTS_DIR"))
    found.add_argument("--python", default=os.environ.get("SD_SCRIPTS_PYTHON"), help="sd-scripts' own")
    found.add_argument("--folder", type=Path, required=True, help="for big files")
    found.add_argument("--rounds", type=int, default=3)
    found.add_argument("--without", nargs="+", default=[], metavar="WAY", help="ways to leave out, such as cp")
    found.add_argument("--threads", type=int, default=1, help="of torch, in each process")
    return found


def main(description: str | None = __doc__, rows: Mapping[str, Row] = ROWS) -> None:
    """The rows that the command line names."""
    parsed = parser(description, rows).parse_args()
    setting = setting_of(parsed)
    for name in parsed.rows or rows:
        run_row(name, rows[name], setting, parsed.rounds, parsed.without)


if __name__ == "__main__":
    main()
