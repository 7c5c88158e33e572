"""Damaged and hostile files, made from whole ones, and every reader that has to answer them with a value or one line.

    python -m tests.fuzz --number 100000

prints how many were read, how many refused, and ends at the first that does neither. Each file is made from its number
alone, so that one can be made again (`--first N --number 1`).
"""

from __future__ import annotations

import argparse
import collections
import json
import logging
import math
import pickle
import random
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save
from torch import Tensor

from networks import deft_formats, deft_io, deft_keep
from networks.deft_checkpoint import open_checkpoint
from networks.deft_config import DeftError
from networks.deft_progress import progress

HUGE = (0, -1, 1, 3, 2**31, 2**53, 2**63 - 1, 2**64, 10**30, 1.5, True, None, "8", [], {})
WORDS = (
    *("lora_up.weight", "lora_down.weight", "lora_mid.weight", "alpha", "lora_A.weight", "lora_B.weight", "diff"),
    *("dora_scale", "hada_w1_a", "lokr_w1", "lokr_w2_a", "oft_blocks", "deft_P", "deft_E0"),
    *("weight", "scale_weight", ""),
)
DTYPES = ("F64", "F32", "F16", "BF16", "I64", "U8", "F8_E4M3", "BOOL", "F128", "", None, 7)


def whole_files() -> list[tuple[dict[str, Tensor], dict[str, str]]]:
    """Small files of every kind that a reader knows, with metadata."""
    generator = torch.Generator().manual_seed(0)

    def some(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    q, conv = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q", "lora_unet_conv_in"
    layer = "unet.mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    lora = {
        f"{q}.lora_up.weight": some(8, 2), f"{q}.lora_down.weight": some(2, 8), f"{q}.alpha": torch.tensor(2.0),
        f"{conv}.lora_up.weight": some(8, 2, 1, 1), f"{conv}.lora_down.weight": some(2, 4, 3, 3),
    }  # fmt: skip
    recorded = {"deft_layers": json.dumps({q: [2, 1.0, 0]}), "deft_options": json.dumps({"dim": 2}), "ss_v2": "False"}
    own = {f"{q}.deft_P": some(8, 2), f"{q}.deft_R": some(2, 8), f"{q}.deft_E0": some(8, 2), f"{q}.alpha": some(1)[0]}
    attn = "input_blocks.1.1.transformer_blocks.0.attn1.to_q.weight"
    sgm = {
        f"model.diffusion_model.{attn}": some(8, 8).half(),
        "model.diffusion_model.input_blocks.1.1.transformer_blocks.0.attn2.to_k.weight": some(8, 768),
        "model.diffusion_model.input_blocks.0.0.weight": some(8, 4, 3, 3),
        "cond_stage_model.transformer.text_model.encoder.layers.0.self_attn.q_proj.weight": some(8, 8),
        "first_stage_model.decoder.conv_in.bias": some(8),
    }
    flux = {
        "double_blocks.0.img_attn.qkv.weight": some(24, 8).to(torch.float8_e4m3fn),
        "double_blocks.0.img_attn.qkv.scale_weight": torch.tensor(0.5),
        "single_blocks.0.linear1.weight": some(56, 8).bfloat16(),
        "scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn),
    }
    kept, kept_metadata = deft_io.kept_tensors({q: torch.linalg.qr(some(8, 2))[0]})
    return [
        (lora, recorded),
        (own, recorded),
        ({f"{layer}.lora_A.weight": some(2, 8), f"{layer}.lora_B.weight": some(8, 2)}, {}),
        ({f"{q}.hada_w{i}_{w}": some(*s) for i in (1, 2) for w, s in (("a", (8, 2)), ("b", (2, 8)))}, {}),
        ({f"{q}.lokr_w1": some(2, 2), f"{q}.lokr_w2_a": some(4, 2), f"{q}.lokr_w2_b": some(2, 4)}, {}),
        ({f"{q}.oft_blocks": some(2, 4, 4)}, {}),
        ({f"{q}.lora_up.weight": some(8, 2), f"{q}.lora_down.weight": some(2, 8), f"{q}.dora_scale": some(8, 1)}, {}),
        ({"diffusion_model.double_blocks.0.img_attn.qkv.diff": some(24, 8)}, {}),
        (sgm, {"modelspec.title": "x"}),
        (flux, {}),
        (kept, kept_metadata),
    ]  # fmt: skip


