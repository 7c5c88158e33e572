"""The families: what is recognised, how texts are read, what is predicted and drawn, on small models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from accelerate import init_empty_weights
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
from safetensors.torch import load_file, save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

import train_network_deft
from library.models import clip, samplers, sd, sdxl
from library.models.reading import CONFIGS
from library.options.table import SAMPLERS
from library.prompts import Prompt
from networks import deft
from networks.deft_config import DeftError
from tests import small_models
from tests.conftest import arguments, loaded, perturb

PROMPT = Prompt("a cat", width=64, height=64, steps=3, seed=4, guidance=3)


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Callable[..., Path]:
    """A small model's folder, by its kind."""
    root, made = tmp_path_factory.mktemp("small"), {}

    def folder(kind: str) -> Path:
        if kind not in made:
            made[kind] = small_models.build(kind, root / kind)
        return made[kind]

    return folder


def pixels(image) -> torch.Tensor:
    return torch.tensor(list(image.tobytes()), dtype=torch.float)


def drawn(model, prompt: Prompt = PROMPT, sampler: str | None = None) -> torch.Tensor:
    texts = [model.encode_text([text]) for text in (prompt.text, prompt.negative)]
    return pixels(model.draw(prompt, *texts, sampler))


# --- what ships ------------------------------------------------------------------------------------------------------

PARTS = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}
ENCODERS = {"text_encoder": CLIPTextModel, "text_encoder_2": CLIPTextModelWithProjection}


@pytest.mark.parametrize(
    ("kind", "part", "number"),
    [
        ("sd15", "unet", 859_520_964),
        ("sd2", "unet", 865_910_724),
        ("sdxl", "unet", 2_567_463_684),
        ("sd15", "vae", 83_653_863),
        ("sd2", "vae", 83_653_863),
        ("sdxl", "vae", 83_653_863),
        ("sd15", "text_encoder", 123_060_480),
        ("sd2", "text_encoder", 340_387_840),
        ("sdxl", "text_encoder", 123_060_480),
        ("sdxl", "text_encoder_2", 694_659_840),
    ],
)
def test_shipped_configurations_have_the_published_models_sizes(kind, part, number):
    config = json.loads((CONFIGS / kind / part / "config.json").read_text())
    with init_empty_weights():
        model = PARTS[part].from_config(config) if part in PARTS else ENCODERS[part](CLIPTextConfig(**config))
    assert sum(p.numel() for p in model.parameters()) == number


# --- single files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", list(small_models.UNETS))
def test_a_single_file_is_recognised_and_is_the_folders_model(small, tmp_path, monkeypatch, kind):
    folder = small(kind)
    for module in (sd, sdxl):
        monkeypatch.setattr(module, "CONFIGS", folder.parent)
    whole = loaded(folder)
    save_file(small_models.single_file(whole.pipeline), tmp_path / "m.safetensors")
    file = loaded(tmp_path / "m.safetensors", tokenizer=str(folder / "tokenizer"))
    assert type(file) is type(whole)
    for part in ("unet", "vae", "text_encoder", "text_encoder_2"):
        if hasattr(whole.pipeline, part):
            ours, theirs = (dict(getattr(m.pipeline, part).named_parameters()) for m in (file, whole))
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[name], theirs[name]) for name in ours)
            assert not any(p.requires_grad for p in ours.values())
    a, b = (model.encode_text(["", "a cat", "x" * 100]) for model in (file, whole))
    assert all(torch.equal(a[part], b[part]) for part in a)


def test_marks_in_a_file_and_options_say_what_it_predicts(small, tmp_path, monkeypatch, caplog):
    folder = small("sdxl")
    monkeypatch.setattr(sdxl, "CONFIGS", folder.parent)
    tensors = small_models.single_file(loaded(folder).pipeline)
    for marks, options, velocity, zero in (
        ({}, {}, False, False),
        ({}, {"v_parameterization": True}, True, False),
        ({"v_pred": torch.ones(())}, {}, True, False),
        ({"v_pred": torch.ones(()), "ztsnr": torch.ones(())}, {}, True, True),
    ):
        save_file(tensors | marks, tmp_path / "m.safetensors")
        caplog.clear()
        with caplog.at_level("INFO"):
            model = loaded(tmp_path / "m.safetensors", tokenizer=str(folder / "tokenizer"), **options)
        assert any("of itself" in line for line in caplog.messages) == bool(marks)
        schedule = model.noise_scheduler()
        assert (schedule.config.prediction_type == "v_prediction") == velocity
        assert (float(schedule.alphas_cumprod[-1]) == 0) == zero
        assert model.names()["modelspec.prediction_type"] == ("v" if velocity else "epsilon")
        assert model.names()["ss_zero_terminal_snr"] == str(zero)


