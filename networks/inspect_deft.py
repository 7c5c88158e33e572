"""What adapter files are, what is in them, and what each program that loads them makes of them.

    python networks/inspect_deft.py a.safetensors b.safetensors
    python networks/inspect_deft.py a.safetensors --plot a.png --json a.json
    python networks/inspect_deft.py a.safetensors --base model.safetensors

LoRA, LoCon, LoHa, LoKr, OFT, DoRA, DEFT and others, under any program's names. With a base model, every client's own
arithmetic is done too, and the difference from the right result is told. Nothing is written but what is asked for.
"""

from __future__ import annotations

import sys
from pathlib import Path

if __name__ == "__main__" and not __package__:  # run as a file: its folder is on the path, not the one above
    sys.path[0] = str(Path(__file__).resolve().parents[1])

import io
import json
import math
import textwrap
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

import torch

from networks import deft_io, deft_names, deft_report, deft_tools
from networks.deft_checkpoint import open_checkpoint
from networks.deft_clients import CLIENTS, Reading
from networks.deft_config import DeftError
from networks.deft_report import LayerFacts, Report, blocks, norm_of

WIDTH = 100
BAR = 30  # characters of the longest bar
MOST_BLOCKS = 26  # a longer list is put together by neighbours
NAMES = {"TE": "text encoder", "TE2": "text encoder 2", "T5": "T5", "MID": "middle", "other": "outside of blocks"}
LETTERS = {"IN": "in", "OUT": "out", "D": "double", "S": "single", "B": "block"}


def main(argv: Sequence[str] | None = None) -> int:
    """The command line: 0, or 2 when a file cannot be read, after the others."""
    parser = deft_tools.parser(__doc__)
    parser.add_argument("files", nargs="+", metavar="FILE", help="adapter files, or folders that peft has written")
    parser.add_argument("--base", metavar="MODEL", help="checkpoint, or folder of Diffusers, that they are made for")
    parser.add_argument("--json", metavar="FILE", help="write everything as JSON; - prints it instead of the text")
    parser.add_argument("--plot", metavar="FILE.png", help="draw norms by block and spectra (needs matplotlib)")
    given = parser.parse_args(argv)
    return deft_tools.run(lambda: inspect(given.files, given.base, given.json, given.plot))


def inspect(files: Sequence[str], base: str | None, as_json: str | None, plot: str | None) -> None:
    """The tool's work.

    :raises DeftError: for the first file that cannot be read, when the others are done
    """
    for option, path in (("--json", as_json if as_json != "-" else None), ("--plot", plot)):
        if path is not None:
            deft_tools.check_native(option, path)
        if path is not None and any(deft_tools.is_same_file(Path(path), Path(file)) for file in [*files, base or ""]):
            raise DeftError(f"{option} {path}: this is an input, which is never overwritten; give another file")
    pyplot = _pyplot(plot)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the matrices are small: several threads wait for each other most of the time
    reports: list[Report] = []
    failed: list[tuple[str, DeftError]] = []
    checkpoint = open_checkpoint(base) if base is not None else None
    try:
        for file in files:
            try:
                found = deft_report.report(file, checkpoint)
            except DeftError as error:
                failed.append((file, error))
                continue
            if found.problem:
                failed.append((file, DeftError(found.problem)))
            reports.append(found)
            if as_json != "-":
                print("\n".join(lines(found)), end="\n\n", flush=True)
    finally:
        torch.set_num_threads(threads)
        if checkpoint is not None:
            checkpoint.close()
    if as_json is not None:
        _write_json(as_json, reports, failed)
    if plot is not None and reports:
        draw(pyplot, [found for found in reports if found.layers], Path(plot))
    if failed:
        for _, reason in failed[:-1]:
            print(f"error: {reason}", file=sys.stderr)
        raise failed[-1][1]


def _write_json(path: str, reports: Sequence[Report], failed: Sequence[tuple[str, DeftError]]) -> None:
    document = {
        "inspect_deft": 1,
        "version": deft_io.VERSION,
        "files": [deft_report.as_json(found) for found in reports],
        "errors": [{"file": file, "error": str(error)} for file, error in failed],
    }
    text = json.dumps(document, indent=1)
    if path == "-":
        print(text)
    else:
        deft_io.write_whole(Path(path), text.encode())


# --- for people -------------------------------------------------------------------------------------------------------


