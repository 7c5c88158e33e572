"""FLUX.1: folders and files are read alike, the adapter's file draws what the network draws."""

from __future__ import annotations

import json
import re
import shutil
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import FluxPipeline
from diffusers.loaders import lora_pipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_map_only

import train_network_deft
from library.models import flux
from library.options.parse import parse
from library.prompts import Prompt, read_prompts
from library.training import prepare
from networks.deft_config import DeftError
from networks.deft_progress import Bar
from tests import small_flux
from tests.conftest import arguments, loaded, network_of, relative_error
from tests.test_options import NEEDED

TOKENS = 12
PARTS = ("transformer", "text_encoder", "text_encoder_2", "vae")
CAPTIONS = ["a cat", "b"]


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    return small_flux.build(tmp_path_factory.mktemp("flux"))


@pytest.fixture
def files(small, tmp_path, monkeypatch):
    """Options that name a file a part; text encoders and VAEs have the small model's sizes for the published ones."""
    monkeypatch.setattr(flux, "CONFIG", small.folder)
    return of(small, tmp_path)


def of(small, folder):
    files = {name: str(path) for name, path in small.files(folder).items()}
    return files | {"tokenizer_cache_dir": str(small.tokenizers)}


def from_files(files, **options):
    given = {"t5xxl_max_token_length": TOKENS} | files | options
    return loaded(given.pop("pretrained_model_name_or_path"), **given)


def check_same(model, other, cast=lambda tensor: tensor):
    """:param cast: of the other's weights, but for the VAE's"""
    for part in PARTS:
        found, expected = (getattr(one.pipeline, part).state_dict() for one in (model, other))
        assert found.keys() == expected.keys()
        for key, weight in expected.items():
            assert torch.equal(found[key], weight if part == "vae" else cast(weight)), f"{part} {key}"


@torch.no_grad()
def predicted(model, captions=CAPTIONS):
    generator = torch.Generator().manual_seed(5)
    noisy = torch.randn(len(captions), 16, 8, 12, generator=generator)
    timesteps = torch.linspace(700, 30, len(captions))
    return model.predict(noisy, timesteps, model.encode_text(captions), torch.zeros(len(captions), 6))


def pixels(image):
    return np.asarray(image).astype(float)


# --- loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dev", [True, False])
def test_files_and_folder_are_the_same_model(dev, files, small, tmp_path):
    """The folder's transformer is what diffusers' own converter makes of the file's tensors."""
    if not dev:
        small = small_flux.build(tmp_path / "schnell", dev=False)
        files = of(small, tmp_path)
    found, folder = from_files(files), loaded(small.folder, t5xxl_max_token_length=TOKENS)
    check_same(found, folder)
    for model in (found, folder):
        assert model.is_dev == dev
        assert model.pipeline.scheduler.config.shift == (3.0 if dev else 1.0)
        assert model.pipeline.scheduler.config.use_dynamic_shifting == dev
        names = model.names()
        assert names["modelspec.architecture"] == f"flux-1-{'dev' if dev else 'schnell'}/lora"
        assert (names["ss_base_model_version"], names["ss_v2"]) == ("flux1", "False")
    assert loaded(small.folder).tokens == (512 if dev else 256)
    assert torch.equal(predicted(found), predicted(folder))


