"""OmniGen: what it reads and answers, by diffusers' own transformer, processor and pipeline; training and drawing."""

from __future__ import annotations

import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from diffusers import OmniGenPipeline
from diffusers.pipelines.omnigen import pipeline_omnigen, processor_omnigen
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import train_network_deft
from library.models import omnigen_drawing
from library.models.loading import outline_of
from library.options.rooms import ModelOptions, ObjectiveOptions
from library.placeholders import misplaced, placeholder
from library.prompts import Prompt
from library.training.objective import objective_of
from library.training.randoms import Randoms
from networks import deft, deft_io
from networks.deft_config import DeftError
from networks.deft_progress import Bar
from tests import small_omnigen
from tests.conftest import arguments, deltas, loaded, network_of, perturb, relative_error

SIZES = torch.zeros(1, 6)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return small_omnigen.build(tmp_path_factory.mktemp("omnigen"))


@pytest.fixture(scope="module")
def model(folder):
    """As loaded; nothing here changes it."""
    return loaded(folder)


def picture(seed: int, height: int, width: int) -> Tensor:
    return torch.randn(4, height, width, generator=torch.Generator().manual_seed(seed))


# captions of several lengths with pictures of several sizes, one of them twice; their order is no picture's
BATCH = [
    ("a cat", []),
    ("put <img><|image_2|></img> on <img><|image_1|></img>, as in <img><|image_2|></img>!",
     [picture(1, 4, 8), picture(2, 6, 4)]),
    ("", []),
    ("<img><|image_1|></img>" + " as a very long and rambling description of it" * 3, [picture(3, 10, 2)]),
]  # fmt: skip


def predicted(model, batch=BATCH, noisy=None, timesteps=None):
    noisy = torch.randn(len(batch), 4, 8, 6, generator=torch.Generator().manual_seed(9)) if noisy is None else noisy
    timesteps = torch.linspace(30, 900, len(batch)) if timesteps is None else timesteps
    text = model.encode_text([caption for caption, _ in batch], [inputs for _, inputs in batch])
    return model.predict(noisy, timesteps, text, SIZES.expand(len(batch), 6))


def theirs(model, noisy: Tensor, time: float, caption: str, inputs: list[Tensor]) -> Tensor:
    """(1, c, h, w): what diffusers' own processor, collator and transformer make of one caption."""
    processor = processor_omnigen.OmniGenMultiModalProcessor.__new__(processor_omnigen.OmniGenMultiModalProcessor)
    processor.text_tokenizer = model.pipeline.tokenizer
    pixels = [torch.zeros(3, 8 * one.shape[1], 8 * one.shape[2]) for one in inputs]
    made = processor.process_multi_modal_prompt(caption, pixels)
    shown = [inputs[int(number) - 1][None] for number in re.findall(r"image_(\d+)", caption)]
    collator = processor_omnigen.OmniGenCollator(hidden_size=model.denoiser.config.hidden_size)
    size = [8 * noisy.shape[-2], 8 * noisy.shape[-1]]
    ids, positions, mask, _, _, spans = collator.process_mllm_input([made], [size])
    return model.denoiser(noisy, torch.tensor([time]), ids, shown, spans, mask, positions, return_dict=False)[0]


# --- what it reads and answers ---------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("positions", [1024, 150], ids=["short alone", "short and long"])
def test_each_row_of_a_batch_is_what_diffusers_makes_of_it_alone(positions, tmp_path):
    """Neither another row's positions nor the rotary factors of long sequences get into it."""
    model = loaded(small_omnigen.build(tmp_path, original_max_position_embeddings=positions))
    noisy, timesteps = torch.randn(4, 4, 8, 6), torch.tensor([900.0, 500, 3, 250])
    ours = predicted(model, BATCH, noisy, timesteps)
    lengths = model.encode_text([caption for caption, _ in BATCH], [inputs for _, inputs in BATCH])["lengths"]
    assert (lengths + 13 > 150).tolist() == [False, False, False, True]
    for i, (caption, inputs) in enumerate(BATCH):
        alone = theirs(model, noisy[i : i + 1], 1 - float(timesteps[i]) / 1000, caption or "<cfg>", inputs)
        assert relative_error(-ours[i], alone[0]) < 1e-5, caption
    order = [3, 1, 0, 2]
    again = predicted(model, [BATCH[i] for i in order], noisy[order], timesteps[order])
    assert relative_error(again, ours[order]) < 1e-5
    assert relative_error(predicted(model, BATCH[3:], noisy[3:], timesteps[3:]), ours[3:]) < 1e-5


