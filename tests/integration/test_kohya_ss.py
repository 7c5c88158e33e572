"""The presets of configs/kohya_ss in the bmaltais GUI: its preset list, its boxes, its button, sd-scripts' parser.

    KOHYA_SS_DIR=/path/to/kohya_ss KOHYA_SS_PYTHON=/path/to/its/venv/bin/python \\
    SD_SCRIPTS_DIR=/path/to/sd-scripts SD_SCRIPTS_PYTHON=/path/to/its/venv/bin/python \\
      pytest tests/integration/test_kohya_ss.py -s

SD_SCRIPTS_DIR: kohya_ss/sd-scripts where not given. A copy of both is made and set up as docs/kohya_ss.md says. The GUI
needs gradio, easygui, rich, toml, psutil, safetensors and pillow alone. Five minutes; one training is real, on a
full-size SD 1.5 with random weights, on a CPU.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from safetensors import safe_open

from tests.integration.conftest import PYTHON, ROOT, needs_sd_scripts

KOHYA_SS = os.environ.get("KOHYA_SS_DIR", "")
GUI_PYTHON = os.environ.get("KOHYA_SS_PYTHON", sys.executable)
SD_SCRIPTS = os.environ.get("SD_SCRIPTS_DIR") or os.path.join(KOHYA_SS, "sd-scripts")
SIDE = Path(__file__).with_name("kohya_ss_side.py")
PHOTOS = ROOT / "configs" / "quickstart" / "photos" / "8_sks cat"
OURS = sorted((ROOT / "configs" / "kohya_ss").glob("*.json"))

pytestmark = pytest.mark.skipif(not KOHYA_SS, reason="set KOHYA_SS_DIR to a checkout of bmaltais/kohya_ss")


def listed(name: str) -> str:
    """As the GUI's list shows it."""
    return os.path.join("user_presets", f"DEFT - {name}")


