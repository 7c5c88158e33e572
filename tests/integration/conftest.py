"""What runs of sd-scripts' real trainers share: starting one, reading what it saved, checks that fit every model."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from networks import deft_io, deft_keep
from networks.deft_names import own_key

ROOT = Path(__file__).resolve().parents[2]
SD_SCRIPTS = os.environ.get("SD_SCRIPTS_DIR")
PYTHON = os.environ.get("SD_SCRIPTS_PYTHON", sys.executable)
LARGE = os.environ.get("SD_SCRIPTS_LARGE")
SIDE = Path(__file__).with_name("sd_scripts_side.py")

needs_sd_scripts = pytest.mark.skipif(not SD_SCRIPTS, reason="set SD_SCRIPTS_DIR to a checkout of kohya-ss/sd-scripts")
needs_large = pytest.mark.skipif(not (SD_SCRIPTS and LARGE), reason="set SD_SCRIPTS_LARGE to a folder for 20 GB")
STATES = ("--save_state", "--save_every_n_steps", "1")


def call(command: list[str], folder: str | Path, with_deft: bool = True) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": os.environ.get("SD_SCRIPTS_THREADS", "1"),
        "COLUMNS": "400",  # sd-scripts' log breaks lines at the terminal's width, and puts file names in between
        "PYTHONPATH": os.pathsep.join(
            filter(None, [str(folder), str(ROOT) if with_deft else "", os.environ.get("PYTHONPATH", "")])
        ),
    }
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


def run_script(script: str | Path, *arguments: str | Path, with_deft: bool = True) -> str:
    """Runs a script in sd-scripts' Python and folder; returns what it printed."""
    done = call([PYTHON, str(script), *map(str, arguments)], SD_SCRIPTS or "", with_deft)
    assert done.returncode == 0, done.stdout[-3000:]
    return done.stdout


def large_world(kind: str) -> Path:
    """The folder of a model of `sd_scripts_side.py` that is made once and kept."""
    folder = Path(LARGE or "") / kind
    if not (folder / "images").is_dir():
        run_script(SIDE, kind, folder, with_deft=False)
    return folder


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A full-size SD 1.5 with random weights, and pictures; test_sdxl.py and test_flux.py have others."""
    folder = tmp_path_factory.mktemp("sd15")
    run_script(SIDE, "model", folder, with_deft=False)
    return folder


@pytest.fixture(scope="session")
def kept(world) -> Path:
    """A file of directions to keep, made by `library.keep` from that model."""
    from library import keep

    prompts, file = world / "prompts.txt", world / "keep.safetensors"
    prompts.write_text("a photo of a cat --d 1 --s 2\na red car --d 2 --s 2\n", encoding="utf-8")
    options = {"pretrained_model_name_or_path": world / "model", "prompts": prompts, "output": file,
               "resolution": 64, "device": "cpu", "directions": 16}  # fmt: skip
    assert keep.main([word for key, value in options.items() for word in (f"--{key}", str(value))]) == 0
    return file


def train(
    world: Path,
    name: str,
    *options: str,
    fails: bool = False,
    checkout: str | Path | None = None,
    script: str = "train_network.py",
    precision: str = "no",
    pictures: bool = True,
) -> str:
    """Runs a trainer for two steps; returns its output. Options come last, so they may say another model.

    :param pictures: whether the trainer takes a folder of them
    """
    command = [PYTHON, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", precision, "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    command += [script, "--pretrained_model_name_or_path", str(world / "model")]
    command += ["--tokenizer_cache_dir", str(world / "tokenizers"), "--max_data_loader_n_workers", "0"]
    if pictures:
        command += ["--train_data_dir", str(world / "images"), "--caption_extension", ".txt", "--resolution", "64"]
    command += ["--mixed_precision", precision, "--save_precision", "float", "--save_model_as", "safetensors"]
    command += ["--network_module", "networks.deft", "--network_dim", "4", "--network_alpha", "2"]
    command += ["--max_train_steps", "2", "--learning_rate", "1e-3", "--optimizer_type", "AdamW", "--seed", "1"]
    command += ["--output_dir", str(world / "out"), "--output_name", name, *options]
    done = call(command, checkout or SD_SCRIPTS or "", with_deft=checkout is None)
    tail = done.stdout.replace("\r", "\n").splitlines()[-6:]
    print(f"\n--- {name} {' '.join(options)}: exit code {done.returncode}\n" + "\n".join(tail))
    assert (done.returncode != 0) == fails, done.stdout[-4000:]
    return done.stdout


def tensors(world: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(world / "out" / f"{name}.safetensors")


def metadata(world: Path, name: str) -> dict[str, str]:
    with safe_open(str(world / "out" / f"{name}.safetensors"), framework="pt") as file:
        return file.metadata()


def delta_norms(found: Mapping[str, torch.Tensor]) -> list[float]:
    found = {own_key(key): tensor for key, tensor in found.items()}
    ups = [key for key in found if key.endswith("lora_up.weight")]
    return [float((found[k].flatten(1) @ found[k.replace("lora_up", "lora_down")].flatten(1)).norm()) for k in ups]


def check_moved(world: Path, name: str, share: float = 0.9) -> None:
    """More than that share of the file's deltas are not 0."""
    norms = delta_norms(tensors(world, name))
    moved = sum(norm > 0 for norm in norms)
    print(f"--- {name}: {moved} of {len(norms)} deltas moved")
    assert moved > share * len(norms)


