"""What a user gets wrong, told in one line before anything is loaded or written."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

ROOT = Path(__file__).resolve().parents[1]


def break_image(photos: Path) -> None:
    path = photos / "chelsea_1.jpg"
    path.write_bytes(path.read_bytes()[:5000])


def test_a_truncated_image_is_named_and_left_out(run, photos, tmp_path, caplog):
    break_image(photos)
    assert run(max_train_steps=1) == 0
    assert any("chelsea_1.jpg: left out, it cannot be read" in record.message for record in caplog.records)
    with safe_open(str(tmp_path / "out" / "cat.safetensors"), framework="pt") as file:
        assert file.metadata()["ss_num_train_images"] == "4"


def no_image_is_whole(photos: Path) -> None:
    for path in photos.glob("*.jpg"):
        path.write_bytes(b"nothing")


def no_images(photos: Path) -> None:
    for path in photos.glob("*.jpg"):
        path.unlink()


def no_repeats(photos: Path) -> None:
    photos.rename(photos.with_name("sks cat"))


def empty_caption(photos: Path) -> None:
    (photos / "chelsea_2.txt").write_text("\n  \n")


def sdxl_file(photos: Path) -> None:
    tensors = {"lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_up.weight": torch.ones(8, 4)}
    tensors["lora_te2_text_model_encoder_layers_0_mlp_fc1.lora_down.weight"] = torch.ones(4, 8)
    save_file(tensors, photos.parent / "sdxl.safetensors")


def config_of(text: str):
    return lambda photos: (photos.parent / "c.toml").write_text(text)


CONFIG = {"config_file": "DATA/c.toml"}
BAD_INPUT = {
    "no such model": (None, {"pretrained_model_name_or_path": "nowhere/model"}, "no such model: nowhere/model"),
    "no model in the folder": (None, {"pretrained_model_name_or_path": "DATA"}, "no Diffusers model folder"),
    "a pickled checkpoint": (
        lambda photos: (photos.parent / "m.ckpt").write_bytes(b"x"),
        {"pretrained_model_name_or_path": "DATA/m.ckpt"},
        "only .safetensors checkpoints are read",
    ),
    "a file that is no model": (
        sdxl_file,
        {"pretrained_model_name_or_path": "DATA/sdxl.safetensors", "tokenizer": "MODEL/tokenizer"},
        "not a readable Stable Diffusion",
    ),
    "no data folder": (None, {"train_data_dir": "nowhere"}, "--train_data_dir: no such folder: nowhere"),
    "no images": (no_images, {}, "no images; they belong into folders named as in"),
    "no repeats in the name": (no_repeats, {}, "no images; they belong into folders named as in"),
    "only broken images": (no_image_is_whole, {}, "none of the 5 images can be read"),
    "an empty caption": (empty_caption, {}, "chelsea_2.txt: the caption is empty"),
    "rank 0": (None, {"network_dim": 0}, "network_dim=0: must be a whole number of at least 1"),
    "rank -1": (None, {"network_dim": -1}, "network_dim=-1: must be a whole number of at least 1"),
    "unknown network_arg": (
        None,
        {"network_args": ["bases=qr"]},
        "unknown network_args key 'bases'",
    ),
    "network_arg without value": (None, {"network_args": ["basis"]}, "--network_args basis: must be KEY=VALUE"),
    "adapter of another architecture": (sdxl_file, {"network_weights": "DATA/sdxl.safetensors"}, "looks made for SDXL"),
    "no such adapter": (None, {"network_weights": "nowhere.safetensors"}, "no such adapter file: nowhere.safetensors"),
    "unknown config key": (
        config_of("[a]\nlerning_rate = 1"),
        CONFIG,
        "unknown key 'lerning_rate' (did you mean 'learning_rate'?)",
    ),
    "config value for a switch": (
        config_of("xformers = 'a'"),
        CONFIG,
        "--xformers: ignored explicit argument",
    ),
    "config true for a value": (
        config_of("seed = true"),
        CONFIG,
        "seed takes a value, not true",
    ),
    "no TOML": (config_of("= ="), CONFIG, "c.toml: "),
    "no such config": (None, {"config_file": "nowhere.toml"}, "--config_file: no such file: nowhere.toml"),
    "unknown option": (None, {"learning_rat": "1"}, "unknown option --learning_rat (did you mean '--learning_rate'?)"),
    "not a number": (None, {"learning_rate": "fast"}, "argument --learning_rate: invalid float value: 'fast'"),
    "not a choice": (None, {"lr_scheduler": "cosin"}, "argument --lr_scheduler: invalid choice: 'cosin'"),
    "zero steps": (None, {"max_train_steps": 0}, "--max_train_steps=0: must be at least 1"),
    "odd resolution": (None, {"resolution": "100"}, "--resolution 100,100: both must be multiples of 8"),
    "no resolution": (None, {"resolution": "big"}, "--resolution big: must be one number or WIDTH,HEIGHT"),
    "nothing to train": (None, {"learning_rate": 0}, "nothing to train: every learning rate is 0"),
    "no prompts": (None, {"sample_prompts": "nowhere.txt"}, "--sample_prompts: no such file: nowhere.txt"),
    "fp16 without a GPU": (None, {"mixed_precision": "fp16"}, "--mixed_precision=fp16 needs a GPU"),
    "output folder is a file": (
        lambda photos: (photos.parent / "file").touch(),
        {"output_dir": "DATA/file/out"},
        "is not a folder that can be written to",
    ),
    "negative rate": (None, {"learning_rate": -1}, "--learning_rate=-1.0: must be a number of at least 0"),
    "no number": (None, {"learning_rate": "nan"}, "--learning_rate=nan: must be a number of at least 0"),
    "negative seed": (None, {"seed": -1}, "--seed=-1: must be from 0 to 4294967295"),
    "another network": (None, {"network_module": "networks.lora"}, "--network_module: invalid choice: 'networks.lora'"),
    "a path for a name": (None, {"output_name": "a/b"}, "--output_name=a/b: must be a file name"),
    "warmup without warmup": (None, {"lr_warmup_steps": 5}, "--lr_scheduler=constant has no warmup"),
    "a positional name": (None, {"network_args": ["unet=2"]}, "unknown network_args key 'unet'"),
    "odd sample size": (
        lambda photos: (photos.parent / "p.txt").write_text("a --w 100"),
        {"sample_prompts": "DATA/p.txt"},
        "--w and --h must be multiples of 8",
    ),
    "Latin-1 prompts": (
        lambda photos: (photos.parent / "p.txt").write_bytes(b"caf\xe9"),
        {"sample_prompts": "DATA/p.txt"},
        "the file is not UTF-8 text",
    ),
    "PaRa cannot be scaled": (
        None,
        {"network_args": ["para=1"], "scale_weight_norms": 1},
        "--scale_weight_norms: a PaRa adapter",
    ),
}


@pytest.mark.parametrize("case", list(BAD_INPUT))
def test_bad_input_is_one_line_and_exit_code_2(run, model_folder, photos, tmp_path, capsys, case):
    if case == "fp16 without a GPU" and torch.cuda.is_available():
        pytest.skip("there is one")
    prepare, changes, message = BAD_INPUT[case]
    if prepare is not None:
        prepare(photos)
    places = {"DATA": str(photos.parent), "MODEL": str(model_folder)}
    for key, value in changes.items():
        for name, place in places.items():
            if isinstance(value, str):
                value = value.replace(name, place)
        changes = {**changes, key: value}
    capsys.readouterr()
    assert run(**changes) == 2
    said = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert len(said) == 1
    assert message in said[0]
    assert not (tmp_path / "out").exists()


def test_exit_code_and_no_traceback_from_the_command_line(tmp_path):
    command = [sys.executable, str(ROOT / "train_network_deft.py"), "--pretrained_model_name_or_path", "x"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stderr == "error: --train_data_dir is needed, on the command line or in --config_file\n"


def test_another_projects_library_is_named(tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "__init__.py").touch()
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); import library; runpy.run_path(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "train_network_deft.py")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"found another project's library/ at {tmp_path / 'library'}" in done.stderr