@torch.no_grad()
def test_rows_of_texts_can_be_chosen(model):
    """As the loss of a part of a batch does."""
    noisy, timesteps = torch.randn(4, 4, 8, 6), torch.tensor([900.0, 500, 3, 250])
    text = model.encode_text([caption for caption, _ in BATCH], [inputs for _, inputs in BATCH])
    rows = [2, 1]
    some = model.predict(noisy[rows], timesteps[rows], {name: value[rows] for name, value in text.items()}, SIZES)
    assert relative_error(some, predicted(model, BATCH, noisy, timesteps)[rows]) < 1e-5


@torch.no_grad()
def test_everything_that_is_shown_counts(model):
    """The words, each picture, which of them stands where, and that a condition was dropped."""
    noisy, caption, (first, second) = torch.randn(1, 4, 8, 6), BATCH[1][0], BATCH[1][1]
    answers = [
        predicted(model, [row], noisy)
        for row in (BATCH[1], (caption.replace("on", "in"), [first, second]), (caption, [2 * first, second]),
                    (caption, [first, second.mT.contiguous()]), (caption, [second, first]), ("a cat", []), ("", []))
    ]  # fmt: skip
    for i, one in enumerate(answers):
        for other in answers[:i]:
            assert relative_error(one, other) > 1e-3


def test_a_dropped_condition(model):
    assert model.dropped == "<cfg>"
    dropped, empty = (model.encode_text([caption])["ids"] for caption in (model.dropped, ""))
    assert torch.equal(dropped, empty)
    told = model.pipeline.tokenizer.decode(dropped[0])
    assert told == ("<s><|user|>\nGenerate an image according to the following instructions\n"
                    "<cfg><|end|>\n<|assistant|>\n<|diffusion|>")  # fmt: skip


@pytest.mark.parametrize(
    ("caption", "number", "told"),
    [
        ("a cat", 1, "it has to name its input pictures, as in <img><|image_1|></img>"),
        ("<img><|image_2|></img> and <img><|image_3|></img>", 2, "it names <|image_3|>, and there are 2 input"),
        ("<img><|image_1|></img>", 0, "it names <|image_1|>, and there are 0 input pictures"),
        ("<img><|image_1|></img>", 2, "it has to name its input pictures, as in <img><|image_2|></img>"),
    ],
)
def test_captions_that_do_not_name_their_pictures_end_in_one_line(model, caption, number, told):
    assert misplaced(caption, number).startswith(told)
    with pytest.raises(DeftError, match=re.escape(f"caption '{caption}': {told}")):
        model.encode_text([caption], [[picture(0, 4, 4)] * number])
    assert misplaced(*BATCH[1][:1], 2) is None


@pytest.mark.parametrize("size", [(66, 4), (4, 66)])
def test_pictures_that_are_too_large_end_in_one_line(model, size):
    for noisy, inputs in ((torch.zeros(1, 4, *size), []), (torch.zeros(1, 4, 4, 4), [torch.zeros(4, *size)])):
        with pytest.raises(DeftError, match="a picture has 66 latents a side, OmniGen knows places of 64"):
            predicted(model, [("<img><|image_1|></img>" if inputs else "", inputs)], noisy)


# --- objective -------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_the_loss_is_the_original_s(model):
    """x_t = t x_1 + (1 - t) x_0, the answer to t is compared with x_1 - x_0, and t = 1 is the picture."""
    objective = objective_of(ObjectiveOptions(), model)
    assert (objective.options.timestep_sampling, objective.options.model_prediction_type) == ("sigmoid", "raw")
    x1, sizes = torch.randn(4, 4, 8, 6), SIZES.expand(4, 6)
    noised = objective.draw(Randoms(1, 0, range(4)), x1)
    x0, text = noised.target + x1, model.encode_text([c for c, _ in BATCH], [inputs for _, inputs in BATCH])
    losses = objective.loss(noised, model.predict(noised.noisy, noised.timesteps, text, sizes))
    for i, (caption, inputs) in enumerate(BATCH):
        t = 1 - float(noised.timesteps[i]) / 1000
        assert relative_error(noised.noisy[i], t * x1[i] + (1 - t) * x0[i]) < 1e-5
        answer = theirs(model, noised.noisy[i : i + 1], t, caption or "<cfg>", inputs)[0]
        assert float(losses[i]) == pytest.approx(float((answer - (x1[i] - x0[i])).square().mean()), rel=1e-4)