@pytest.mark.parametrize("scaled", [False, True])
def test_a_checkpoint_of_all_parts_in_8_bits_is_read_in_the_precision_of_the_training(scaled, files, small, tmp_path):
    """As ComfyUI's; with `scale_weight`, a layer's weights are its 8 bits times that number."""
    dtype, tensors = torch.bfloat16, small.all_in_one(torch.float8_e4m3fn)
    if scaled:
        tensors["model.diffusion_model.scaled_fp8"] = torch.empty(2, dtype=torch.float8_e4m3fn)
        layers = [key for key, value in tensors.items() if value.dim() == 2 and value.dtype == torch.float8_e4m3fn]
        for i, key in enumerate(layers):
            tensors[key.removesuffix("weight") + "scale_weight"] = torch.tensor(0.5 + i / len(layers))
    save_file(tensors, tmp_path / "all.safetensors")
    options = flux.ModelOptions(str(tmp_path / "all.safetensors"), tokenizer_cache_dir=files["tokenizer_cache_dir"])
    model = flux.load(tmp_path / "all.safetensors", options, dtype)
    other = loaded(small.folder)
    if not scaled:
        check_same(model, other, lambda weight: weight.to(torch.float8_e4m3fn).to(dtype))
        return
    for part, key in (("transformer", "transformer_blocks.1.attn.to_v.weight"),
                      ("text_encoder_2", "encoder.block.1.layer.1.DenseReluDense.wo.weight")):  # fmt: skip
        found, plain = (getattr(one.pipeline, part).state_dict()[key] for one in (model, other))
        (original,) = (name for name in layers if name.endswith(
            {"transformer": "double_blocks.1.img_attn.qkv.weight", "text_encoder_2": key}[part]))  # fmt: skip
        scale = tensors[original.removesuffix("weight") + "scale_weight"]
        assert torch.equal(found, (plain.to(torch.float8_e4m3fn).float() * scale).to(dtype))


def test_all_parts_have_the_type_of_the_training_and_the_vae_float32(files, small):
    for location, given in ((small.folder, {}), (files["pretrained_model_name_or_path"], files)):
        options = flux.ModelOptions(**{**given, "pretrained_model_name_or_path": str(location)})
        model = flux.load(flux.Path(location), options, torch.bfloat16)
        for part in PARTS:
            types = {weight.dtype for weight in getattr(model.pipeline, part).parameters()}
            assert types == {torch.float32 if part == "vae" else torch.bfloat16}
            assert not any(weight.requires_grad for weight in getattr(model.pipeline, part).parameters())


@pytest.mark.parametrize("name", ["clip_l", "t5xxl", "ae"])
def test_an_option_replaces_a_part_of_a_folder_by_a_file_or_a_folder(name, files, small, tmp_path):
    part = {"clip_l": "text_encoder", "t5xxl": "text_encoder_2", "ae": "vae"}[name]
    changed = {key: value * 0.5 for key, value in small.parts[name].items()}
    save_file(changed, files[name])
    by_file = loaded(small.folder, **{name: files[name]})
    getattr(by_file.pipeline, part).save_pretrained(str(tmp_path / part), variant="fp16")
    (in_folder,) = (tmp_path / part).glob("*.safetensors")
    for path in (tmp_path / part, in_folder):  # the file with today's names of the libraries
        check_same(by_file, loaded(small.folder, **{name: str(path)}))
    own = loaded(small.folder)
    key, weight = next(iter(getattr(own.pipeline, part).named_parameters()))
    assert torch.equal(getattr(by_file.pipeline, part).get_parameter(key), 0.5 * weight)


def test_a_part_that_is_missing_is_named(files, small):
    for name in ("clip_l", "t5xxl", "ae"):
        with pytest.raises(DeftError, match=f"the transformer alone is in it; give --{name} too$"):
            from_files(files | {name: None})
        with pytest.raises(DeftError, match=f"^--{name}: no such file: nowhere"):
            from_files(files | {name: "nowhere"})
    with pytest.raises(DeftError, match="give --clip_l, --t5xxl, --ae too"):
        from_files(files | dict.fromkeys(("clip_l", "t5xxl", "ae")))
    with pytest.raises(DeftError, match=r"give --tokenizer_cache_dir FOLDER with google_t5-v1_1-xxl/ in it"):
        from_files(files | {"tokenizer_cache_dir": None, "tokenizer": str(small.folder / "tokenizer")})