def test_a_folders_scheduler_says_what_it_predicts(tmp_path, caplog):
    small_models.build("sd2", tmp_path / "v", prediction_type="v_prediction")
    model = loaded(tmp_path / "v")
    assert model.noise_scheduler().config.prediction_type == "v_prediction"
    assert model.names()["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert (model.names()["ss_v2"], model.names()["ss_base_model_version"]) == ("True", "sd_v2_v")
    index = tmp_path / "v" / "scheduler" / "scheduler_config.json"
    index.write_text(json.dumps(json.loads(index.read_text()) | {"prediction_type": "epsilon"}))
    assert loaded(tmp_path / "v", v_parameterization=True).velocity
    assert any("--v_parameterization is followed" in line for line in caplog.messages)
    index.write_text(json.dumps(json.loads(index.read_text()) | {"prediction_type": "sample"}))
    with pytest.raises(DeftError, match="is not of Stable Diffusion's training"):
        loaded(tmp_path / "v")


def test_zero_terminal_snr_is_the_papers_schedule(model_folder):
    """Algorithm 1 of arXiv 2305.08891, in float64."""
    model = loaded(model_folder, zero_terminal_snr=True, v_parameterization=True)
    config = model.noise_scheduler().config
    roots = torch.linspace(config.beta_start**0.5, config.beta_end**0.5, 1000, dtype=torch.float64)
    alphas = (1 - roots.square()).cumprod(0).sqrt()
    wanted = (alphas - alphas[-1]) * alphas[0] / (alphas[0] - alphas[-1])
    assert torch.allclose(model.noise_scheduler().alphas_cumprod.double(), wanted.square(), atol=1e-6)


def test_the_vae_can_be_another_and_stays_in_float32(small, tmp_path):
    """A folder's, or a file's in either layout, alone or within a whole model; the latents' scale is the model's."""
    folder = small("sdxl")
    other = AutoencoderKL.from_config(small_models.config_of("sdxl", "vae") | {"scaling_factor": 0.5})
    other.save_pretrained(tmp_path / "folder")
    state = other.state_dict()
    original = small_models.original_vae(state)
    old = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    files = {
        "original": original,
        "in a model": {f"first_stage_model.{key}": value for key, value in original.items()},
        "diffusers": state,
        "half": {key: value.half() for key, value in state.items()},
        "older": {next((k.replace(n, o) for n, o in old.items() if n in k), k): v for k, v in state.items()},
    }
    for name, tensors in files.items():
        save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / f"{name}.safetensors")
    for name in ("folder", *(f"{name}.safetensors" for name in files)):
        vae = loaded(folder, vae=str(tmp_path / name)).vae
        assert (vae.dtype, vae.config.scaling_factor) == (torch.float32, 0.13025)
        found = dict(vae.named_parameters())
        assert all(torch.allclose(found[key], value, rtol=1e-3, atol=1e-4) for key, value in state.items())
        assert "half" in name or all(torch.equal(found[key], value) for key, value in state.items())


def test_parts_are_loaded_in_the_trainings_precision(small):
    from library.models.loading import load
    from library.options.rooms import ModelOptions

    model = load(ModelOptions(str(small("sdxl"))), torch.bfloat16)
    assert {part.dtype for part in (model.denoiser, *model.text_encoders)} == {torch.bfloat16}
    kept = load_file(next((small("sdxl") / "vae").glob("*.safetensors")))
    assert all(torch.equal(p, kept[name]) for name, p in model.vae.named_parameters())


# --- texts -----------------------------------------------------------------------------------------------------------


