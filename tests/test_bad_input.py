"""What a user gets wrong, told in one line before anything is loaded or written."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from tests.conftest import loaded

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


def folder_of(kind: str):
    def make(photos: Path) -> None:
        (photos.parent / "model").mkdir()
        (photos.parent / "model" / "model_index.json").write_text(json.dumps({"_class_name": kind}))

    return make


def checkpoint_of(**shapes: tuple[int, ...]):
    return lambda photos: save_file(
        {key.replace("__", "."): torch.zeros(shape) for key, shape in shapes.items()}, photos.parent / "m.safetensors"
    )


MODEL = {"pretrained_model_name_or_path": "DATA/model"}
CHECKPOINT = {"pretrained_model_name_or_path": "DATA/m.safetensors", "tokenizer": "MODEL/tokenizer"}


SDXL_MARK = "conditioner__embedders__1__model__transformer__resblocks__9__mlp__c_proj__bias"


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
    "a file that is no model": (checkpoint_of(x=(1,)), CHECKPOINT, "not a readable Stable Diffusion"),
    "an adapter for a model": (
        sdxl_file,
        {"pretrained_model_name_or_path": "DATA/sdxl.safetensors"},
        "sdxl.safetensors: this is an adapter (LoRA or the like), which is given by --network_weights; give the model",
    ),
    "peft's adapter for a model": (
        checkpoint_of(base_model__model__unet__x__lora_A__weight=(4, 8)),
        CHECKPOINT,
        "this is an adapter (LoRA or the like)",
    ),
    "a VAE for a model": (checkpoint_of(decoder__conv_in__weight=(8, 4, 3, 3)), CHECKPOINT, "this is a VAE, which"),
    "a log in a file": (
        lambda photos: (photos.parent / "file").touch(),
        {"console_log_file": "DATA/file/log.txt"},
        "--console_log_file ",
    ),
    "a log in a folder": (None, {"console_log_file": "DATA"}, "--console_log_file "),
    "a folder of another family": (
        folder_of("StableDiffusion3Pipeline"),
        MODEL,
        "this looks like Stable Diffusion 3, which is not trained here; sd-scripts may, with --network_module networks",
    ),
    "a folder of SDXL's refiner": (
        folder_of("StableDiffusionXLImg2ImgPipeline"),
        MODEL,
        "this looks like SDXL's refiner, which is not trained here",
    ),
    "a folder without parts": (folder_of("StableDiffusionXLPipeline"), MODEL, "not a readable Stable Diffusion"),
    "a damaged folder": (
        lambda photos: (photos.parent / "model_index.json").write_text("{"),
        {"pretrained_model_name_or_path": "DATA"},
        "model_index.json: no JSON",
    ),
    "a file with little of SDXL": (checkpoint_of(**{SDXL_MARK: (1280,)}), CHECKPOINT, "not a readable Stable Diffusi"),
    "a file of SDXL's refiner": (
        checkpoint_of(**{SDXL_MARK.replace("1", "0"): (1280,)}),
        CHECKPOINT,
        "this looks like SDXL's refiner, which is not trained here; sd-scripts may",
    ),
    "a file of SDXL for inpainting": (
        checkpoint_of(**{SDXL_MARK: (1280,), "model__diffusion_model__input_blocks__0__0__weight": (320, 9, 3, 3)}),
        CHECKPOINT,
        "this looks like an inpainting model",
    ),
    "v2 with a model of 1.x": (None, {"v2": True}, "is of Stable Diffusion 1.x; leave the option out"),
    "v2 with SDXL": (folder_of("StableDiffusionXLPipeline"), MODEL | {"v2": True}, "is SDXL; leave the option out"),
    "a layer that is not there": (None, {"clip_skip": 13}, "--clip_skip=13: the text encoder has 4 layers"),
    "no layer": (None, {"clip_skip": 0}, "--clip_skip=0: must be at least 1"),
    "another length": (None, {"max_token_length": 100}, "--max_token_length: invalid choice: 100"),
    "no VAE": (None, {"vae": "nowhere.safetensors"}, "--vae nowhere.safetensors: no such file or folder"),
    "a pickled VAE": (
        lambda photos: (photos.parent / "v.pt").write_bytes(b"x"),
        {"vae": "DATA/v.pt"},
        "v.pt: only .safetensors files are read",
    ),
    "a VAE that is none": (
        checkpoint_of(x=(1,)),
        {"vae": "DATA/m.safetensors"},
        "m.safetensors: 180 of its weights are missing",
    ),
    "a folder that is no VAE": (None, {"vae": "DATA"}, "photos: not a readable VAE"),
    "no sampler": (None, {"sample_sampler": "eular"}, "--sample_sampler: invalid choice: 'eular'"),
    "a file for inpainting": (
        checkpoint_of(model__diffusion_model__input_blocks__0__0__weight=(320, 9, 3, 3)),
        CHECKPOINT,
        "this looks like an inpainting model",
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
        "xformers = 'a': must be true or false",
    ),
    "config true for a value": (
        config_of("clip_skip = true"),
        CONFIG,
        "clip_skip takes a value, not true",
    ),
    "two unknown config keys": (
        config_of("[a]\nlerning_rate = 1\n[b]\nzzz = 'Standard'\nseeed = 1"),
        CONFIG,
        "unknown keys 'lerning_rate' (did you mean 'learning_rate'?), 'zzz', 'seeed' (did you mean 'seed'?)",
    ),
    "two unknown options": (
        None,
        {"learning_rat": "1", "sed": 3},
        "--learning_rat (did you mean '--learning_rate'?), --sed",
    ),
    "a Windows path in double quotes": (
        config_of('train_data_dir = "C:\\Users\\me\\photos"'),
        CONFIG,
        "write 'C:\\path' in single quotes",
    ),
    "a Windows path that TOML reads": (
        config_of('train_data_dir = "C:\\new\\training"'),
        CONFIG,
        "train_data_dir = 'C:\\new\\training'; in double quotes, backslashes have to be doubled",
    ),
    "an infinite strength": (
        None,
        {"base_weights_multiplier": ["-inf"]},
        "--base_weights_multiplier=-inf: must be a finite number",
    ),
    "two options that are not here": (
        config_of("optimizer_type = ''\nhuggingface_token = 'x'\ndeepspeed = true\nkeep_tokens = 0"),
        CONFIG,
        "leave these out",
    ),
    "a key in two sections": (config_of("[a]\nseed = 1\n[b]\nseed = 2"), CONFIG, "seed is given twice, as 1 and as 2"),
    "two values for one": (config_of("log_prefix = ['a', 'b']"), CONFIG, "log_prefix takes one value"),
    "a long name": (None, {"output_name": "a" * 300}, "must be a file name"),
    "an empty name": (None, {"output_name": ""}, "must be a file name"),
    "a long path": (None, {"train_data_dir": "a" * 300}, "--train_data_dir: no such folder"),
    "a line break": (None, {"resolution": "5\n1"}, "--resolution 5 1: must be"),
    "a damaged file to keep": (
        lambda photos: save_file({"x": torch.ones(1)}, photos.parent / "k.safetensors", {"deft_kept_layers": "["}),
        {"network_args": ["keep=DATA/k.safetensors"]},
        "k.safetensors: damaged, make it anew",
    ),
    "damaged metadata": (
        lambda photos: save_file(
            {"lora_unet_x.lora_up.weight": torch.ones(4, 1), "lora_unet_x.lora_down.weight": torch.ones(1, 4)},
            photos.parent / "a.safetensors",
            {"deft_layers": '{"lora_unet_x": [1e999, 1, 0]}'},
        ),
        {"network_weights": "DATA/a.safetensors"},
        "its deft_* metadata cannot be read",
    ),
    "no colour": (None, {"transparent_background": "whit"}, "--transparent_background whit: must be a colour's name"),
    "a sampler's steps": (
        lambda photos: (photos.parent / "p.txt").write_text("a --s 1001"),
        {"sample_prompts": "DATA/p.txt"},
        "--s 1001 must be from 1 to 1000",
    ),
    "a prompt's sampler, before the model": (
        lambda photos: (photos.parent / "p.txt").write_text("a\nb --ss eular"),
        {"sample_prompts": "DATA/p.txt", "pretrained_model_name_or_path": "nowhere"},
        "p.txt: --ss eular: no such sampler (did you mean 'euler'?)",
    ),
    "a seed of 20 digits": (
        lambda photos: (photos.parent / "p.txt").write_text("a --d 99999999999999999999"),
        {"sample_prompts": "DATA/p.txt"},
        "--d 99999999999999999999 must be from 0",
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
    "another network": (None, {"network_module": "lycoris.kohya"}, "--network_module: invalid choice: 'lycoris.kohya'"),
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
            elif isinstance(value, list):
                value = [str(one).replace(name, place) for one in value]
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
    assert done.stderr == "error: --output_dir is needed, on the command line or in --config_file\n"


def test_another_projects_library_is_named(tmp_path):
    (tmp_path / "library").mkdir()
    (tmp_path / "library" / "__init__.py").touch()
    code = f"import sys, runpy; sys.path.insert(0, {str(tmp_path)!r}); import library; runpy.run_path(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", code, str(ROOT / "train_network_deft.py")], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"found another project's library/ at {tmp_path / 'library'}" in done.stderr


def test_a_config_from_notepad_is_read(run, photos, tmp_path):
    """With a byte order mark and Windows' line ends; a number that argparse takes for an option."""
    text = "\ufeff[a]\r\nmax_train_steps = 1\r\nbase_weights_multiplier = [-1e-05]\r\noutput_name = 'of config'\r\n"
    (photos.parent / "c.toml").write_bytes(text.encode("utf-8"))
    assert run(config_file=photos.parent / "c.toml", output_name=None, max_train_steps=None) == 0
    assert (tmp_path / "out" / "of config.safetensors").is_file()


