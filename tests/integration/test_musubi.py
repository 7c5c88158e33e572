"""musubi-tuner's own trainers, networks and merging, with networks.deft, on a CPU.

    MUSUBI_DIR=/path/to/musubi-tuner MUSUBI_PYTHON=/path/to/its/venv/bin/python pytest tests/integration/test_musubi.py

About a quarter of an hour. The trainers run as they are, from cached latents and texts to the saved file; the models
are of its own classes, with one block of each kind and random weights. With MUSUBI_LARGE=1 they have their real widths.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from networks import convert_deft, deft_io
from tests.integration.conftest import ROOT, delta_norms
from tests.test_musubi_files import assert_equal, changes, products, saved, trained

MUSUBI = os.environ.get("MUSUBI_DIR")
PYTHON = os.environ.get("MUSUBI_PYTHON", sys.executable)
SIDE = Path(__file__).with_name("musubi_side.py")

pytestmark = pytest.mark.skipif(not MUSUBI, reason="set MUSUBI_DIR to a checkout of kohya-ss/musubi-tuner")

# trainer -> what it needs to be told, its layers, and what it calls the model
KINDS: dict[str, tuple[tuple[str, ...], int, str]] = {
    "zimage": ((), 7, "z_image"),
    "flux_kontext": ((), 10, "flux_kontext"),
    "flux_2": (("--model_version", "klein-base-4b"), 10, "flux_2_klein_4b"),
    "qwen_image": (("--num_layers", "1"), 14, "qwen_image"),
    "wan": (("--task", "t2v-1.3B"), 10, "wan"),
}


def run(script: Path, *arguments: str | Path, fails: bool = False) -> str:
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(Path(MUSUBI or "") / "src")]),
        "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": os.environ.get("MUSUBI_THREADS", "1"),
    }
    command = [PYTHON, str(script), *map(str, arguments)]
    done = subprocess.run(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert (done.returncode != 0) == fails, done.stdout[-4000:]
    return done.stdout


def train(kind: str, folder: Path, name: str, *options: str, fails: bool = False) -> str:
    return run(
        SIDE, "train", kind, "--dit", folder / f"{kind}.safetensors", "--dataset_config", folder / "data.toml",
        "--sdpa", "--mixed_precision", "bf16", "--optimizer_type", "AdamW", "--learning_rate", "1e-3",
        "--max_train_steps", "2", "--max_data_loader_n_workers", "0", "--seed", "0", "--timestep_sampling", "uniform",
        "--network_module", "networks.deft", "--network_dim", "4", "--network_alpha", "2",
        "--output_dir", folder / "out", "--output_name", name, *KINDS[kind][0], *options, fails=fails,
    )  # fmt: skip


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    """Kind -> its folder, with the model, the caches, and a first training's file `base`."""
    made: dict[str, Path] = {}

    def of(kind: str) -> Path:
        if kind not in made:
            folder = tmp_path_factory.mktemp(kind)
            run(SIDE, "world", kind, folder)
            train(kind, folder, "base")
            made[kind] = folder
        return made[kind]

    return of