def damaged(number: int, files: list[tuple[dict[str, Tensor], dict[str, str]]]) -> bytes:
    """The content of the file with this number."""
    chance = random.Random(number)
    tensors, metadata = chance.choice(files)
    for change in chance.sample([renamed, reshaped, spoilt, retold], chance.randint(0, 2)):
        tensors, metadata = change(chance, dict(tensors), dict(metadata))
    content = save(tensors, metadata)
    for _ in range(chance.randint(0 if number % 7 else 1, 2)):
        content = chance.choice([cut, flipped, lying, rewritten, rewritten, rewritten, repeated, foreign])(
            chance, content
        )
    return content


def renamed(chance: random.Random, tensors: dict, metadata: dict) -> tuple[dict, dict]:
    """A tensor under another name, or without one part of it."""
    key = chance.choice(list(tensors))
    layer = key.split(".")[0] if chance.random() < 0.5 else key.rpartition(".")[0]
    tensors[chance.choice((f"{layer}.{chance.choice(WORDS)}", key.upper(), key + "_", "é\u2028", ""))] = tensors.pop(
        key
    )
    return tensors, metadata


def reshaped(chance: random.Random, tensors: dict, metadata: dict) -> tuple[dict, dict]:
    """A tensor of another shape or dtype."""
    key = chance.choice(list(tensors))
    shapes = [(), (0,), (1,), (3, 5), (8, 2, 1), (2, 8, 3, 3), (0, 8), (8, 0), (1, 1, 1, 1, 1)]
    dtypes = [torch.float32, torch.float16, torch.int64, torch.bool, torch.float8_e4m3fn, torch.uint8, torch.complex64]
    tensors[key] = torch.ones(chance.choice(shapes)).to(chance.choice(dtypes))
    return tensors, metadata


def spoilt(chance: random.Random, tensors: dict, metadata: dict) -> tuple[dict, dict]:
    """A value that is not finite, or enormous."""
    key = chance.choice(list(tensors))
    value = chance.choice((math.nan, math.inf, -math.inf, 3e38, 1e-45))
    tensors[key] = torch.full_like(tensors[key].float(), value)
    return tensors, metadata


def retold(chance: random.Random, tensors: dict, metadata: dict) -> tuple[dict, dict]:
    """Metadata that says something else."""
    values = ("", "null", "[]", "{", '{"x": 1}', "[" * 5000, "9" * 400, '{"x": [1e999, -1, NaN]}', "\u0000", "True")
    for key in ("deft_layers", "deft_options", "deft_kept_layers", "deft_history", "format", "ss_tag_frequency"):
        if chance.random() < 0.4:
            metadata[key] = chance.choice(values)
    return tensors, metadata


def cut(chance: random.Random, content: bytes) -> bytes:
    """The file cut off, or with more behind it."""
    return content[: chance.randrange(len(content) + 1)] + bytes(chance.choice((0, 0, 1, 100)))


def flipped(chance: random.Random, content: bytes) -> bytes:
    """Some bits of it turned."""
    changed = bytearray(content)
    for _ in range(chance.choice((1, 1, 3, 50))):
        if changed:
            changed[chance.randrange(len(changed))] ^= 1 << chance.randrange(8)
    return bytes(changed)


def lying(chance: random.Random, content: bytes) -> bytes:
    """A header of another length than it says."""
    size = chance.choice(
        (0, 1, 7, 2**31, 2**63, 2**64 - 1, int.from_bytes(content[:8], "little") + chance.choice((-3, -1, 1, 9)))
    )
    return (size % 2**64).to_bytes(8, "little") + content[8:]


def _header(content: bytes) -> tuple[dict, bytes] | None:
    size = int.from_bytes(content[:8], "little")
    try:
        return json.loads(content[8 : 8 + size]), content[8 + size :]
    except (ValueError, RecursionError, OverflowError):
        return None


def _with_header(text: str, data: bytes) -> bytes:
    raw = text.encode("utf-8", "surrogatepass")
    return len(raw).to_bytes(8, "little") + raw + data


