"""The real train_network.py of sd-scripts on a full-size SD 1.5 with random weights, on a CPU.

    SD_SCRIPTS_DIR=/path/to/sd-scripts SD_SCRIPTS_PYTHON=/path/to/its/venv/bin/python pytest tests/integration

About ten minutes. `-s` shows what the training prints at its end.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
SD_SCRIPTS = os.environ.get("SD_SCRIPTS_DIR")
PYTHON = os.environ.get("SD_SCRIPTS_PYTHON", sys.executable)
SIDE = Path(__file__).with_name("sd_scripts_side.py")

pytestmark = pytest.mark.skipif(not SD_SCRIPTS, reason="set SD_SCRIPTS_DIR to a checkout of kohya-ss/sd-scripts")


def call(command: list[str], folder: str | Path, with_deft: bool = True) -> subprocess.CompletedProcess:
    environment = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONIOENCODING": "utf-8",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": os.pathsep.join([str(folder), *([str(ROOT)] if with_deft else [])]),
    }
    return subprocess.run(
        command, cwd=folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sd15")
    made = call([PYTHON, str(SIDE), "model", str(folder)], folder)
    assert made.returncode == 0, made.stdout[-3000:]
    return folder


def train(
    world: Path,
    name: str,
    *options: str,
    fails: bool = False,
    checkout: str | Path | None = None,
    script: str = "train_network.py",
    precision: str = "no",
) -> str:
    """Runs a trainer for two steps; returns its output. Options come last, so they may say another model."""
    command = [PYTHON, "-m", "accelerate.commands.launch", "--cpu", "--num_processes", "1", "--num_machines", "1"]
    command += ["--mixed_precision", precision, "--dynamo_backend", "no", "--num_cpu_threads_per_process", "1"]
    command += [script, "--pretrained_model_name_or_path", str(world / "model")]
    command += ["--tokenizer_cache_dir", str(world / "tokenizers"), "--train_data_dir", str(world / "images")]
    command += ["--caption_extension", ".txt", "--resolution", "64", "--max_data_loader_n_workers", "0"]
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


def delta_norms(found: dict[str, torch.Tensor]) -> list[float]:
    ups = [key for key in found if key.endswith("lora_up.weight")]
    return [float((found[k].flatten(1) @ found[k.replace("lora_up", "lora_down")].flatten(1)).norm()) for k in ups]


STATES = ("--save_state", "--save_every_n_steps", "1")


@pytest.fixture(scope="session")
def trained(world) -> str:
    return train(world, "base", *STATES)


def test_names_are_those_of_networks_lora(tmp_path):
    done = call([PYTHON, str(SIDE), "names", str(tmp_path / "names.json")], SD_SCRIPTS or "")
    assert done.returncode == 0, done.stdout[-3000:]
    for theirs, ours in json.loads((tmp_path / "names.json").read_text()).values():
        assert ours == theirs
        assert list(ours) == list(theirs)


def test_layers_and_ranks_of_every_architecture(tmp_path):
    """On models of real shapes, for every option that chooses layers: sd-scripts' own classes are the reference."""
    file = tmp_path / "found.json"
    done = call([PYTHON, str(SIDE.with_name("architectures_side.py")), str(file)], SD_SCRIPTS or "")
    assert done.returncode == 0, done.stdout[-3000:]
    found = json.loads(file.read_text())
    assert len(found) > 40
    for what, (theirs, ours) in found.items():
        assert sorted(ours) == sorted(theirs), what
        assert ours == theirs or "refiners" in what, what  # there, sd-scripts has another order


def test_one_step_on_every_transformer(tmp_path):
    """A small model of each real class: a fresh adapter changes nothing, every module gets gradients, and sd-scripts'
    own network computes from the file what was trained."""
    file = tmp_path / "found.json"
    done = call([PYTHON, str(SIDE.with_name("steps_side.py")), str(file)], SD_SCRIPTS or "")
    assert done.returncode == 0, done.stdout[-3000:]
    print("\n".join(line for line in done.stdout.splitlines() if line.startswith("---")))
    for name, found in json.loads(file.read_text()).items():
        assert found["fresh"] == 0, name
        assert found["with gradients"] == found["modules"], name
        assert found["trained"] > 1e-3, name
        assert found["read"] < (2e-2 if name == "hunyuan" else 1e-5), name  # that one in bfloat16
        assert found["unmatched"] == 0, name