@pytest.fixture
def nothing_loads(monkeypatch):
    """So that what is wrong has to be told before."""

    def load(*args, **kwargs):
        raise AssertionError("loaded")

    for name in ("_transformer", "_of_folder"):
        monkeypatch.setattr(flux, name, load)
    monkeypatch.setattr(flux, "_PART_FROM", dict.fromkeys(flux._PART_FROM, load))


@pytest.mark.usefixtures("nothing_loads")
def test_all_that_is_missing_is_told_before_anything_is_loaded(files):
    wrong = {"clip_l": "nowhere", "t5xxl": "nor here.safetensors", "ae": None}
    told = r"^--clip_l: no such file: nowhere; --t5xxl: no such file: nor here.safetensors; .*give --ae too$"
    with pytest.raises(DeftError, match=told):
        from_files(files | wrong)
    with pytest.raises(DeftError, match="give --tokenizer FOLDER, or --tokenizer_cache_dir FOLDER"):
        from_files(files | {"tokenizer_cache_dir": None})


WHAT = {"clip_l": "a CLIP text encoder", "t5xxl": "a T5 text encoder", "ae": "a VAE",
        "pretrained_model_name_or_path": "FLUX.1's transformer"}  # fmt: skip


@pytest.mark.parametrize("given", WHAT)
@pytest.mark.parametrize("taken", WHAT)
@pytest.mark.usefixtures("nothing_loads")
def test_swapped_files_are_named(given, taken, files):
    if given == taken:
        return
    with pytest.raises(DeftError) as error:
        from_files(files | {taken: files[given]})
    named = f"--{taken} {files[given]}: this is {WHAT[given]}, which is given by --{given}"
    assert str(error.value) == named + ("; give the model" if taken.startswith("pretrained") else "")


def test_a_missing_tokenizer_of_t5_is_told_with_what_it_needs(small, tmp_path, monkeypatch):
    folder = tmp_path / "model"
    shutil.copytree(small.folder, folder)
    (folder / "tokenizer_2" / "tokenizer.json").unlink()
    with pytest.raises(DeftError, match="tokenizer_2: no tokenizer there"):
        loaded(folder)
    (folder / "tokenizer_2" / "spiece.model").write_bytes(b"")
    with pytest.raises(DeftError, match=r"tokenizer_2: .*pip install sentencepiece$"):
        loaded(folder)


BAD = {
    "quantised": (lambda t: t | {"img_in.bias": t["img_in.bias"].char()}, "img_in.bias is quantised"),
    "scaled by rows": (
        lambda t: t | {"txt_in.scale_weight": torch.ones(small_flux.WIDTH, 1)},
        "txt_in.scale_weight is no single number",
    ),
    "cut off": (
        lambda t: {k: v for k, v in t.items() if "single_blocks.1" not in k},
        "weights of a FluxTransformer2DModel are missing",
    ),
    "Fill": (lambda t: t | {"img_in.weight": torch.zeros(small_flux.WIDTH, 384)}, "looks like FLUX.1 Fill, which"),
    "Depth": (lambda t: t | {"img_in.weight": torch.zeros(small_flux.WIDTH, 128)}, "FLUX.1 Canny or Depth, which"),
    "Chroma": (lambda t: t | {"distilled_guidance_layer.in_proj.bias": torch.zeros(1)}, "looks like Chroma, which"),
    "FLUX.2": (lambda t: t | {"single_stream_modulation.lin.weight": torch.zeros(1)}, "looks like FLUX.2, which"),
    "other text": (lambda t: t | {"txt_in.weight": torch.zeros(small_flux.WIDTH, 64)}, "--t5xxl: its width is 32"),
    "other shapes": (lambda t: t | {"txt_in.bias": torch.zeros(7)}, "not a readable FLUX.1 model"),
}