def test_times_are_drawn_as_the_original_draws_them(model):
    """sigmoid(u), u normal: the time of what is shown and that of the noise have the same distribution."""
    objective = objective_of(ObjectiveOptions(), model)
    drawn = torch.cat([objective.draw(Randoms(1, i, range(8)), torch.zeros(8, 1, 2, 2)).timesteps for i in range(300)])
    u = torch.logit(drawn / 1000)
    assert float(u.mean()) == pytest.approx(0, abs=5 / math.sqrt(len(u)))
    assert float(u.std()) == pytest.approx(1, abs=5 / math.sqrt(len(u)))


def test_options_of_flow_matching_are_the_user_s_where_they_are_given(model, caplog):
    given = ObjectiveOptions(timestep_sampling="shift", discrete_flow_shift=2.0, model_prediction_type="sigma_scaled")
    assert objective_of(given, model).options == given
    assert "give raw" in caplog.text


# --- adapters --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_an_adapter_starts_as_the_model_and_is_the_same_merged(folder, tmp_path):
    model, file = loaded(folder), str(tmp_path / "x.safetensors")
    base = predicted(model)
    network = network_of(model, trained=False, train_mlp="true")
    assert len(network.all_modules) == 2 * 6
    assert torch.equal(predicted(model), base)
    perturb(network)
    trained = predicted(model)
    network.save_weights(file, torch.float32, None)
    network.remove()
    assert torch.equal(predicted(model), base)
    adapter = deft_io.read_adapter(file)
    deft.network_of_adapter(1.0, adapter, [], model.denoiser, for_inference=True).merge_to(
        [], model.denoiser, adapter.tensors
    )
    assert relative_error(predicted(model), trained) < 1e-5
    assert relative_error(base, trained) > 1e-2


def test_gradients_are_the_same_with_checkpointing(folder):
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = loaded(folder, gradient_checkpointing=checkpointing)
        network = network_of(model)
        model.place(torch.device("cpu"), torch.float32, encoders=True)
        predicted(model).square().mean().backward()
        gradients.append({name: p.grad for name, p in network.named_parameters() if p.grad is not None})
    assert gradients[0].keys() == gradients[1].keys()
    assert len(gradients[0]) == 2 * len(network.all_modules)
    for name, gradient in gradients[0].items():
        assert gradient.any()
        assert relative_error(gradients[1][name], gradient) < 1e-4, name


@torch.no_grad()
def test_weights_in_8_bits(folder):
    """Those of the blocks; what diffusers leaves as it is, embeddings of words and pictures, stays."""
    model, other = loaded(folder, fp8_base=True), loaded(folder)
    model.place(torch.device("cpu"), torch.bfloat16, encoders=True)
    held = {name: weight.dtype for name, weight in model.denoiser.named_parameters()}
    assert held["layers.1.self_attn.to_q.weight"] == held["layers.0.mlp.down_proj.weight"] == torch.float8_e4m3fn
    assert held["embed_tokens.weight"] == held["patch_embedding.input_image_proj.weight"] == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16):
        found = predicted(model).float()
    assert relative_error(found, predicted(other)) < 0.15


# --- pictures --------------------------------------------------------------------------------------------------------


class Transforms:
    """What diffusers' processor takes from torchvision, so that its pipeline can be made without it."""

    @staticmethod
    def Compose(steps):
        def run(value):
            for step in steps:
                value = step(value)
            return value

        return run

    @staticmethod
    def Lambda(function):
        return function

    @staticmethod
    def ToTensor():
        return lambda image: torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1).float() / 255

    @staticmethod
    def Normalize(mean, std, inplace):
        return lambda pixels: (pixels - mean[0]) / std[0]


@pytest.fixture
def pipeline(folder, monkeypatch):
    processor = processor_omnigen.OmniGenMultiModalProcessor
    monkeypatch.setattr(processor_omnigen, "transforms", Transforms, raising=False)
    monkeypatch.setattr(pipeline_omnigen, "OmniGenMultiModalProcessor", processor, raising=False)
    found = OmniGenPipeline.from_pretrained(str(folder))
    found.set_progress_bar_config(disable=True)
    found.multimodal_processor.collator.hidden_size = found.transformer.config.hidden_size
    return found