def lines(found: Report) -> Iterator[str]:
    """What is printed of a file."""
    yield f"{Path(found.path).name}  ({_size(found.size)}, {found.tensors} tensors, {', '.join(found.dtypes)})"
    for word, text in facts(found):
        yield from _wrapped(f"  {word:<10}", text)
    if found.layers:
        yield ""
        yield from block_lines(found)
    if found.readings:
        yield ""
        yield from client_lines(found)


def _wrapped(before: str, text: str) -> list[str]:
    return textwrap.wrap(
        text, WIDTH, initial_indent=before, subsequent_indent=" " * len(before), break_long_words=False
    )


def facts(found: Report) -> Iterator[tuple[str, str]]:
    """(word, what is to be said of it)."""
    if found.adapter is not None:
        kinds = Counter(layer.kind for layer in found.layers)
        several = len(kinds) > 1
        what = " and ".join(f"{kind} ({n} layers)" if several else kind for kind, n in kinds.most_common())
        ours = found.metadata.get(deft_io.VERSION_KEY)
        yield (
            "kind",
            f"{what or 'nothing'}, {deft_names.form_in_words(found.adapter.format)}"
            + (f", by DEFT {ours}" if ours else ""),
        )
    model = found.known.title if found.known else found.adapter.architecture if found.adapter else ""
    strange = ", not of the published model's size: clients are not simulated"
    yield "made for", (model or "a model that is not known here") + (strange if model and not found.readings else "")
    told = _training(deft_report.training(found.metadata))
    if told:
        yield "training", told
    trigger = _trigger(deft_report.training(found.metadata))
    if trigger:
        yield "trigger", trigger
    options = {k: v for k, v in deft_report.options(found.metadata).items() if v not in (None, "", {}, False)}
    if options:
        yield "options", ", ".join(f"{key}={_short(value)}" for key, value in options.items())
    if deft_io.BASE_HASH_KEY in found.metadata:
        dtype = found.metadata.get(deft_io.BASE_DTYPE_KEY, "")
        yield "base", f"weights {found.metadata[deft_io.BASE_HASH_KEY][:12]} {dtype.removeprefix('torch.')}".rstrip()
    if found.layers:
        yield "rank", _ranks(found.layers)
        yield "alpha", _alphas(found.layers)
        yield "size", _norms(found)
    yield from _troubles(found)


def _training(told: dict[str, Any]) -> str:
    parts = [f"{told[k]} {k}" for k in ("steps", "epochs", "pictures") if k in told]
    parts += [f"rate {told['rate']}"] if "rate" in told else []
    parts += [str(told["optimizer"]).partition("(")[0].rpartition(".")[2]] if "optimizer" in told else []
    parts += [f"{told['module']}"] if "module" in told else []
    return ", ".join(parts) + (f", on {told['base']}" if "base" in told else "")


def _trigger(told: dict[str, Any]) -> str:
    tags = ", ".join(f"{_short(tag)} ({number})" for tag, number in list(told.get("tags", {}).items())[:3])
    return "; ".join(filter(None, [told.get("trigger", ""), f"tags: {tags}" if tags else ""]))


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 32 else text[:29] + "..."


def _ranks(layers: Sequence[LayerFacts]) -> str:
    spectra = [layer for layer in layers if len(layer.values)]
    said = _values([layer.rank for layer in layers if layer.rank is not None])
    if not spectra:
        return said or "none: no products of two small matrices"
    used, effective = [la.in_use for la in spectra], [la.effective for la in spectra]
    said = f"{said}; " if said else ""
    return f"{said}in use {_spread(used)}; {_spread(effective)} hold 99% of each layer's change"