@pytest.mark.parametrize("change", BAD)
def test_what_is_not_read_ends_in_one_line(change, files, small):
    changed, message = BAD[change]
    save_file(changed(small.parts["transformer"]), files["pretrained_model_name_or_path"])
    with pytest.raises(DeftError) as error:
        from_files(files)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_text_encoders_that_are_not_whole_end_in_one_line(files, small, tmp_path):
    whole = small.parts["t5xxl"]
    save_file({key: value for key, value in whole.items() if ".block.1." not in key}, files["t5xxl"])
    with pytest.raises(DeftError, match=r"^--t5xxl: .* weights of a T5EncoderModel are missing"):
        from_files(files)
    folder = shutil.copytree(small.folder, tmp_path / "cut off")
    for part, name in (("text_encoder", "CLIPTextModel"), ("text_encoder_2", "T5EncoderModel")):
        file = folder / part / "model.safetensors"
        whole = load_file(file)
        first = {key: value for key, value in whole.items() if not re.search(r"\.1\.(self_attn|layer\.0\.S)", key)}
        save_file(first, file, {"format": "pt"})
        with pytest.raises(DeftError, match=rf"{part}: \d weights of a {name} are missing"):
            loaded(folder)
        save_file(whole, file, {"format": "pt"})
    pickle = shutil.copy(files["clip_l"], files["clip_l"].replace(".safetensors", ".pt"))
    with pytest.raises(DeftError, match=r"^--clip_l .*only .safetensors files are read"):
        from_files(files | {"clip_l": pickle})


# --- texts, predictions, pictures ------------------------------------------------------------------------------------


def test_padding_counts_without_the_mask_and_not_with_it(small):
    """With it, more padding changes nothing, in the training and in pictures, whatever stands in the negative."""
    found = {}
    for masked in (True, False):
        for tokens in (12, 20):
            model = loaded(small.folder, t5xxl_max_token_length=tokens, apply_t5_attn_mask=masked)
            prompt = Prompt("", width=64, height=96, seed=3, steps=2, guidance=2.0)
            text, negative = model.encode_text(["a cat"]), model.encode_text(["blue"])
            found[masked, tokens] = predicted(model), pixels(model.draw(prompt, text, negative, None, Bar(2, "", "")))
    for kind in (0, 1):
        masked, padded = ((found[how, 12][kind], found[how, 20][kind]) for how in (True, False))
        assert relative_error(*map(torch.as_tensor, masked)) < 1e-5
        assert relative_error(*map(torch.as_tensor, padded)) > 1e-3
        assert relative_error(*map(torch.as_tensor, (masked[0], padded[0]))) > 1e-3


def test_dev_is_told_its_guidance_and_schnell_is_not(small, tmp_path):
    told = [predicted(loaded(small.folder, t5xxl_max_token_length=TOKENS, guidance_scale=g)) for g in (1.0, 3.5)]
    assert relative_error(*told) > 1e-3
    schnell = small_flux.build(tmp_path, dev=False).folder
    not_told = [predicted(loaded(schnell, t5xxl_max_token_length=TOKENS, guidance_scale=g)) for g in (1.0, 3.5)]
    assert torch.equal(*not_told)


def test_what_t5_does_not_read_is_told(small):
    model = loaded(small.folder, t5xxl_max_token_length=6)
    assert model.beyond("abcd") == ("", 5)
    assert model.beyond("abcdefg") == ("efg", 5)
    assert torch.equal(*(model.encode_text([text])["hidden"] for text in ("abcdefg", "abcdxyz")))