class Gui:
    """A copy of the GUI in which DEFT is set up, and a user's own folders."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.kohya = folder, folder / "kohya_ss"
        self.bin, self.real, self.record = folder / "stand-in", folder / "real", folder / "recorded"
        for part in ("kohya_gui", "presets"):
            shutil.copytree(Path(KOHYA_SS) / part, self.kohya / part)
        shutil.copytree(SD_SCRIPTS, self.kohya / "sd-scripts", ignore=shutil.ignore_patterns(".git", "deft*.py"))
        for file in (ROOT / "networks").glob("deft*.py"):
            shutil.copy(file, self.kohya / "sd-scripts" / "networks")
        for preset in OURS:
            shutil.copy(preset, self.kohya / "presets" / "lora" / "user_presets")
        for bin_folder, does in (
            (self.bin, f'"{SIDE}" accelerate "$@"'),
            (self.real, '-m accelerate.commands.accelerate_cli "$@"'),
        ):
            bin_folder.mkdir()
            (bin_folder / "accelerate").write_text(f'#!/bin/sh\nexec "{PYTHON}" {does}\n')
            (bin_folder / "accelerate").chmod(0o755)
        images = folder / "images" / "10_sks cat"
        images.mkdir(parents=True)
        for photo in PHOTOS.iterdir():
            shutil.copy(photo, images)
        for part in ("model", "ae", "clip_l", "t5xxl"):
            (folder / f"{part}.safetensors").touch()
        self.own = {
            "pretrained_model_name_or_path": str(folder / "model.safetensors"),
            "train_data_dir": str(images.parent),
            "output_dir": str(folder / "out"),
            "logging_dir": str(folder / "logs"),
            "output_name": "cat",
            "ae": str(folder / "ae.safetensors"),
            "clip_l": str(folder / "clip_l.safetensors"),
            "t5xxl": str(folder / "t5xxl.safetensors"),
            "seed": 42,
            "sample_prompts": "sks cat",
        }
        for key in ("output_dir", "logging_dir"):
            Path(self.own[key]).mkdir()

    def run(self, *cases: list[str | dict[str, Any]], start: Path | None = None) -> list[dict[str, Any]]:
        """Each case lists presets to choose and boxes to fill in, behind the user's own.

        :param start: press the button, and this folder's `accelerate` is what the GUI finds; else print the command
        """
        request, result = self.folder / "request.json", self.folder / "result.json"
        request.write_text(json.dumps([{"steps": [self.own, *case], "start": bool(start)} for case in cases]))
        self.record.unlink(missing_ok=True)
        environment = os.environ | {
            "PATH": os.pathsep.join([str(start or self.bin), os.environ["PATH"]]),
            "RECORDED": str(self.record),
            "HF_HUB_OFFLINE": "1",
            "GRADIO_ANALYTICS_ENABLED": "False",
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": "",
        }
        command = [GUI_PYTHON, str(SIDE), "gui", str(self.kohya), str(request), str(result)]
        done = subprocess.run(
            command, cwd=self.folder, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        assert done.returncode == 0, done.stdout[-4000:]
        results = json.loads(result.read_text())
        assert all(r["exit_code"] == 0 for r in results if "exit_code" in r), done.stdout[-4000:]
        if self.record.exists():
            for r, line in zip(results, self.record.read_text().splitlines(), strict=True):
                r["recorded"] = json.loads(line)
        return results


@pytest.fixture(scope="module")
def gui(tmp_path_factory) -> Gui:
    return Gui(tmp_path_factory.mktemp("gui"))


# what docs/kohya_ss.md promises of each
EVERY: dict[str, Any] = {
    "network_module": "networks.deft", "network_dim": 16, "network_alpha": 16, "unet_lr": 2e-4, "train_batch_size": 1,
    "optimizer_type": "AdamW", "lr_scheduler": "constant", "lr_warmup_steps": 0, "gradient_checkpointing": True,
    "cache_latents": True, "sdpa": True, "xformers": False, "enable_bucket": True, "caption_extension": ".txt",
    "save_precision": "fp16", "network_dropout": None, "scale_weight_norms": None,
}  # fmt: skip
BIG = {"max_train_steps": 2000, "resolution": "1024,1024", "mixed_precision": "bf16",
       "cache_text_encoder_outputs": True, "network_train_unet_only": True, "text_encoder_lr": None}  # fmt: skip
ARRIVES: dict[str, dict[str, Any]] = {
    "SD 1.5": EVERY | {"max_train_steps": 1500, "resolution": "512,512", "mixed_precision": "fp16", "full_fp16": False,
                       "network_train_unet_only": False, "text_encoder_lr": [5e-5, 5e-5]},
    "SDXL": EVERY | BIG | {"full_bf16": True, "no_half_vae": True},
    "FLUX.1": EVERY | BIG | {"full_bf16": False, "fp8_base": True, "blocks_to_swap": 18, "timestep_sampling": "shift",
                             "discrete_flow_shift": 3.1582, "model_prediction_type": "raw", "guidance_scale": 1.0,
                             "model_type": "flux"},
}  # fmt: skip
SCRIPT = {"SD 1.5": "train_network.py", "SDXL": "sdxl_train_network.py", "FLUX.1": "flux_train_network.py"}


def test_every_preset_arrives_at_sd_scripts_as_it_was_chosen(gui):
    assert [path.stem for path in OURS] == sorted(f"DEFT - {name}" for name in ARRIVES)
    results = gui.run(*([listed(name)] for name in ARRIVES), start=gui.bin)
    for (name, wanted), result in zip(ARRIVES.items(), results, strict=True):
        recorded = result["recorded"]
        args = recorded["args"]
        print(f"--- {name}: {recorded['config']}")
        assert {listed(n) for n in ARRIVES} <= set(result["choices"])
        assert Path(recorded["script"]).name == SCRIPT[name]
        assert {key: args.get(key) for key in wanted} == wanted
        assert Path(recorded["network_file"]) == gui.kohya / "sd-scripts" / "networks" / "deft.py"
        assert recorded["config"].startswith("dim=16, alpha=16.0, basis=qr")
        assert {key: result["shown"][key] for key in gui.own} == gui.own  # a user's own paths stay


def test_what_the_gui_may_send_beside_is_accepted(gui):
    flux = {
        f"{kind}_dim": "4" for kind in ("img_attn", "img_mlp", "img_mod", "txt_attn", "txt_mlp", "txt_mod", "single")
    }
    flux |= {"single_mod_dim": "4", "in_dims": "4,2,2,2,4", "split_qkv": True, "train_t5xxl": True, "split_mode": True}
    flux |= {"train_double_block_indices": "0-3", "train_single_block_indices": "none"}
    standard = {"down_lr_weight": ",".join("1" * 12), "mid_lr_weight": "1", "up_lr_weight": ",".join("1" * 12)}
    standard |= {"block_lr_zero_threshold": "0.1", "conv_dim": 4, "conv_alpha": 1, "LoRA_type": "Kohya LoCon"}
    standard |= {f"{kind}": ",".join("4" * 25) for kind in ("block_dims", "block_alphas")}
    standard |= {f"conv_{kind}": ",".join("4" * 25) for kind in ("block_dims", "block_alphas")}
    all_types = {"rank_dropout": 0.1, "module_dropout": 0.1, "network_dropout": 0.1, "loraplus_lr_ratio": 4}
    all_types |= {"loraplus_unet_lr_ratio": 4, "loraplus_text_encoder_lr_ratio": 4}
    options = "--network_module networks.deft --network_args conv_dim=4 conv_alpha=1 keep=C:/models/keep.safetensors"
    results = gui.run(
        [listed("FLUX.1"), flux | all_types],
        [listed("SD 1.5"), standard | all_types],
        [listed("SD 1.5"), {"additional_parameters": options}],
        start=gui.bin,
    )
    for result in results:
        print(f"--- {result['recorded']['config']}")
    sent = [{pair.split("=")[0] for pair in result["recorded"]["args"]["network_args"]} for result in results]
    assert [len(names) for names in sent] == [19, 15, 3]  # train_blocks=single comes with split_mode
    assert "keep=C:/models/keep.safetensors" in results[2]["recorded"]["config"]


# What a preset leaves as it is: paths, names, saving, logging, samples, the seed.
USERS_OWN = {
    "epoch", "log_with", "max_data_loader_n_workers", "sample_sampler", "save_every_n_epochs", "save_every_n_steps",
    "save_last_n_steps_state", "training_comment",
}  # fmt: skip


@pytest.mark.parametrize("name", ARRIVES)
def test_nothing_of_an_earlier_choice_is_left(gui, name):
    others = [path.stem for path in Path(KOHYA_SS, "presets", "lora").glob("*.json")]
    others += [listed(other) for other in ARRIVES if other != name]
    # other presets come with paths that do not exist
    own = gui.own | {"network_weights": "", "reg_data_dir": "", "vae": "", "resume": "", "dataset_config": ""}
    alone, *after = gui.run([own, listed(name)], *([other, own, listed(name)] for other in others))
    assert len(after) > 20
    for other, result in zip(others, after, strict=True):
        a, b = alone["toml"], result["toml"]
        differ = {key for key in a.keys() | b.keys() if a.get(key) != b.get(key)}
        assert differ <= USERS_OWN, f"after {other}: {differ - USERS_OWN}"


@needs_sd_scripts
def test_the_button_trains(gui, world):
    size = {"max_resolution": "64,64", "enable_bucket": False, "max_train_steps": 2, "save_every_n_epochs": 0}
    computer = {"mixed_precision": "no", "extra_accelerate_launch_args": "--cpu", "num_cpu_threads_per_process": 1}
    paths = {"pretrained_model_name_or_path": str(world / "model"), "sample_prompts": ""}
    more = f"--network_module networks.deft --tokenizer_cache_dir {world / 'tokenizers'}"
    boxes = size | computer | paths | {"additional_parameters": more}
    gui.run([listed("SD 1.5"), boxes], start=gui.real)
    with safe_open(Path(gui.own["output_dir"]) / "cat.safetensors", "pt") as file:
        assert file.metadata()["ss_network_module"] == "networks.deft"
        downs = [file.get_tensor(key) for key in file.keys() if "lora_down" in key]
    assert len(downs) == 264
    assert sum(bool(down.any()) for down in downs) > 250  # trained: they start at zero