def test_windows_of_tokens(small):
    """Behind the start: 75 of the caption in each window; OpenAI's padding is the end, OpenCLIP's is token 0."""
    tokenizer = loaded(small("sdxl")).pipeline.tokenizer
    start, end = tokenizer.bos_token_id, tokenizer.eos_token_id
    x, last = tokenizer("xx").input_ids[1:-1]
    padded = clip.Reader(tokenizer, 0, 77, 150).tokens(["x" * 75, "x" * 200, "x" * 80, ""])
    full = [start, *[x] * 75, end]
    assert padded.shape == (4, 2, 77)
    assert padded[0].tolist() == [[start, *[x] * 74, last, end], [start, end, *[0] * 75]]
    assert padded[1].tolist() == [full, full]
    assert padded[2].tolist() == [full, [start, *[x] * 4, last, end, *[0] * 70]]
    assert padded[3].tolist() == [[start, end, *[0] * 75]] * 2
    closed = clip.Reader(tokenizer, end, 77, 150).tokens(["x" * 80, ""])
    assert closed.tolist() == [[full, [start, *[x] * 4, last, *[end] * 71]], [[start, *[end] * 76]] * 2]


@pytest.mark.parametrize(("length", "read"), [(None, 75), (75, 75), (150, 150), (225, 225)])
def test_what_is_cut_depends_on_the_length(small, length, read):
    model = loaded(small("sdxl"), max_token_length=length)
    assert model.beyond("y" * 225 + "zz") == (("y" * 225 + "zz")[read:], read)
    text = model.encode_text(["y" * 225 + "zz", "y" * read])
    assert text["hidden"].shape == (2, read + 2, 48)
    assert torch.equal(text["hidden"][0, :-2], text["hidden"][1, :-2])


@pytest.mark.parametrize("kind", ["sd2", "sdxl"])
def test_texts_are_those_of_diffusers_pipeline(small, kind):
    """Which reads 77 tokens."""
    model = loaded(small(kind))
    captions = ["a cat", "", "y" * 200]
    theirs = model.pipeline.encode_prompt(captions, device="cpu", num_images_per_prompt=1,
                                          do_classifier_free_guidance=False)  # fmt: skip
    ours = model.encode_text(captions)
    assert torch.allclose(ours["hidden"], theirs[0], atol=1e-5)
    if kind == "sdxl":
        assert torch.allclose(ours["pooled"], theirs[2], atol=1e-5)


def test_gradients_reach_both_text_encoders_under_autocast(small):
    """Whole, and with checkpointing alike."""
    model = loaded(small("sdxl"), gradient_checkpointing=True, max_token_length=150)
    found = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        network = deft.create_network(1.0, 2, 2, None, model.text_encoders, model.denoiser)
        network.apply_to(model.text_encoders, model.denoiser)
        perturb(network)
        if checkpointing:
            model.place(torch.device("cpu"), torch.bfloat16, encoders=True)
        else:
            for part in (model.denoiser, *model.text_encoders):
                part.to(torch.bfloat16)
        with torch.autocast("cpu", torch.bfloat16):
            text = model.encode_text(["a cat", "y" * 100])
            answer = model.predict(torch.ones(2, 4, 8, 8), torch.tensor([1, 900]), text, torch.full((2, 6), 64.0))
        answer.float().square().mean().backward()
        gradients = {name: p.grad.clone() for name, p in network.named_parameters() if p.grad is not None}
        for start in ("lora_te1", "lora_te2", "lora_unet"):
            assert any(name.split(".")[0].startswith(start) and g.any() for name, g in gradients.items())
        found.append(gradients)
        network.remove()
    assert found[0].keys() == found[1].keys()
    sizes = [torch.stack([g.norm() for g in one.values()]) for one in found]
    assert float((sizes[0] - sizes[1]).norm() / sizes[0].norm()) < 0.05


# --- drawing ---------------------------------------------------------------------------------------------------------


def test_the_table_has_the_samplers():
    assert {name.removeprefix("k_") for name in SAMPLERS} == samplers.SAMPLERS.keys()