@torch.no_grad()
@pytest.mark.parametrize("number", [0, 2])
def test_pictures_are_those_of_diffusers_pipeline(number, model, pipeline):
    """Where its prompt is longer than its negative one, which is the first row that its positions are right for."""
    from PIL import Image

    text = " ".join(placeholder(k + 1) for k in range(number)) + " a cat" * 100
    assert len(text) > len(omnigen_drawing.NEGATIVE)
    shown = [np.random.default_rng(k).integers(0, 256, size, np.uint8) for k, size in
             enumerate([(32, 48, 3), (64, 16, 3)][:number])]  # fmt: skip
    inputs = [pipeline.multimodal_processor.process_image(Image.fromarray(one)) for one in shown]
    latents = [model.vae.encode(one[None]).latent_dist.mode()[0] * 0.13025 for one in inputs]
    pipeline.encode_input_images = lambda pixels, device: [
        model.vae.encode(one).latent_dist.mode() * 0.13025 for one in pixels
    ]
    images = pipeline(
        text, [Image.fromarray(one) for one in shown] or None, height=48, width=64, num_inference_steps=3,
        guidance_scale=3.0, img_guidance_scale=1.4, generator=torch.Generator().manual_seed(4),
    ).images  # fmt: skip
    drawn = {}
    for name, changes in {"same": {}, "text": {"guidance": 6.0}, "pictures": {"embedded_guidance": 4.0}}.items():
        prompt = Prompt(text, width=64, height=48, seed=4, steps=3, guidance=3.0, embedded_guidance=1.4)
        prompt = Prompt(**(vars(prompt) | changes))
        drawn[name] = np.asarray(model.draw(
            prompt, model.encode_text([text], [latents]), model.encode_text([""]), None, Bar(3, "", ""), latents
        )).astype(float)  # fmt: skip
    assert np.abs(drawn["same"] - np.asarray(images[0])).max() < 2
    assert np.abs(drawn["text"] - drawn["same"]).max() > 5
    assert (np.abs(drawn["pictures"] - drawn["same"]).max() > 5) == bool(number)


@torch.no_grad()
def test_seeds_negatives_sizes_and_samplers(model, caplog):
    text, negative = model.encode_text(["a cat"]), model.encode_text(["blue"])

    def drawn(given, **changes):
        prompt = Prompt(**({"text": "a cat", "width": 72, "height": 56, "seed": 1, "steps": 2} | changes))
        return model.draw(prompt, text, given, "euler_a", None)

    first = drawn(negative)
    assert first.size == (64, 48)
    assert np.array_equal(first, drawn(None))  # no negative prompt: the pipelines' own
    assert not np.array_equal(first, drawn(negative, seed=2))
    assert not np.array_equal(first, drawn(negative, negative="blue"))
    assert np.array_equal(drawn(negative, guidance=1.0), drawn(negative, guidance=1.0, negative="blue"))
    assert "--sample_sampler=euler_a: OmniGen is drawn by euler alone" in caplog.messages
    assert model.multiple_of == 16


def test_the_pipeline_draws_what_is_to_be_kept(folder, tmp_path):
    """`keep=` a prompts file: its pictures, several at once, are drawn with the model as it is."""
    from library import keep

    prompts = tmp_path / "keep.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 2\na dog of whom more is told --w 64 --h 64 --s 2\n", encoding="utf-8")
    pipeline = keep.load(str(folder), "cpu", torch.float32)
    found = keep.directions_to_keep(pipeline, keep.read_prompts(prompts, (64, 64)), 3)
    assert set(found) == set(deltas(network_of(loaded(folder), train_mlp="true")))
    assert {tuple(U.shape) for name, U in found.items() if "down_proj" not in name} == {(32, 3)}


# --- loading ---------------------------------------------------------------------------------------------------------


