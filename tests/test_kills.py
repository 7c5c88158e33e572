"""Tools that are killed on the way: what they write is there whole or not at all, and inputs are as they were."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.conftest import ROOT

KILLS = int(os.environ.get("DEFT_KILLS", "12"))
LAYERS = 40

# One process imports torch; each run is a fork of it, killed after a share of the time that a whole run takes.
RUNS = """
import contextlib, io, os, random, signal, sys, time
from pathlib import Path
import torch
from safetensors.torch import load
from networks import merge_deft

kills, output, old, *arguments = sys.argv[1:]
output, old = Path(output), Path(old)
moments, randoms = [], random.Random(0)


def run(seconds):
    if output.name.endswith("1.safetensors") and old.exists():
        output.write_bytes(old.read_bytes())
    start = time.perf_counter()
    child = os.fork()
    if not child:
        with contextlib.redirect_stdout(io.StringIO()):
            os._exit(merge_deft.main([*arguments, "--save_to", str(output)]))
    if seconds is not None:
        time.sleep(seconds)
        partial = any(path.name.endswith(f".{child}.partial") for path in output.parent.iterdir())
        os.kill(child, signal.SIGKILL)
        moments.append(partial)
    status = os.waitpid(child, 0)[1]
    return time.perf_counter() - start, status


def kind_of(content):
    if content in (b"", old.read_bytes()):
        return "old"
    try:
        found = load(content)
    except Exception:
        return "HALF"
    same = found.keys() == reference.keys() and all(torch.equal(found[key], reference[key]) for key in found)
    return "new" if same else "HALF"


run(None)  # which reads what later ones have at hand
whole, status = run(None)
assert status == 0
reference = load(output.read_bytes())
kinds = {}
for k in range(int(kills)):
    output = output.with_name(f"{k % 2}.safetensors")
    output.unlink(missing_ok=True)
    _, status = run(whole * randoms.random())
    kind = kind_of(output.read_bytes() if output.exists() else b"")
    kinds[kind] = kinds.get(kind, 0) + 1
assert run(None)[1] == 0 and kind_of(output.read_bytes()) == "new"
left = [path.name for path in output.parent.iterdir() if path.name.startswith(f".{output.name}")]
print(f"whole {whole:.2f} s, kills {kills} while_writing {sum(moments)} {kinds} left {len(left)}")
"""


def layers() -> dict[str, tuple[int, int]]:
    return {f"input_blocks.4.1.transformer_blocks.{k}.attn1.to_q": (256, 320) for k in range(LAYERS)}


def files(folder: Path) -> tuple[Path, list[Path]]:
    """An SDXL checkpoint of 13 MB, and two adapters."""
    unet = "model.diffusion_model."
    tensors = {f"{unet}{path}.weight": torch.randn(shape) for path, shape in layers().items()}
    tensors |= {f"{unet}output_blocks.8.0.in_layers.2.weight": torch.randn(4, 4, 3, 3)}
    save_file(tensors | {f"{unet}label_emb.0.0.weight": torch.randn(8, 8)}, folder / "base.safetensors")
    for name in ("a", "b"):
        adapter = {}
        for path, (m, n) in layers().items():
            layer = f"lora_unet_{path.replace('.', '_')}"
            adapter |= {f"{layer}.lora_up.weight": torch.randn(m, 8), f"{layer}.lora_down.weight": torch.randn(8, n)}
        save_file(adapter, folder / f"{name}.safetensors")
    return folder / "base.safetensors", [folder / "a.safetensors", folder / "b.safetensors"]


def hashes(*paths: Path) -> list[str]:
    return [hashlib.sha256(path.read_bytes()).hexdigest() for path in paths]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="processes are forked, so that each starts at once")
@pytest.mark.parametrize("into", ["a checkpoint", "one adapter"])
def test_a_killed_merge_leaves_all_or_nothing(tmp_path, into):
    base, adapters = files(tmp_path)
    before = hashes(base, *adapters)
    old, output = tmp_path / "old.safetensors", tmp_path / "out" / "0.safetensors"
    save_file({"old": torch.zeros(8)}, old)
    output.parent.mkdir()
    arguments = ["--models", *map(str, adapters), *(["--sd_model", str(base)] if into == "a checkpoint" else [])]
    done = subprocess.run(
        [sys.executable, "-c", RUNS, str(KILLS), str(output), str(old), *arguments],
        cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True, capture_output=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    print(f"{into}: {done.stdout.strip()}")
    assert "HALF" not in done.stdout
    assert hashes(base, *adapters) == before
    if into == "a checkpoint":  # an adapter is written in too short a time to be met often
        assert " while_writing 0 " not in done.stdout
        assert done.stdout.strip().endswith("left 0")  # what the killed left is taken away by the next