@pytest.mark.parametrize("name", SAMPLERS)
@pytest.mark.parametrize("kind", ["epsilon", "velocity", "zero snr"])
def test_each_sampler_draws_what_a_known_denoiser_asks_for(name, kind):
    """With a model that always sees the same picture behind the noise, every sampler ends at that picture."""
    if name.removeprefix("k_") == "lms":
        pytest.importorskip("scipy")
    schedule = DDPMScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
        prediction_type="epsilon" if kind == "epsilon" else "v_prediction", rescale_betas_zero_snr=kind == "zero snr",
    )  # fmt: skip
    sampler = samplers.sampler(name, schedule.config)
    picture, generator = torch.full((1, 4, 2, 2), 0.5), torch.Generator().manual_seed(0)
    sampler.set_timesteps(20)
    latents = torch.randn(1, 4, 2, 2, generator=generator) * sampler.init_noise_sigma
    alphas = schedule.alphas_cumprod.double().clamp(min=2.0**-24)
    for t in sampler.timesteps:
        seen = sampler.scale_model_input(latents, t).double()
        place = float(t)
        sigmas = ((1 - alphas) / alphas).sqrt().log()
        low, high = int(place), min(int(place) + 1, 999)
        sigma = (sigmas[low] + (place - low) * (sigmas[high] - sigmas[low])).exp()  # between timesteps: by log sigma
        alpha, noise = 1 / (1 + sigma**2).sqrt(), sigma / (1 + sigma**2).sqrt()
        epsilon = (seen - alpha * picture) / noise
        answer = epsilon if kind == "epsilon" else alpha * epsilon - noise * picture
        more = {} if "generator" not in sampler.step.__code__.co_varnames else {"generator": generator}
        latents = sampler.step(answer.float(), t, latents, **more).prev_sample
    assert float((latents - picture).abs().max()) < 0.15


@pytest.fixture(scope="module")
def zero_snr(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zero") / "model"
    return loaded(small_models.build("sd2", folder, prediction_type="v_prediction", rescale_betas_zero_snr=True))


@pytest.mark.parametrize("name", SAMPLERS)
def test_each_sampler_draws_in_however_few_steps(zero_snr, name):
    """With a model of velocity and zero terminal SNR."""
    if name.removeprefix("k_") == "lms":
        pytest.importorskip("scipy")
    assert zero_snr.velocity
    assert zero_snr.zero_snr
    for steps in (1, 2, 3, 5):
        picture = drawn(zero_snr, Prompt("a", width=72, height=40, seed=1, steps=steps), name)
        assert picture.std() > 10  # neither black nor grey


def test_draws_what_diffusers_draws(small):
    """With the text encoders gone, too."""
    model = loaded(small("sdxl"))
    pipeline = StableDiffusionXLPipeline.from_pretrained(small("sdxl"), add_watermarker=False)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.scheduler = model.sampler("euler")
    texts = [model.encode_text([text]) for text in ("a cat", "a dog")]
    wanted = pixels(
        pipeline("a cat", negative_prompt="a dog", width=64, height=64, num_inference_steps=3, guidance_scale=3,
                 generator=PROMPT.generator()).images[0]
    )  # fmt: skip
    model.free_text_encoders()
    assert model.text_encoders == []
    found = pixels(model.draw(PROMPT, *texts, "euler"))
    assert (found - wanted).abs().max() <= 1


def test_decodes_in_float32_under_autocast(small):
    model = loaded(small("sdxl"))
    latents = torch.randn(1, 4, 8, 8)
    with torch.autocast("cpu", torch.bfloat16):
        within = model.decode(latents.bfloat16().float())
    assert within.tobytes() == model.decode(latents.bfloat16()).tobytes()


def test_xformers_that_is_missing_is_told(small, caplog):
    model = loaded(small("sdxl"), xformers=True)
    model.place(torch.device("cpu"), torch.float32, encoders=True)
    assert any(line.startswith("--xformers: torch's own attention is used instead") for line in caplog.messages)


# --- a training ------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_accelerator")
def test_sdxl_trains_and_its_lora_draws_the_same_in_diffusers(small, photos, tmp_path, monkeypatch):
    trained = []
    train = train_network_deft.TrainingLoop.run
    monkeypatch.setattr(train_network_deft.TrainingLoop, "run", lambda self: (train(self), trained.append(self)))
    changes = {"learning_rate": 2e-2, "max_train_steps": 6, "network_dim": 4, "network_args": ["conv_dim=4"],
               "max_token_length": 150, "train_batch_size": 3}  # fmt: skip
    assert train_network_deft.main(arguments(small("sdxl"), photos, tmp_path, **changes)) == 0
    (loop,) = trained
    loop.adapter.module.eval()
    model = loop.losses.model
    ours = drawn(model)
    fresh = loaded(small("sdxl"), max_token_length=150)
    before = drawn(fresh)
    fresh.pipeline.load_lora_weights(str(tmp_path / "out"), weight_name="cat.safetensors")
    after = drawn(fresh)
    assert (ours - after).abs().max() < 2
    assert (before - after).abs().max() > 10
    assert model.names()["ss_base_model_version"] == "sdxl_base_v1-0"