def original_of(folder, to):
    """The same model in the original's layout: q, k and v one weight, its own names, tokenizer and VAE beside."""
    shutil.copytree(folder / "tokenizer", to)
    shutil.copytree(folder / "vae", to / "vae")
    config = json.loads((folder / "transformer" / "config.json").read_text())
    names = ("hidden_size", "rms_norm_eps", "num_attention_heads", "num_key_value_heads", "intermediate_size",
             "vocab_size", "pad_token_id", "max_position_embeddings", "original_max_position_embeddings")  # fmt: skip
    theirs = {name: config[name] for name in names} | {
        "num_hidden_layers": config["num_layers"], "rope_theta": config["rope_base"], "model_type": "phi3",
        "rope_scaling": config["rope_scaling"] | {"type": "su"},
    }  # fmt: skip
    (to / "config.json").write_text(json.dumps(theirs), encoding="utf-8")
    state = {k: v for file in (folder / "transformer").glob("*.safetensors") for k, v in load_file(file).items()}
    table = (("to_out.0", "o_proj"), ("patch_embedding.output_image_proj", "x_embedder.proj"),
             ("patch_embedding.input_image_proj", "input_x_embedder.proj"), ("patch_embedding.pos_embed", "pos_embed"),
             ("linear_1", "mlp.0"), ("linear_2", "mlp.2"), ("norm_out.linear", "final_layer.adaLN_modulation.1"),
             ("proj_out", "final_layer.linear"))  # fmt: skip
    tensors = {}
    for key, value in state.items():
        if re.search("to_[kv]", key):
            continue
        if "to_q" in key:
            value = torch.cat([state[key.replace("to_q", f"to_{kind}")] for kind in "qkv"])
        key = key.replace("to_q", "qkv_proj")
        for ours, other in table:
            key = key.replace(ours, other)
        inside = key.startswith(("layers.", "norm.", "embed_tokens."))
        tensors[f"llm.{key}" if inside else key] = value.contiguous()
    save_file(tensors, to / "model.safetensors")
    return to


@torch.no_grad()
def test_the_original_s_folder_is_the_same_model(folder, model, tmp_path):
    found = loaded(original_of(folder, tmp_path / "original"))
    state, expected = found.denoiser.state_dict(), model.denoiser.state_dict()
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[name], weight) for name, weight in expected.items())
    assert (
        dict(found.denoiser.config).items()
        >= {name: value for name, value in model.denoiser.config.items() if not name.startswith("_")}.items()
    )
    assert torch.equal(predicted(found), predicted(model))
    again = {name: sampler.set_timesteps(sigmas=[1, 0.5]) or sampler.timesteps.tolist() for name, sampler in
             (("found", found.sampler(None)), ("model", model.sampler(None)))}  # fmt: skip
    assert again["found"] == again["model"] == [0, 0.5]


def test_all_parts_have_the_type_of_the_training_and_the_vae_float32(folder, tmp_path):
    from library.models.loading import load

    for location in (folder, original_of(folder, tmp_path / "original")):
        found = load(ModelOptions(str(location)), torch.bfloat16)
        assert {weight.dtype for weight in found.denoiser.parameters()} == {torch.bfloat16}
        assert {weight.dtype for weight in found.vae.parameters()} == {torch.float32}
        assert not any(weight.requires_grad for weight in found.denoiser.parameters())
        assert not found.text_encoders
        assert len(found.tokenizers) == 1