def _spread(numbers: Sequence[int]) -> str:
    low, high, middle = min(numbers), max(numbers), sorted(numbers)[len(numbers) // 2]
    return f"{low}" if low == high else f"{low} to {high} (median {middle})"


def _values(numbers: Sequence[float | int]) -> str:
    """Each value, and how often where there are several."""
    counts = Counter(numbers)
    if len(counts) == 1:
        return f"{next(iter(counts)):g}"
    text = ", ".join(f"{value:g} ({number} layers)" for value, number in counts.most_common(4))
    return text + (f" and {len(counts) - 4} others" if len(counts) > 4 else "")


def _alphas(layers: Sequence[LayerFacts]) -> str:
    alphas = [layer.alpha for layer in layers if layer.alpha is not None]
    if not alphas:
        return "none: scale 1"
    missing = f"; {len(layers) - len(alphas)} layers have none" if len(alphas) < len(layers) else ""
    scales = {la.alpha / la.rank for la in layers if la.alpha is not None and la.rank}
    return _values(alphas) + (f" (scale {scales.pop():g})" if len(scales) == 1 else "") + missing


def _norms(found: Report) -> str:
    text = f"norm {norm_of(found.layers):.4g} in {len(found.layers)} layers"
    sized = [layer for layer in found.layers if layer.relative is not None]
    if sized:
        largest = max(sized, key=lambda layer: layer.relative or 0)
        middle = sorted(layer.relative or 0 for layer in sized)[len(sized) // 2]
        text += f"; of the weights {middle:.2%} in the median, {largest.relative:.2%} in {largest.name}"
    return text


def _troubles(found: Report) -> Iterator[tuple[str, str]]:
    if found.not_finite:
        yield "TROUBLE", f"{len(found.not_finite)} layers have NaN or infinite numbers: {_some(found.not_finite)}"
    zero = found.zero
    if zero and len(zero) == len(found.layers):
        yield "TROUBLE", "all layers are zero: nothing was learnt"
    elif zero:
        yield "note", f"{len(zero)} layers are zero, nothing learnt: {_some(zero)}"
    if found.adapter is not None and found.adapter.left:
        reasons = Counter(found.adapter.left.values())
        yield "note", "; ".join(f"{number} tensors: {reason}" for reason, number in reasons.most_common(3))
    if found.base_missing:
        yield "TROUBLE", f"{len(found.base_missing)} layers fit none of the base model's: {_some(found.base_missing)}"
    if found.problem:
        yield "TROUBLE", found.problem


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:2]) + (" ..." if len(names) > 2 else "")


def block_lines(found: Report) -> Iterator[str]:
    """Norms by block, with bars."""
    rows = [(_block_name(name), part) for name, part in blocks(found.layers)]
    if len(rows) > MOST_BLOCKS:
        rows = _together(list(blocks(found.layers)))
    norms = [norm_of(part) for _, part in rows]
    width = max(len(name) for name, _ in rows)
    yield f"  {'block':<{width}}  layers      norm"
    for (name, part), norm in zip(rows, norms, strict=True):
        bar = "#" * round(BAR * norm / max(norms)) if max(norms) > 0 else ""
        yield f"  {name:<{width}}  {len(part):>6}  {norm:>8.3g}  {bar}".rstrip()


def _block_name(block: str) -> str:
    letters = block.rstrip("0123456789")
    return NAMES.get(block) or f"{LETTERS.get(letters, letters)} {int(block[len(letters) :])}"