def test_trains_and_saves(world, trained):
    found = tensors(world, "base")
    assert len(found) == 3 * 264
    assert all(value.isfinite().all() for value in found.values())
    norms = delta_norms(found)
    assert sum(norm > 0 for norm in norms) >= 262  # at 64 pixels the mid block has one position: q and k stand still
    known = metadata(world, "base")
    assert known["ss_network_module"] == "networks.deft"
    assert json.loads(known["deft_options"])["alpha"] == 2.0


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


def test_resumes(world, trained):
    check_resuming(world, train)


@pytest.mark.parametrize("options", [(), ("--dim_from_weights",)], ids=["network_weights", "dim_from_weights"])
def test_continues_from_weights(world, trained, options):
    name = f"continued{len(options)}"
    file = str(world / "out" / "base.safetensors")
    output = train(world, name, "--network_weights", file, *options)
    assert "264 modules loaded" in " ".join(output.split())
    assert tensors(world, name)["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"].shape[0] == 4


def test_merges_base_weights(world, trained):
    file = str(world / "out" / "base.safetensors")
    output = train(world, "merged", "--base_weights", file, "--base_weights_multiplier", "0.5")
    assert "weights are merged" in output
    assert len(tensors(world, "merged")) == 3 * 264
    assert metadata(world, "merged")["deft_base_hash"] != metadata(world, "base")["deft_base_hash"]


@pytest.mark.parametrize(("half", "prefix", "count"), [("unet", "lora_unet", 192), ("text_encoder", "lora_te", 72)])
def test_trains_one_half(world, half, prefix, count):
    train(world, half, f"--network_train_{half}_only")
    found = tensors(world, half)
    assert len(found) == 3 * count
    assert all(key.startswith(prefix) for key in found)


def test_scales_weight_norms(world):
    output = train(world, "norms", "--scale_weight_norms", "0.001")
    assert "Keys Scaled=" in output
    assert max(delta_norms(tensors(world, "norms"))) < 0.001 * (1 + 1e-3)


def test_convolutions_para_and_dropouts(world):
    arguments = ["conv_dim=2", "conv_alpha=2", "rank_dropout=0.1", "module_dropout=0.1", "gate=true", "basis=relu"]
    train(world, "conv", "--network_dropout", "0.1", "--gradient_checkpointing", "--network_args", *arguments)
    assert len(tensors(world, "conv")) == 3 * (72 + 278)
    train(world, "para", "--network_args", "para=true")
    assert min(delta_norms(tensors(world, "para"))) > 0


def test_a_misspelt_option_ends_the_run_before_it_begins(world):
    output = train(world, "wrong", "--network_args", "convdim=4", fails=True)
    assert "unknown network_args key 'convdim' (did you mean 'conv_dim'?)" in output
    assert not (world / "out" / "wrong.safetensors").exists()


def draw(script: str, world: Path, ways: list[tuple[str, ...]], *options: str) -> dict[tuple[str, ...], torch.Tensor]:
    """Pixels that a generator of sd-scripts draws: (network module, further options) -> values from 0 to 255."""
    images = {}
    for name, *more in ways:
        folder = world / "generated" / "".join([name, *more])
        command = [PYTHON, script, "--ckpt", str(world / "model"), "--outdir", str(folder), "--no_preview"]
        command += ["--tokenizer_cache_dir", str(world / "tokenizers"), "--prompt", "sks thing", "--sampler", "ddim"]
        command += ["--W", "64", "--H", "64", "--seed", "1", *options]
        if name != "none":
            command += ["--network_module", name, "--network_mul", "0.7", *more]
            command += ["--network_weights", str(world / "out" / "base.safetensors")]
        done = call(command, SD_SCRIPTS or "")
        assert done.returncode == 0, done.stdout[-3000:]
        (path,) = folder.glob("*.png")
        pixels = torch.tensor(list(Image.open(path).convert("RGB").tobytes()), dtype=torch.float32)
        images[(name, *more)] = pixels
    for how, pixels in images.items():
        difference = float((pixels - images[("networks.lora",)]).abs().max())
        print(f"--- {script} {' '.join(how)}: largest pixel difference to networks.lora {difference:.0f} of 255")
    return images