def test_a_prompt_s_guidance_as_in_sd_scripts(small, tmp_path):
    """`--g` is what dev is told, `--l` classifier-free guidance, which is off by default and then needs no negative."""
    (tmp_path / "p.txt").write_text("a cat\na cat --g 5 --l 2 --n blue\n")
    plain, guided = read_prompts(str(tmp_path / "p.txt"), (64, 64), steps=2)
    model = loaded(small.folder, t5xxl_max_token_length=TOKENS)
    assert model.guidance(plain) == {"guidance_scale": 3.5, "true_cfg_scale": 1.0}
    assert model.guidance(guided) == {"guidance_scale": 5.0, "true_cfg_scale": 2.0}
    text, negative = model.encode_text(["a cat"]), model.encode_text(["blue"])
    drawn = {}
    for name, prompt, given in (("plain", plain, None), ("plain too", plain, negative), ("guided", guided, negative)):
        prompt = Prompt(**{**vars(prompt), "seed": 1})
        drawn[name] = pixels(model.draw(prompt, text, given, None, Bar(2, "", "")))
    theirs = FluxPipeline.from_pretrained(str(small.folder))
    theirs.set_progress_bar_config(disable=True)
    asked = {"max_sequence_length": TOKENS, "width": 64, "height": 64, "num_inference_steps": 2}
    images = [
        theirs("a cat", generator=Prompt("", seed=1).generator(), **asked, **more).images[0]
        for more in ({}, {"negative_prompt": "blue", "guidance_scale": 5.0, "true_cfg_scale": 2.0})
    ]
    assert np.abs(drawn["plain"] - pixels(images[0])).max() < 2
    assert np.array_equal(drawn["plain"], drawn["plain too"])
    assert np.abs(drawn["guided"] - pixels(images[1])).max() < 2
    assert np.abs(drawn["guided"] - drawn["plain"]).max() > 10


def test_pictures_are_of_whole_tokens_and_drawn_by_euler_alone(small, caplog):
    model = loaded(small.folder, t5xxl_max_token_length=TOKENS)
    assert model.multiple_of == 16
    prompt = Prompt("", width=72, height=56, seed=1, steps=1)
    assert model.draw(prompt, model.encode_text([""]), None, "euler", Bar(1, "", "")).size == (64, 48)
    model.sampler("euler_a")  # as the GUI writes it for every model
    assert "--sample_sampler=euler_a: FLUX.1 is drawn by euler alone" in caplog.messages


def test_prompts_sizes_that_are_rounded_are_told(small, caplog):
    model = loaded(small.folder)
    prompts = [Prompt("a", width=72, height=56), Prompt("b", width=64, height=48), Prompt("c", width=32, height=24)]
    prepare.tell_what_is_rounded(model, prompts)
    assert caplog.messages == [
        "--sample_prompts: this model draws multiples of 16 alone: 72 x 56 of 'a' as 64 x 48, 32 x 24 of 'c' as 32 x 16"
    ]
    with pytest.raises(DeftError, match=r"^--sample_prompts: 64 x 8 of 'd': this model draws at least 16 x 16$"):
        prepare.tell_what_is_rounded(model, [Prompt("d", width=64, height=8)])


def test_the_options_have_sd_scripts_defaults():
    options = parse(NEEDED).model
    assert (options.guidance_scale, options.t5xxl_max_token_length, options.apply_t5_attn_mask) == (3.5, None, False)
    assert parse([*NEEDED, "--model_type", "flux"]).model == options
    for given in (["--model_type", "chroma"], ["--split_mode"], ["--controlnet_model_name_or_path", "x"]):
        with pytest.raises(DeftError, match=given[0].lstrip("-")):
            parse([*NEEDED, *given])


def test_other_families_options_are_told(small, caplog):
    loaded(small.folder, clip_skip=2, v2=True)
    assert [message for message in caplog.messages if "without effect" in message] == [
        "--v2, --clip_skip: without effect, FLUX.1 has nothing of the kind"
    ]
    with pytest.raises(DeftError, match=r"^--vae: FLUX.1's is given by --ae$"):
        loaded(small.folder, vae="x")


# --- training --------------------------------------------------------------------------------------------------------