def rewritten(chance: random.Random, content: bytes) -> bytes:
    """A header that says something else of a tensor."""
    found = _header(content)
    if found is None or not isinstance(found[0], dict) or not found[0]:
        return content
    header, data = found
    entry = header[chance.choice(list(header))]
    if not isinstance(entry, dict) or "shape" not in entry or "data_offsets" not in entry:
        header["__metadata__"] = chance.choice((None, [], {"a": 1}, {"a": {"b": "c"}}, "x"))
        return _with_header(json.dumps(header), data)
    what = chance.choice(("shape", "dtype", "data_offsets", "more", "less"))
    if what == "dtype":
        entry["dtype"] = chance.choice(DTYPES)
    elif what == "less":
        del entry[chance.choice(list(entry))]
    elif what == "more":
        entry[chance.choice(("x", "shape2"))] = chance.choice(HUGE)
    elif not isinstance(entry[what], list) or not entry[what]:
        entry[what] = chance.choice(HUGE)
    else:
        entry[what][chance.randrange(len(entry[what]))] = chance.choice(HUGE)
    return _with_header(json.dumps(header), data)


def repeated(chance: random.Random, content: bytes) -> bytes:
    """A header with a name in it twice, or enormously deep, or no JSON."""
    found = _header(content)
    if found is None or not isinstance(found[0], dict) or not found[0]:
        return content
    text, data = json.dumps(found[0]), found[1]
    key = chance.choice(list(found[0]))
    twice = f"{text[:-1]}, {json.dumps(key)}: {json.dumps(found[0][key])}}}"
    return _with_header(
        chance.choice((twice, "[" * 100_000, text[:-1], "null", "[]", "{}", text + " " * 50, "\ufeff" + text)), data
    )


def foreign(chance: random.Random, content: bytes) -> bytes:
    """Something else under a .safetensors name."""
    return chance.choice(
        (b"", b"\x00" * 8, b"PK\x03\x04" + content, pickle.dumps({"a": 1}), b"<!DOCTYPE html>" * 9, b"GGUF" + content)
    )


def readers() -> Mapping[str, Callable[[Path], object]]:
    """Every function that is given a file of somebody's."""
    return {
        "adapter": deft_io.read_adapter,
        "kept": deft_keep.read_kept,
        "formats": _all_changes,
        "checkpoint": _all_weights,
    }


def _all_changes(path: Path) -> None:
    for change in deft_formats.read(path).changes.values():
        if isinstance(change, deft_formats.OnBase):
            change.delta(torch.ones(change.shape[0], math.prod(change.shape[1:])))
        else:
            change.delta()


def _all_weights(path: Path) -> None:
    with open_checkpoint(path) as checkpoint:
        for name in (*checkpoint.layers, *checkpoint.further):
            checkpoint.weight(name)
        for key in checkpoint.rest:
            checkpoint.tensor(key)


def outcomes(first: int, number: int, folder: Path) -> Iterator[tuple[str, str]]:
    """(reader, what it did) of each file and reader.

    :raises AssertionError: for one that raises anything but a DeftError of one line
    """
    files = whole_files()
    path = folder / "fuzzed.safetensors"
    for k in progress(range(first, first + number), "reading damaged files", "files"):
        path.write_bytes(damaged(k, files))
        for name, read in readers().items():
            try:
                read(path)
            except DeftError as error:
                line = str(error)
                if not line or "\n" in line or len(line) > 1000:
                    raise AssertionError(f"file {k}, {name}: not one line: {line[:2000]}") from error
                yield name, "refused"
            except Exception as error:
                raise AssertionError(f"file {k}, {name}: {type(error).__name__}: {error}") from error
            else:
                yield name, "read"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--number", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    args = parser.parse_args()
    logging.disable(logging.CRITICAL)
    warnings.simplefilter("ignore")
    with tempfile.TemporaryDirectory() as folder:
        counted = collections.Counter(outcomes(args.first, args.number, Path(folder)))
    for (name, what), count in sorted(counted.items()):
        print(f"{name}: {what} {count}")


if __name__ == "__main__":
    sys.exit(main())