def test_gen_img_draws_with_the_file_what_it_draws_with_networks_lora(world, trained):
    """Applied, merged, and pre-calculated; the reference is sd-scripts' own LoRA class on the same file."""
    ways = [("networks.lora",), ("networks.deft",), ("networks.deft", "--network_merge"),
            ("networks.deft", "--network_pre_calc")]  # fmt: skip
    images = draw("gen_img.py", world, ways, "--steps", "4")
    for pixels in images.values():
        assert float((pixels - images[("networks.lora",)]).abs().max()) < 3


def test_stays_out_of_the_directions_that_the_model_draws_with(world):
    """`library.keep` on the full-size model, then a training with its file."""
    from library import keep
    from networks import deft_io

    prompts, file = world / "prompts.txt", world / "keep.safetensors"
    prompts.write_text("a photo of a cat --d 1 --s 2\na red car --d 2 --s 2\n", encoding="utf-8")
    command = [
        "--pretrained_model_name_or_path",
        str(world / "model"),
        "--prompts",
        str(prompts),
        "--output",
        str(file),
    ]
    assert keep.main([*command, "--resolution", "64", "--device", "cpu", "--directions", "16"]) == 0
    train(world, "kept", "--network_args", f"keep={file}")
    directions, adapter = deft_io.read_kept(file), deft_io.read_adapter(world / "out" / "kept.safetensors")
    assert sum(norm > 0 for norm in delta_norms(tensors(world, "kept"))) >= 262
    assert adapter.layers.keys() <= directions.keys()
    for name, layer in adapter.layers.items():
        assert float((layer.down @ directions[name]).norm()) <= 1e-4 * float(layer.down.norm()), name


def check_keeping(world: Path, train: Callable[..., str]) -> None:
    """Samples before the first step make the file to keep, and a second training finds it.

    :param train: of a world, a name and options; returns what the trainer printed
    """
    from networks import deft_io

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
    directions = deft_io.read_kept(file)
    for name in ("sampled", "sampled-again"):
        adapter = deft_io.read_adapter(world / "out" / f"{name}.safetensors")
        assert adapter.layers.keys() == directions.keys()
        norms = delta_norms(tensors(world, name))
        assert sum(norm > 0 for norm in norms) > 0.9 * len(norms)
        for layer, found in adapter.layers.items():
            assert float((found.down.flatten(1) @ directions[layer]).norm()) <= 1e-4 * float(found.down.norm()), layer


def test_samples_before_the_first_step_make_the_file_to_keep(world):
    check_keeping(world, train)
    output = train(world, "no-samples", "--network_args", f"keep={world / 'none.safetensors'}", fails=True)
    assert "--sample_at_first" in output


def test_single_file_is_the_same_model(world):
    """The checkpoint as sd-scripts' own tool writes it from the Diffusers folder."""
    from library import sd

    single = world / "single.safetensors"
    command = [PYTHON, "tools/convert_diffusers20_original_sd.py", str(world / "model"), str(single), "--v1", "--fp16"]
    done = call(command, SD_SCRIPTS or "")
    assert done.returncode == 0, done.stdout[-3000:]
    one = sd.load(str(single), tokenizer_cache_dir=str(world / "tokenizers"))
    two = sd.load(str(world / "model"))
    for part in ("unet", "vae", "text_encoder"):
        ours, theirs = (getattr(m, part).state_dict() for m in (one, two))
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    assert torch.equal(one.encode_text(["sks"]), two.encode_text(["sks"]))


def test_files_copied_into_the_checkout(world, tmp_path):
    checkout = tmp_path / "sd-scripts"
    shutil.copytree(SD_SCRIPTS or "", checkout, ignore=shutil.ignore_patterns(".git"))
    for file in (ROOT / "networks").glob("deft*.py"):
        shutil.copy(file, checkout / "networks")
    train(world, "copied", checkout=checkout)
    assert len(tensors(world, "copied")) == 3 * 264