def test_the_file_in_diffusers_draws_what_the_network_draws(small, tmp_path, monkeypatch):
    """Transformer and CLIP-L; diffusers has no place for T5's."""
    name = "_convert_kohya_flux_lora_to_diffusers"
    monkeypatch.setattr(lora_pipeline, name, small_flux.of_small_width(getattr(lora_pipeline, name)))
    prompt = Prompt("", width=64, height=64, seed=1, steps=3)
    model = loaded(small.folder, t5xxl_max_token_length=TOKENS)
    network = network_of(model)
    assert {module.lora_name.split("_")[1] for module in network.all_modules} == {"te1", "unet"}
    network.save_weights(str(tmp_path / "cat.safetensors"), torch.float32, {})
    with torch.no_grad():
        ours = pixels(model.draw(prompt, model.encode_text(["a cat"]), None, None, Bar(3, "", "")))
    images = []
    theirs = FluxPipeline.from_pretrained(str(small.folder))
    theirs.set_progress_bar_config(disable=True)
    for _ in range(2):
        images.append(pixels(theirs("a cat", max_sequence_length=TOKENS, width=64, height=64, num_inference_steps=3,
                                    generator=prompt.generator()).images[0]))  # fmt: skip
        theirs.load_lora_weights(str(tmp_path), weight_name="cat.safetensors")
    assert np.abs(ours - images[1]).max() < 2
    assert np.abs(ours - images[0]).max() > 10


@pytest.mark.parametrize("more", [{}, {"network_args": ["train_t5xxl=true"], "apply_t5_attn_mask": True}])
@pytest.mark.usefixtures("fresh_accelerator")
def test_trains(more, small, photos, tmp_path, capsys):
    """In bfloat16 with checkpointing; with `train_t5xxl`, T5 too."""
    common = {"mixed_precision": "bf16", "gradient_checkpointing": True, "t5xxl_max_token_length": TOKENS,
              "model_prediction_type": "raw", "timestep_sampling": "shift", "max_train_steps": 3,
              "learning_rate": 1e-2}  # fmt: skip
    assert train_network_deft.main(arguments(small.folder, photos, tmp_path, **common, **more)) == 0, (
        capsys.readouterr()
    )
    with safe_open(tmp_path / "out" / "cat.safetensors", "pt") as file:
        metadata, names = file.metadata(), {key.split(".")[0] for key in file.keys()}
        moved = {name for name in names if file.get_tensor(f"{name}.lora_up.weight").abs().max() > 0}
    assert {"lora_unet_double_blocks_1_txt_attn_qkv", "lora_unet_single_blocks_2_linear1"} < names
    assert {name.split("_")[1] for name in moved} == ({"unet", "te1", "te3"} if more else {"unet", "te1"})
    assert metadata["ss_base_model_version"] == "flux1"
    assert metadata["modelspec.architecture"] == "flux-1-dev/lora"
    assert json.loads(metadata["ss_guidance_scale"]) == 3.5
    assert metadata["ss_apply_t5_attn_mask"] == str(bool(more))


@pytest.mark.usefixtures("fresh_accelerator")
def test_trains_and_draws_without_its_text_encoders(small, photos, tmp_path):
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 64 --s 1\na dog --w 64 --h 64 --s 1 --l 2 --g 4 --n blue\n")
    more = {"cache_text_encoder_outputs": True, "network_train_unet_only": True, "apply_t5_attn_mask": True,
            "t5xxl_max_token_length": TOKENS, "sample_prompts": tmp_path / "p.txt", "sample_at_first": True,
            "max_train_steps": 1}  # fmt: skip
    assert train_network_deft.main(arguments(small.folder, photos, tmp_path, **more)) == 0
    assert len(list((tmp_path / "out" / "sample").iterdir())) == 2