def test_what_is_not_read_ends_in_one_line(folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    file = next(iter((broken / "transformer").glob("*00002*.safetensors")))
    tensors = load_file(file)
    name = sorted(tensors)[0]
    del tensors[name]
    save_file(tensors, file)
    with pytest.raises(DeftError, match=r"1 weights of a OmniGenTransformer2DModel are missing"):
        loaded(broken)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(DeftError, match="not a readable OmniGen model"):
        loaded(broken)
    shutil.rmtree(broken / "tokenizer")
    with pytest.raises(DeftError, match="no tokenizer there"):
        outline_of(ModelOptions(str(broken)))
    for original, told in ((original_of(folder, tmp_path / "cut"), r"weights of a OmniGenTransformer2DModel"),):
        tensors = load_file(original / "model.safetensors")
        save_file({k: v for k, v in tensors.items() if "final_layer" not in k}, original / "model.safetensors")
        with pytest.raises(DeftError, match=told):
            loaded(original)
    (original / "model.safetensors").rename(original / "model.pt")
    with pytest.raises(DeftError, match="no Diffusers model folder"):
        loaded(original)


def test_another_vae_in_the_model_s_own_scale(folder, tmp_path):
    vae = loaded(folder).vae
    vae.register_to_config(scaling_factor=0.5)
    with torch.no_grad():
        vae.decoder.conv_out.bias.add_(1)
    vae.save_pretrained(str(tmp_path / "vae"))
    found = loaded(folder, vae=str(tmp_path / "vae")).vae
    assert torch.equal(found.decoder.conv_out.bias, vae.decoder.conv_out.bias)
    assert found.config.scaling_factor == 0.13025


def test_other_families_options_are_told(folder, caplog):
    loaded(folder, clip_skip=2, xformers=True)
    assert "--clip_skip, --xformers: without effect, OmniGen has nothing of the kind" in caplog.messages


def test_outline_and_names(folder, model, tmp_path):
    for location in (folder, original_of(folder, tmp_path / "original")):
        found = outline_of(ModelOptions(str(location)))
        assert found.multiple_of == 16
        assert found.encoders[0].length == 4096
        assert found.encoders[0].beyond("a cat" * 50) == model.beyond("a cat" * 50)[0] == ""
        assert len(found.encoders[0].ids("a cat")) == 5
    names = model.names()
    assert (names["ss_base_model_version"], names["modelspec.architecture"]) == ("omnigen1", "omnigen-1/lora")


# --- training --------------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("more", [{"fp8_base": True}, {"network_args": ["train_mlp=true"], "train_batch_size": 2}])
def test_trains_saves_and_draws(more, folder, photos, tmp_path, capsys):
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 64 --s 1\na dog --w 64 --h 48 --s 1 --l 3 --g 2 --n blue\n")
    common = {"mixed_precision": "bf16", "gradient_checkpointing": True, "max_train_steps": 3, "learning_rate": 1e-2,
              "caption_dropout_rate": 0.5, "sample_prompts": tmp_path / "p.txt", "sample_at_first": True}  # fmt: skip
    assert train_network_deft.main(arguments(folder, photos, tmp_path, **common, **more)) == 0, capsys.readouterr()
    assert len(list((tmp_path / "out" / "sample").iterdir())) == 2
    with safe_open(tmp_path / "out" / "cat.safetensors", "pt") as file:
        metadata, names = file.metadata(), {key.split(".")[0] for key in file.keys()}
        moved = [name for name in names if file.get_tensor(f"{name}.lora_up.weight").any()]
    assert {"lora_unet_layers_1_self_attn_to_q", "lora_unet_layers_0_self_attn_to_out_0"} < names
    assert len(moved) == len(names) == (12 if "network_args" in more else 8)
    assert metadata["ss_base_model_version"] == "omnigen1"
    assert metadata["modelspec.architecture"] == "omnigen-1/lora"
    assert (metadata["ss_timestep_sampling"], metadata["ss_model_prediction_type"]) == ("sigmoid", "raw")


@pytest.mark.usefixtures("fresh_accelerator")
def test_goes_on_where_it_was(folder, photos, tmp_path):
    whole = {"max_train_steps": 4, "learning_rate": 1e-2, "save_every_n_steps": 2, "save_state": True}
    assert train_network_deft.main(arguments(folder, photos, tmp_path, **whole)) == 0
    finished = load_file(tmp_path / "out" / "cat.safetensors")
    (tmp_path / "out" / "cat.safetensors").unlink()
    state = next((tmp_path / "out").glob("*step00000002-state"))
    assert train_network_deft.main(arguments(folder, photos, tmp_path, **whole, resume=state)) == 0
    again = load_file(tmp_path / "out" / "cat.safetensors")
    assert again.keys() == finished.keys()
    assert all(torch.equal(again[key], value) for key, value in finished.items())


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("option", ["cache_text_encoder_outputs", "network_train_text_encoder_only"])
def test_options_of_text_encoders_end_in_one_line(option, folder, photos, tmp_path, capsys):
    more = {option: True} | ({"network_train_unet_only": True} if "cache" in option else {})
    assert train_network_deft.main(arguments(folder, photos, tmp_path, **more)) == 2
    line = f"--{option}: OmniGen has no text encoder, words go through what is trained; leave it out"
    assert capsys.readouterr().err.strip().endswith(line)


@pytest.mark.usefixtures("fresh_accelerator")
def test_a_page_of_what_would_be_trained_on(folder, photos, tmp_path, capsys):
    assert train_network_deft.main(arguments(folder, photos, tmp_path, debug_dataset=True)) == 0
    assert any(path.endswith(".html") for path in capsys.readouterr().out.split())