def tensors(folder: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(folder / "out" / f"{name}.safetensors")


def key_name(key: str) -> str:
    """Of a model's weight, or of a matrix with ComfyUI's names."""
    path = key.removeprefix("diffusion_model.").removesuffix(".weight").removesuffix(".lora_B")
    return f"lora_unet_{path.replace('.', '_')}"


def metadata(folder: Path, name: str) -> dict[str, str]:
    with safe_open(str(folder / "out" / f"{name}.safetensors"), framework="pt") as file:
        return file.metadata()


def test_layers_and_ranks_of_every_architecture(tmp_path):
    """On models of the real shapes, for the options that choose layers: its own networks are the reference."""
    file = tmp_path / "found.json"
    run(SIDE.with_name("musubi_layers_side.py"), file)
    found = json.loads(file.read_text())
    assert len(found) > 40
    for what, (theirs, ours) in found.items():
        assert ours == theirs, what


@pytest.mark.parametrize("kind", KINDS)
def test_trains_and_saves(worlds, kind):
    folder, (_, number, called) = worlds(kind), KINDS[kind]
    found, known = tensors(folder, "base"), metadata(folder, "base")
    assert len(found) == (2 if kind == "zimage" else 3) * number
    assert {value.dtype for value in found.values()} == {torch.float32}  # its default
    assert all(value.isfinite().all() for value in found.values())
    moved = sum(norm > 0 for norm in delta_norms(found))
    assert moved > 0.6 * number  # what the text becomes in a last block is not used
    assert known["ss_network_module"] == "networks.deft"
    assert known["ss_base_model_version"] == called
    assert json.loads(known["deft_options"])["alpha"] == 2.0


@pytest.mark.parametrize("kind", KINDS)
def test_musubis_own_network_reads_and_merges_the_file(worlds, kind, tmp_path):
    """No name is unknown to it or missing, and what its own merge adds to a weight is the file's up @ down; so are the
    matrices that its convert_lora.py writes. Z-Image's file has ComfyUI's names, which that makes its own of."""
    folder, merged, file = worlds(kind), tmp_path / "merged.safetensors", tmp_path / "default.safetensors"
    script = Path(MUSUBI or "") / "src" / "musubi_tuner" / "convert_lora.py"
    base = folder / "out" / "base.safetensors"
    if kind == "zimage":
        run(script, "--input", base, "--output", file, "--target", "default")
    else:
        file = base
    output = run(SIDE, "read", kind, file, merged)
    told = next(line for line in output.splitlines() if line.startswith("--- "))
    assert json.loads(told.removeprefix("--- ")) == [[], []]
    adapter = deft_io.read_adapter(base)
    weights = {key_name(key): weight.double() for key, weight in load_file(merged).items()}
    converted = tmp_path / "converted.safetensors"
    run(script, "--input", file, "--output", converted, "--target", "other")
    matrices = {key: value.double() for key, value in load_file(converted).items()}
    products = {key_name(key): matrices[key] @ matrices[key.replace("lora_B", "lora_A")]
                for key in matrices if "lora_B" in key}  # fmt: skip
    assert (
        products.keys()
        == adapter.layers.keys()
        == {name for name, weight in weights.items() if weight.any()}
        | {name for name, layer in adapter.layers.items() if not (layer.up @ layer.down).any()}
    )
    for name, layer in adapter.layers.items():
        delta = layer.up.double() @ layer.down.double()
        for found in (weights[name], products[name]):
            assert float((found - delta).norm()) <= 1e-6 * float(delta.norm()), name


@pytest.mark.parametrize(("name", "script", "options"), [
    ("Z-Image", "convert_lora.py", "--target default"),
    ("HunyuanVideo", "convert_lora.py", "--target default"),
    ("HunyuanVideo 1.5", "networks/convert_hunyuan_video_1_5_lora_to_comfy.py", "--reverse"),
])  # fmt: skip
def test_its_converters_give_files_its_own_names(name, script, options, tmp_path):
    """Where they have ComfyUI's; with the same deltas, one layer of its own network each."""
    network, file, output = trained(name), tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    saved(network, file)
    files = (file, output) if "networks" in script else ("--input", file, "--output", output)
    run(Path(MUSUBI or "") / "src" / "musubi_tuner" / script, *files, *options.split())
    expected = {f"lora_unet_{path.replace('.', '_')}": change for path, change in changes(network).items()}
    assert_equal(products(load_file(output)), expected)


def test_it_merges_a_file_of_hidream_o1_that_is_converted(tmp_path):
    """What it has no converter for: our own gives the file its names."""
    network, file, output = trained("HiDream-O1"), tmp_path / "x.safetensors", tmp_path / "y.safetensors"
    saved(network, file)
    assert convert_deft.main([str(file), "--save_to", str(output), "--to", "kohya"]) == 0
    told = run(SIDE, "read", "hidream_o1", output, tmp_path / "merged.safetensors")
    assert json.loads(told.partition("--- ")[2].splitlines()[0]) == [[], []]
    merged = load_file(tmp_path / "merged.safetensors")
    weights = {key.removesuffix(".weight"): w.double() for key, w in merged.items() if w.any()}
    assert_equal(weights, changes(network), 1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_goes_on_from_weights_and_merges_base_weights(worlds, kind):
    """At a rate that moves nothing the file that a training goes on from comes out again; merged into the model by
    `--base_weights`, it is another model."""
    folder = worlds(kind)
    file = str(folder / "out" / "base.safetensors")
    output = train(kind, folder, "further", "--network_weights", file, "--learning_rate", "1e-12")
    assert f"{KINDS[kind][1]} modules loaded" in output
    before, after = deft_io.read_adapter(file), deft_io.read_adapter(folder / "out" / "further.safetensors")
    assert before.layers.keys() == after.layers.keys()
    for name, layer in before.layers.items():
        own, again = (found.up.double() @ found.down.double() for found in (layer, after.layers[name]))
        assert float((own - again).norm()) <= 1e-5 * float(own.norm()), name
    output = train(kind, folder, "merged", "--base_weights", file, "--base_weights_multiplier", "0.5")
    assert "weights are merged" in output
    hashes = {metadata(folder, name)["deft_base_hash"] for name in ("base", "further", "merged")}
    assert len(hashes) == 2
    assert metadata(folder, "merged")["deft_base_hash"] != metadata(folder, "base")["deft_base_hash"]


def test_options_without_an_equals_sign(worlds):
    folder = worlds("zimage")
    options = ("network_reg_dims=.*feed_forward.*:2,.*to_q:3", "exclude_patterns=['.*to_v']", "loraplus_lr_ratio=4")
    train("zimage", folder, "chosen", "--network_dropout", "0.1", "--network_args", *options)
    ranks = json.loads(metadata(folder, "chosen")["deft_layers"])
    assert {name.rpartition("_")[2]: rank for name, (rank, *_) in ranks.items()} == {
        "q": 3, "k": 4, "0": 4, "w1": 2, "w2": 2, "w3": 2,
    }  # fmt: skip
    assert json.loads(metadata(folder, "chosen")["deft_options"])["neuron_dropout"] == 0.1
    output = train("zimage", folder, "none", "--network_args", "network_reg_dims=x=4", fails=True)
    assert "too many values to unpack" in output  # its own, whatever the network


def test_states_norms_checkpointing_and_fp8(worlds):
    """A state resumes; weight norms are scaled; checkpointed blocks and bases of fp8, plain and scaled, train."""
    folder = worlds("zimage")
    train("zimage", folder, "states", "--save_state", "--save_every_n_steps", "1", "--scale_weight_norms", "0.001")
    assert max(delta_norms(tensors(folder, "states"))) < 0.001 * (1 + 1e-3)
    state = next((folder / "out").glob("states*step*1-state"))
    train("zimage", folder, "resumed", "--resume", str(state))
    for name, options in {"plain": ("--fp8_base",), "scaled": ("--fp8_base", "--fp8_scaled")}.items():
        train("zimage", folder, name, *options, "--gradient_checkpointing")
        assert min(delta_norms(tensors(folder, name))) > 0
    hashes = {metadata(folder, name)["deft_base_hash"] for name in ("states", "plain", "scaled")}
    assert len(hashes) == 3