def test_gradients_are_the_same_with_checkpointing_and_nothing_is_random(small):
    """T5, in training mode for its checkpoints, has no dropout."""
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = loaded(small.folder, t5xxl_max_token_length=TOKENS, gradient_checkpointing=checkpointing,
                       apply_t5_attn_mask=True)  # fmt: skip
        network = network_of(model, train_t5xxl="true")
        model.place(torch.device("cpu"), torch.float32, encoders=True)
        text = model.encode_text(CAPTIONS)
        answer = model.predict(torch.randn(2, 16, 4, 4), torch.tensor([9.0, 700.0]), text, torch.zeros(2, 6))
        answer.square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
        assert isinstance(model.denoiser, nn.Module)
        assert model.denoiser.training == checkpointing
    assert gradients[0].keys() == gradients[1].keys()
    assert {name.split("_")[1] for name in gradients[0]} >= {"te1", "te3", "unet"}
    for name, gradient in gradients[0].items():
        assert relative_error(gradients[1][name], gradient) < 1e-4, name


def test_timesteps_are_rounded_before_they_are_divided(small):
    """As diffusers' pipeline does; in bf16 another order gives other timesteps."""
    model, seen = loaded(small.folder, t5xxl_max_token_length=TOKENS), []
    model.denoiser.register_forward_pre_hook(lambda _, __, named: seen.append(named["timestep"]), with_kwargs=True)
    text = model.encode_text(["a cat"])
    timesteps = torch.tensor([123.456, 637.89, 901.7])
    noisy, sizes = torch.zeros(3, model.vae.config.latent_channels, 4, 4), torch.zeros(3, 6)
    text = {name: value.expand(3, *value.shape[1:]) for name, value in text.items()}
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        model.predict(noisy, timesteps, text, sizes)
    model.predict(noisy, timesteps, text, sizes)
    assert torch.equal(seen[0], timesteps.bfloat16() / 1000)
    assert torch.equal(seen[1], timesteps / 1000)


class Autocast(TorchFunctionMode):
    """Notes what attention is given.

    :param widens: whether autocast has norms in float32, as on GPUs since torch 2.12
    """

    def __init__(self, widens: bool):
        super().__init__()
        self.widens, self.dtypes = widens, Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.rms_norm and self.widens and torch.is_autocast_enabled("cpu"):
            args, kwargs = tree_map_only(Tensor, Tensor.float, (args, kwargs))
        if func is F.scaled_dot_product_attention:
            self.dtypes.update(one.dtype for one in (*args, *kwargs.values()) if torch.is_tensor(one))
        return func(*args, **kwargs)


def test_blocks_compute_in_bf16_with_any_torch(small):
    """Attention has queries, keys and values of one dtype, and what is put beside its outcome is not widened."""
    found = []
    for mode in (Autocast(widens=False), Autocast(widens=True)):
        torch.manual_seed(0)
        model = loaded(small.folder, t5xxl_max_token_length=TOKENS)
        network = network_of(model)
        model.place(torch.device("cpu"), torch.bfloat16, encoders=False)
        config = model.denoiser.config
        text = {"pooled": torch.randn(2, config.pooled_projection_dim),
                "hidden": torch.randn(2, TOKENS, config.joint_attention_dim)}  # fmt: skip
        given = torch.randn(2, 16, 4, 4), torch.tensor([9.0, 700.0]), text, torch.zeros(2, 6)
        with mode, torch.autocast("cpu", torch.bfloat16):
            answer = model.predict(*given)
        answer.float().square().mean().backward()
        found.append([answer, *(p.grad for p in network.parameters() if p.grad is not None)])
        assert mode.dtypes == {torch.bfloat16: 3 * (config.num_layers + config.num_single_layers)}
    assert len(found[0]) > 20
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_is_never_trained_with_cudnns_attention(small):
    """See `Family.place`: torch chooses it by itself on an H100."""
    torch.backends.cuda.enable_cudnn_sdp(True)
    loaded(small.folder, t5xxl_max_token_length=TOKENS).place(torch.device("cpu"), torch.float32, encoders=False)
    assert not torch.backends.cuda.cudnn_sdp_enabled()