def check_kept(world: Path, name: str, file: Path) -> None:
    """The run's deltas are not 0, and none of them reaches a direction of that file of `keep`."""
    check_moved(world, name)
    directions, adapter = deft_keep.read_kept(file), deft_io.read_adapter(world / "out" / f"{name}.safetensors")
    assert adapter.layers.keys() <= directions.keys()
    for layer, found in adapter.layers.items():
        assert float((found.down.flatten(1) @ directions[layer]).norm()) <= 1e-4 * float(found.down.norm()), layer


def check_resuming(world: Path, train: Callable[..., str]) -> None:
    """Resumes the run "base", which saved states, from its first step."""
    output = train(world, "resumed", "--resume", str(world / "out" / "base-step00000001-state"))
    assert "load train state" in output
    states = [
        load_file(world / "out" / name / "model.safetensors") for name in ("base-step00000001-state", "base-state")
    ]
    assert states[0].keys() == states[1].keys()
    assert {key.rsplit(".")[-1] for key in states[0]} == {"P", "R"}
    moved = [key for key in states[0] if not torch.equal(states[0][key], states[1][key])]
    assert {key.rsplit(".")[-1] for key in moved} == {"P", "R"}


def check_keeping(world: Path, train: Callable[..., str]) -> None:
    """Samples before the first step make the file to keep, and a second training finds it.

    :param train: of a world, a name and options; returns what the trainer printed
    """
    prompts, file = world / "samples.txt", world / "out" / "kept" / "keep.safetensors"
    shutil.rmtree(file.parent, ignore_errors=True)
    things = ("cat", "red car", "house by the sea", "old man", "bowl of fruit", "mountain", "city at night", "rose")
    lines = [f"a {how} of a {thing} --w 64 --h 64 --s 1" for thing in things for how in ("photo", "drawing")]
    prompts.write_text("\n".join(lines), encoding="utf-8")
    keeps = ("--network_args", f"keep={file}")
    train(world, "sampled", *keeps, "--sample_at_first", "--sample_prompts", str(prompts))
    first = file.read_bytes()
    train(world, "sampled-again", *keeps)
    assert file.read_bytes() == first
    for name in ("sampled", "sampled-again"):
        check_kept(world, name, file)


def draw(
    script: str, world: Path, ways: list[tuple[str, ...]], *options: str, run: str = "base"
) -> dict[tuple[str, ...], torch.Tensor]:
    """Pixels that a generator of sd-scripts draws with the file of a run: (network module, further options) -> values
    from 0 to 255."""
    images = {}
    for name, *more in ways:
        folder = world / "generated" / run / "".join([name, *more])
        command = ["--ckpt", str(world / "model"), "--outdir", str(folder), "--no_preview"]
        command += ["--tokenizer_cache_dir", str(world / "tokenizers"), "--prompt", "sks thing", "--sampler", "ddim"]
        command += ["--W", "64", "--H", "64", "--seed", "1", *options]
        if name != "none":
            command += ["--network_module", name, "--network_mul", "0.7", *more]
            command += ["--network_weights", str(world / "out" / f"{run}.safetensors")]
        run_script(script, *command)
        (path,) = folder.glob("*.png")
        pixels = torch.tensor(list(Image.open(path).convert("RGB").tobytes()), dtype=torch.float32)
        images[(name, *more)] = pixels
    for how, pixels in images.items():
        difference = float((pixels - images[("networks.lora",)]).abs().max())
        print(f"--- {script} {' '.join(how)}: largest pixel difference to networks.lora {difference:.0f} of 255")
    return images