@pytest.mark.parametrize("number", ["-1e-05", "-1E5", "-.5", "-2"])
def test_negative_numbers_of_every_form(number):
    from library.options.parse import parse

    found = parse(["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o",
                          "--base_weights", "a", "b", "--base_weights_multiplier", number, "1"])  # fmt: skip
    assert [strength for _, strength in found.network.base_weights] == [float(number), 1.0]


def test_half_precision_folders_without_what_looks_at_pictures(model_folder, tmp_path):
    """As `save_pretrained(variant="fp16")` writes them, in one file or in parts; the index names what is not there."""
    whole = loaded(model_folder).pipeline
    for parts in (None, "300KB"):
        folder = tmp_path / f"model {parts}"
        whole.save_pretrained(folder, variant="fp16", **({} if parts is None else {"max_shard_size": parts}))
        assert not list(folder.rglob("*model.safetensors"))
        index = json.loads((folder / "model_index.json").read_text())
        index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"],
                  "safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"],
                  "image_encoder": ["transformers", "CLIPVisionModelWithProjection"]}  # fmt: skip
        (folder / "model_index.json").write_text(json.dumps(index))
        found = loaded(folder).pipeline
        for part in ("unet", "vae", "text_encoder"):
            ours, theirs = getattr(found, part).state_dict(), getattr(whole, part).state_dict()
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize(
    ("part", "weight"),
    [
        ("unet", "conv_in.weight"),
        ("vae", "decoder.conv_in.weight"),
        ("text_encoder", "embeddings.token_embedding.weight"),
    ],
)
def test_a_model_with_a_missing_weight_is_refused(model_folder, tmp_path, part, weight):
    from networks.deft_config import DeftError

    shutil.copytree(model_folder, tmp_path / "model")
    (file,) = (tmp_path / "model" / part).glob("*.safetensors")
    kept = {key: value for key, value in load_file(file).items() if not key.endswith(weight)}
    save_file(kept, file, {"format": "pt"})
    with pytest.raises(DeftError, match=rf"1 weights of its {part} are missing, \S*{weight} for one"):
        loaded(tmp_path / "model")