def _together(rows: list[tuple[str, list[LayerFacts]]]) -> list[tuple[str, list[LayerFacts]]]:
    """Neighbouring blocks of one kind in groups, so that the list stays short."""
    step = math.ceil(len(rows) / (MOST_BLOCKS // 2))
    groups: dict[tuple[str, int], list[tuple[str, list[LayerFacts]]]] = {}
    for name, part in rows:
        letters = name.rstrip("0123456789")
        number = int(name[len(letters) :]) if letters in LETTERS else -1
        groups.setdefault((letters if number >= 0 else name, number // step), []).append((name, part))
    found = []
    for group in groups.values():
        first, last = _block_name(group[0][0]), group[-1][0].lstrip("INOUTDSB").lstrip("0") or "0"
        name = first if len(group) == 1 else f"{first}-{last}"
        found.append((name, [layer for _, part in group for layer in part]))
    return found


def client_lines(found: Report) -> Iterator[str]:
    """A row for each client."""
    compared = bool(found.errors)
    column = "   error" if compared else ""
    yield f"  {'client':<22}  keys  ignored{column}  what it makes of the file"
    indent = 2 + 22 + 2 + 4 + 2 + 7 + len(column) + 2
    for client in CLIENTS:
        reading = found.readings.get(client.name)
        name = f"{client.name} {client.version}"
        if reading is None:
            text, keys, ignored = "does not run this model", "-", "-"
        else:
            text, keys = verdict(found, reading), str(len(reading.matched))
            ignored = str(found.tensors - len(reading.matched))
        error = found.errors.get(client.name)
        column = "" if not compared else f"  {'-' if error is None else f'{error.largest:.1e}':>6}"
        yield from _hanging(f"  {name:<22}  {keys:>4}  {ignored:>7}{column}  ", text, indent)


def _hanging(before: str, text: str, indent: int) -> list[str]:
    return textwrap.wrap(text, WIDTH, initial_indent=before, subsequent_indent=" " * indent, break_long_words=False)


def verdict(found: Report, reading: Reading) -> str:
    """What a client makes of a file, in a line."""
    if reading.refused:
        return f"REFUSES the file: {reading.refused}" + "".join(f"; {remark}" for remark in reading.remarks)
    said = []
    if not reading.matched:
        said.append("READS NOTHING of it")
    elif len(reading.matched) == found.tensors and not reading.wrong:
        said.append("reads all")
    elif not reading.wrong:
        said.append("reads the rest")
    said += [f"WRONG: it {line}" for line in reading.wrong]
    return "; ".join([*said, *reading.remarks])


def _size(number: int) -> str:
    for unit in ("B", "KB", "MB"):
        if number < 1000:
            return f"{number:.3g} {unit}"
        number = number / 1000  # type: ignore[assignment]
    return f"{number:.3g} GB"


# --- pictures ---------------------------------------------------------------------------------------------------------


def _pyplot(path: str | None) -> Any:
    """matplotlib's, drawing into files."""
    if path is None:
        return None
    if Path(path).suffix.lower() not in (".png", ".svg", ".pdf"):
        raise DeftError(f"--plot {path}: give a file that ends in .png, .svg or .pdf")
    try:
        import matplotlib

        matplotlib.use("Agg")
        from matplotlib import pyplot
    except ImportError:
        raise DeftError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    return pyplot


def draw(pyplot: Any, reports: Sequence[Report], path: Path) -> None:
    """Norms by block on the left and spectra on the right, a row for each file."""
    if not reports:
        return
    figure, axes = pyplot.subplots(
        len(reports), 2, figsize=(10, 3.6 * len(reports)), squeeze=False, layout="constrained"
    )
    for (left, right), found in zip(axes, reports, strict=True):
        _draw_blocks(left, found)
        _draw_spectra(right, found)
    content = io.BytesIO()
    figure.savefig(content, format=path.suffix[1:].lower(), dpi=100)
    pyplot.close(figure)
    deft_io.write_whole(path, content.getvalue())


COLOURS = {"TE": "#8c6bb1", "IN": "#3b7dbf", "MID": "#4a9a6a", "OUT": "#d9793b", "D": "#3b7dbf", "S": "#d9793b"}


def _colour(block: str) -> str:
    letters = block.rstrip("0123456789")
    return COLOURS.get("TE" if block in ("TE", "TE2", "T5") else letters, "#888888")


def _draw_blocks(axis: Any, found: Report) -> None:
    rows = list(blocks(found.layers))
    names, norms = [name for name, _ in rows], [norm_of(part) for _, part in rows]
    axis.bar(range(len(rows)), norms, color=[_colour(name) for name in names], width=0.75)
    step = max(1, len(rows) // 20)
    axis.set_xticks(range(0, len(rows), step), [_block_name(n) for n in names[::step]], rotation=60, ha="right")
    axis.set_ylabel("norm of the change")
    axis.set_title(f"{Path(found.path).name}: blocks", fontsize=10, loc="left")
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


def _draw_spectra(axis: Any, found: Report) -> None:
    layers = [layer for layer in found.layers if layer.in_use]
    groups: dict[str, int] = {}
    for layer in sorted(layers, key=lambda layer: layer.block):
        values = layer.values[: layer.in_use].double()
        share = (values.square() / values.square().sum()).tolist()
        colour = _colour(layer.block)
        axis.plot(range(1, len(share) + 1), share, color=colour, alpha=0.35, linewidth=0.8, marker=".", markersize=2)
        groups[colour] = groups.get(colour, 0) + 1
    words = {"#8c6bb1": "text encoders", "#3b7dbf": "in, double", "#4a9a6a": "middle", "#d9793b": "out, single"}
    for colour, number in groups.items():
        axis.plot([], [], color=colour, label=f"{words.get(colour, 'other')} ({number} layers)")
    axis.set_yscale("log")
    axis.set_xlabel("direction")
    axis.set_ylabel("share of the layer's squared norm")
    axis.set_title("spectra", fontsize=10, loc="left")
    if groups:
        axis.legend(fontsize=8, frameon=False)
    axis.spines[["top", "right"]].set_visible(False)
    axis.tick_params(labelsize=8)


if __name__ == "__main__":
    sys.exit(main())
