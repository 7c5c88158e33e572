"""Our trainer trains as sd-scripts' real trainers do: the same model and adapter, ten steps with the same latents,
captions, noise and timesteps, each side's own `train` in a process of its own.

    SD_SCRIPTS_LARGE=/folder SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... pytest tests/integration/test_trainer_steps.py -s

SD 1.5 at full size; with SD_SCRIPTS_LARGE also SDXL at full size, and FLUX.1 of real widths with one double and two
single blocks and one layer of T5. SDXL in float32 needs about 20 GB of memory.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.integration.conftest import PYTHON, ROOT, SD_SCRIPTS, call, large_world, needs_large, needs_sd_scripts

pytestmark = needs_sd_scripts

SCRIPT = Path(__file__).with_name("trainer_steps_side.py")
LOSS = {"no": 1e-5, "bf16": 2e-3}  # largest relative deviation of a step's loss
DELTAS = 1e-3  # relative Frobenius norm over all layers, in float32

TRAINERS = {"sd15": "train_network", "sdxl": "sdxl_train_network", "flux": "flux_train_network"}
OPTIONS = {
    "sd15": "",
    "sdxl": "--network_train_unet_only --gradient_checkpointing --no_half_vae",
    "flux": "--network_train_unet_only --gradient_checkpointing --timestep_sampling shift --discrete_flow_shift 3.1582 "
    "--model_prediction_type raw --guidance_scale 1 --t5xxl_max_token_length 64",
}
LARGE = ("sdxl", "flux")
FAMILIES = [pytest.param(family, marks=needs_large if family in LARGE else ()) for family in TRAINERS]


def run(ours: bool, *arguments: str | Path) -> None:
    python, folder = (sys.executable, ROOT) if ours else (PYTHON, SD_SCRIPTS or "")
    done = call([python, str(SCRIPT), *map(str, arguments)], folder)
    assert done.returncode == 0, done.stdout[-4000:]


@pytest.fixture(scope="module")
def model(request, tmp_path_factory):
    """A family's folder, with its adapter and what its steps see; and the options of its model for both."""
    family = request.param
    folder = tmp_path_factory.mktemp(family)
    if family == "flux":
        run(False, "flux", folder, "")
        made, files = folder, {"pretrained_model_name_or_path": "flux", "clip_l": "clip", "t5xxl": "t5", "ae": "ae"}
    else:
        made = request.getfixturevalue("world") if family == "sd15" else large_world(family)
        files = {"pretrained_model_name_or_path": "model"}
        run(True, "single", made / "model", folder / "model.safetensors")
    options = [word for name, file in files.items() for word in (f"--{name}", str(folder / f"{file}.safetensors"))]
    options += ["--tokenizer_cache_dir", str(made / "tokenizers"), "--train_data_dir", str(made / "images")]
    options += ["--caption_extension", ".txt", "--resolution", "64", "--max_data_loader_n_workers", "0", "--sdpa"]
    options += ["--network_module", "networks.deft", "--max_train_steps", "10", "--learning_rate", "1e-3"]
    options += ["--optimizer_type", "AdamW", "--save_precision", "float", "--save_model_as", "safetensors"]
    options += ["--seed", "1", *OPTIONS[family].split()]
    run(True, "make", folder, "", *options, "--output_dir", str(folder))
    options += ["--network_weights", str(folder / "adapter.safetensors"), "--dim_from_weights"]
    yield family, folder, options
    shutil.rmtree(folder)


def deltas(file: Path) -> dict[str, torch.Tensor]:
    """Layer -> up @ down, float64, flat."""
    found = load_file(file)
    layers = sorted(key.removesuffix(".lora_up.weight") for key in found if key.endswith(".lora_up.weight"))
    return {
        layer: (found[f"{layer}.lora_up.weight"].double().flatten(1)
                @ found[f"{layer}.lora_down.weight"].double().flatten(1)
                * (found[f"{layer}.alpha"].double() / len(found[f"{layer}.lora_down.weight"])))
        for layer in layers
    }  # fmt: skip


def distances(folder: Path, ours: str, theirs: str) -> tuple[float, float, float]:
    """Of all layers together: ours from theirs relative to theirs, and to how far theirs have moved; and how far they
    have moved, relative to themselves."""
    found = [deltas(folder / f"{name}.safetensors") for name in (ours, theirs, "adapter")]
    assert found[0].keys() == found[1].keys() == found[2].keys()
    apart = moved = size = 0.0
    for layer, their in found[1].items():
        apart += float((found[0][layer] - their).square().sum())
        moved += float((found[2][layer] - their).square().sum())
        size += float(their.square().sum())
    return (apart / size) ** 0.5, (apart / moved) ** 0.5, (moved / size) ** 0.5


@pytest.mark.parametrize("precision", LOSS)
@pytest.mark.parametrize("model", FAMILIES, indirect=True)  # apart from the precision, so that one is made for both
def test_ten_steps(model, precision):
    family, folder, options = model
    names, found = {who: f"{who}-{precision}" for who in ("ours", "theirs")}, {}
    for who, name in names.items():
        argv = [TRAINERS[family], *options, "--mixed_precision", precision]
        if who == "ours":  # what ours has no need of
            argv = [word for word in argv if word != "--no_half_vae"]
        elif family == "flux":  # diffusers has these as layers of their own; fused, Adam would take other steps
            argv += ["--network_args", "split_qkv=true"]
        run(who == "ours", who, folder, name, *argv)
        found[who] = json.loads((folder / f"{name}.json").read_text())
    ours, theirs = (torch.tensor(found[who]["losses"], dtype=torch.float64) for who in names)
    assert len(ours) == len(theirs) == 10
    loss = float(((ours - theirs) / theirs).abs().max())
    apart, of_moved, moved = distances(folder, names["ours"], names["theirs"])
    needs = {who: (found[who]["seconds"], found[who]["GiB"]) for who in names}
    print(f"--- {family} {precision}: losses {loss:.1e}; deltas {apart:.1e}, of what has moved {of_moved:.1e}, "
          f"which is {moved:.2f}; seconds and GiB {needs}; losses {theirs.tolist()}, {ours.tolist()}")  # fmt: skip
    assert 0.01 < moved < 0.9  # of an adapter that was not 0, much is left, and much is new
    assert loss < LOSS[precision]
    assert precision != "no" or apart < DELTAS
