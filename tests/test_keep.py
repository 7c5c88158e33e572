"""`keep=FILE`: directions found by `library.keep`, and adapters that stay out of them."""

from __future__ import annotations

import json
import shutil
import statistics

import diffusers
import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from library import keep, sampling
from library.prompts import Prompt
from library.world import measure
from library.world import tokenizer as clip_tokenizer
from networks import deft, deft_io, deft_keep
from networks.deft_config import DeftConfig, DeftError
from tests.conftest import deltas, relative_error
from tests.test_architectures import Flux, flux_transformer, network, sdxl_unet

KEPT = 3


def orthonormal(n: int, k: int) -> torch.Tensor:
    return torch.linalg.qr(torch.randn(n, k))[0]


@pytest.fixture
def file(tmp_path) -> str:
    """Directions of the small FLUX.1's layers; of one layer there are fewer."""
    torch.manual_seed(5)
    net = deft.create_network(1.0, 1, 1, None, [], Flux())
    found = {m.target.file_name: orthonormal(m.target.shape[1], KEPT) for m in net.all_modules}
    found["lora_unet_single_blocks_0_linear2"] = orthonormal(120, 1)
    path = str(tmp_path / "keep.safetensors")
    tensors, metadata = deft_io.kept_tensors(found)
    deft_io.write_safetensors(tensors, path, metadata)
    return path


def kept_network(model: Flux, file: str, **options) -> deft.DeftNetwork:
    return network(model, removal="0", keep=file, **options)


@pytest.mark.parametrize("spanned", [40, 7])
def test_directions_are_those_of_an_svd(spanned):
    torch.manual_seed(0)
    sizes = torch.logspace(0, -2, spanned)
    X = torch.randn(2000, spanned) * sizes @ orthonormal(40, spanned).mT
    sketch = deft_keep.Sketch(deft_keep.test_directions(40, 10), 10)
    for part in X.split(300):
        sketch.add(part)
    found = sketch.directions().float()
    exact = torch.linalg.svd(X, full_matrices=False)[2][: min(10, spanned)].mT
    assert found.shape == exact.shape
    assert relative_error(found.mT @ found, torch.eye(found.shape[1])) < 1e-5
    left, least = X - X @ found @ found.mT, X - X @ exact @ exact.mT
    assert left.norm() < 1.1 * least.norm() + 1e-3 * X.norm()


@pytest.mark.parametrize(
    "layer",
    [
        nn.Linear(6, 4),
        nn.Conv2d(3, 5, 3, padding=1),
        nn.Conv2d(3, 5, 3, stride=2, dilation=2),
        nn.Conv2d(3, 5, 1),
        nn.Conv2d(3, 5, 3, padding="same"),
    ],
)
def test_inputs_are_what_the_weight_is_multiplied_with(layer):
    x = torch.randn(2, 6, 8, 6) if isinstance(layer, nn.Linear) else torch.randn(2, 3, 9, 8)
    out = layer(x) if isinstance(layer, nn.Linear) else layer(x).permute(0, 2, 3, 1)
    rows = F.linear(deft_keep.inputs_of(layer, x), layer.weight.flatten(1), layer.bias)
    assert relative_error(rows, out.reshape(rows.shape)) < 1e-6
    some = deft_keep.inputs_of(layer, x, 5, torch.Generator().manual_seed(0))
    chosen = torch.randint(len(rows), (5,), generator=torch.Generator().manual_seed(0))
    assert relative_error(F.linear(some, layer.weight.flatten(1), layer.bias), rows[chosen]) < 1e-6


@pytest.mark.parametrize("options", [{}, {"split_qkv": "true"}], ids=str)
def test_an_adapter_adds_nothing_in_its_kept_directions(file, tmp_path, options):
    net = kept_network(Flux(), file, **options)
    directions = deft_keep.read_kept(file)
    assert {m.kept.shape[1] for m in net.all_modules} == {1, KEPT}
    for module in net.all_modules:
        up, down = module.lora_factors()
        assert (up @ down).norm() > 0.01
        assert (down @ directions[module.target.file_name]).norm() < 1e-5 * down.norm()
    saved = str(tmp_path / "x.safetensors")
    net.save_weights(saved, torch.float16, None)
    for name, layer in deft_io.read_adapter(saved).layers.items():
        assert (layer.down.float() @ directions[name]).norm() < 2e-3 * layer.down.float().norm()


@pytest.mark.parametrize("batched", [True, False])
def test_gradients_equal_float64_autograd(file, batched):
    model, x = Flux(double=0, single=1), torch.randn(2, 5, 4)
    net = kept_network(model, file).train()
    net.batched = batched
    model(x).square().sum().backward()
    by_name = {m.lora_name.removeprefix("lora_unet_single_blocks_0_"): m for m in net.all_modules}
    leaves = {name: [t.detach().double().requires_grad_() for t in (m.P, m.R)] for name, m in by_name.items()}
    directions = deft_keep.read_kept(file)

    def adapted(name: str, layer: nn.Linear, h):
        P, R = leaves[name]
        Q = torch.linalg.qr(P).Q
        Q = Q * (Q * P).sum(0).sign()
        U = directions[by_name[name].lora_name].double()
        R = by_name[name].R_rate * R
        return F.linear(h, layer.weight.double() + by_name[name].scale * Q @ (R - R @ U @ U.T), layer.bias.double())

    block = model.single_blocks[0]
    h = F.linear(x.double(), model.img_in.weight.double(), model.img_in.bias.double())
    y = adapted("linear1", block.linear1, h)
    (h + adapted("linear2", block.linear2, torch.tanh(y[..., :120]))).square().sum().backward()
    for name in ("linear1", "linear2"):
        for ours, theirs in zip((by_name[name].P, by_name[name].R), leaves[name], strict=True):
            assert relative_error(ours.grad.double(), theirs.grad) < 1e-4, name


@pytest.mark.parametrize("save_format", ["lora", "deft"])
def test_a_training_goes_on_from_its_file(file, tmp_path, save_format):
    saved = str(tmp_path / "x.safetensors")
    net = kept_network(Flux(), file, save_format=save_format)
    net.save_weights(saved, torch.float32, None)
    again = kept_network(Flux(), file, trained=False)
    again.load_weights(saved)
    for name, delta in deltas(net).items():
        assert relative_error(deltas(again)[name], delta) < 1e-5
    whole, _ = deft.create_network_from_weights(1.0, saved, None, [], Flux(), for_inference=True)
    assert whole.config.keep is None
    assert "kept" not in "".join(again.state_dict())


def test_a_file_names_what_was_kept_without_its_folders(file, tmp_path):
    saved = tmp_path / "cat.safetensors"
    net = kept_network(Flux(), f"{file}, {file}")
    net.save_weights(str(saved), torch.float32, {})
    metadata = deft_io.read_metadata(saved)
    assert json.loads(metadata["deft_options"])["keep"] == "keep.safetensors,keep.safetensors"
    assert str(tmp_path) not in str(metadata)
    assert DeftConfig(keep="C:\\Users\\me\\k.safetensors").to_json().count("me") == 0


def test_what_is_refused(file, tmp_path):
    trained = str(tmp_path / "x.safetensors")
    network(Flux(), removal="0").save_weights(trained, torch.float32, None)
    with pytest.raises(DeftError, match=r"lora_unet_\w+: \d+% of the adapter lies in the directions of keep="):
        kept_network(Flux(), file).load_weights(trained)
    with pytest.raises(DeftError, match="keep=x: what is removed does not stay out of its directions; use removal=0"):
        network(Flux(), removal="1", keep="x")
    neither = str(tmp_path / "neither.safetensors")
    deft_io.write_safetensors({"x": torch.ones(2, 2)}, neither, {})
    with pytest.raises(DeftError, match=r"no file of `python -m library.keep`, and no adapter"):
        kept_network(Flux(), neither)
    with pytest.raises(DeftError, match="has 32 inputs, the file is made for a model with 24"):
        kept_network(Flux(dim=32), file)
    with pytest.raises(DeftError, match=r"keep=nowhere.safetensors: no such file"):
        kept_network(Flux(), "nowhere.safetensors")
    with pytest.raises(
        DeftError, match=r"keep=x.txt: only train_network_deft.py takes prompts; make a file with `python -m"
    ):
        kept_network(Flux(), "x.txt")


def sdxl_pipeline(tokenizer, clip) -> diffusers.DiffusionPipeline:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=4,
                                  down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    return diffusers.StableDiffusionXLPipeline(
        vae=vae, text_encoder=clip(transformers.CLIPTextModel, 8), tokenizer=tokenizer, tokenizer_2=tokenizer,
        text_encoder_2=clip(transformers.CLIPTextModelWithProjection, 16), unet=sdxl_unet(),
        scheduler=diffusers.EulerDiscreteScheduler(),
    )  # fmt: skip


def flux_pipeline(tokenizer, clip) -> diffusers.DiffusionPipeline:
    vae = diffusers.AutoencoderKL(block_out_channels=(8,) * 4, norm_num_groups=4, latent_channels=1,
                                  down_block_types=("DownEncoderBlock2D",) * 4,
                                  up_block_types=("UpDecoderBlock2D",) * 4)  # fmt: skip
    transformer = flux_transformer()
    width = transformer.config.joint_attention_dim
    t5 = transformers.T5Config(vocab_size=len(tokenizer), d_model=width, d_kv=8, d_ff=32, num_layers=1, num_heads=2,
                               feed_forward_proj="gated-gelu")  # fmt: skip
    return diffusers.FluxPipeline(
        vae=vae, text_encoder=clip(transformers.CLIPTextModel, transformer.config.pooled_projection_dim),
        tokenizer=tokenizer, text_encoder_2=transformers.T5EncoderModel(t5), tokenizer_2=tokenizer,
        transformer=transformer, scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )  # fmt: skip


@pytest.mark.parametrize("make", [sdxl_pipeline, flux_pipeline])
def test_directions_of_other_pipelines(make, tmp_path):
    """Every layer that a network can adapt in SDXL's and FLUX.1's pipelines of diffusers, and in each of its parts."""
    tokenizer = clip_tokenizer.build(tmp_path / "tokenizer")

    def clip(kind, width):
        ids = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
        return kind(transformers.CLIPTextConfig(
            vocab_size=len(tokenizer), hidden_size=width, intermediate_size=32, num_hidden_layers=2,
            num_attention_heads=2, projection_dim=width, **ids,
        )).eval()  # fmt: skip

    torch.manual_seed(0)
    pipeline = make(tokenizer, clip)
    pipeline.set_progress_bar_config(disable=True)
    found = keep.directions_to_keep(pipeline, [Prompt("a cat", width=64, height=64, steps=2)], 8)
    tensors, metadata = deft_io.kept_tensors(found)
    file = str(tmp_path / "keep.safetensors")
    deft_io.write_safetensors(tensors, file, metadata)
    assert len(tensors) < len(found)  # queries, keys and values share theirs
    is_unet = hasattr(pipeline, "unet")
    options = {"conv_dim": "1"} if is_unet else {"train_t5xxl": "true", "split_qkv": "true"}
    encoders, denoiser = [pipeline.text_encoder, pipeline.text_encoder_2], getattr(pipeline, "unet", None)
    net = network(denoiser or pipeline.transformer, 1, encoders, removal="0", keep=file, **options)
    assert not [m.lora_name for m in net.all_modules if m.kept is None]


def test_a_part_of_many_inputs_has_their_directions(monkeypatch):
    torch.manual_seed(0)
    model, x = Flux(double=0, single=1), torch.randn(2, 2000, 4)
    layers = [m.target for m in deft.create_network(1.0, 1, 1, None, [], model).all_modules]
    found, seen = [], []
    handle = layers[0].layer.register_forward_pre_hook(lambda layer, args: seen.append(args[0].flatten(0, 1)))
    for rows in (10**6, 300, 300):
        monkeypatch.setattr(deft_keep, "ROWS", rows)
        with deft_keep.Watch(layers, 4) as watch, torch.no_grad():
            model(x)
        found.append(watch.sketches[layers[0].file_name].directions().float())
    handle.remove()
    whole, part, again = ((seen[0] @ U).norm() / seen[0].norm() for U in found)
    assert part == again
    assert 0.98 * whole < part < whole


def test_prompts_repeat(tmp_path):
    """The shipped ones too, and a line's own numbers count."""
    shipped = keep.read_prompts(keep.PROMPTS, (512, 512))
    assert shipped == keep.read_prompts(keep.PROMPTS, (512, 512))
    assert len(shipped) == len({prompt.text for prompt in shipped}) > 50
    assert {(prompt.width, prompt.steps) for prompt in shipped} == {(512, keep.STEPS)}
    file = tmp_path / "prompts.txt"
    file.write_text("# kept\na cat\na dog --d 9 --s 4 --w 64\n", encoding="utf-8")
    cat, dog = keep.read_prompts(file, (512, 256))
    assert (cat.seed, cat.steps, cat.width, cat.height) == (0, keep.STEPS, 512, 256)
    assert (dog.seed, dog.steps, dog.width, dog.height) == (9, 4, 64, 256)


def test_pictures_drawn_together_are_those_drawn_alone(monkeypatch):
    pipeline = keep.load(str(measure.MODEL), "cpu", torch.float32)
    prompts = [Prompt(text, width=64, height=64, seed=i, steps=2) for i, text in enumerate(("a red star",
               "two blue rings", "a sketch of a moon"))]  # fmt: skip
    prompts.append(Prompt("a heart", width=32, height=64, seed=7, steps=1, negative="a star"))
    calls, call = [], type(pipeline).__call__
    monkeypatch.setattr(type(pipeline), "__call__", lambda *args, **rest: calls.append(args[1]) or call(*args, **rest))
    together, number = keep.directions_to_keep(pipeline, prompts, 8), len(calls)
    monkeypatch.setattr(keep, "PIXELS", 64 * 64)
    alone = keep.directions_to_keep(pipeline, prompts, 8)
    assert (number, len(calls)) == (2, 2 + 4)
    assert together.keys() == alone.keys()
    for name, U in together.items():
        assert U.shape == alone[name].shape
        assert torch.linalg.svdvals(U.mT @ alone[name])[:4].min() > 1 - 1e-4, name


def test_directions_of_the_shipped_model(tmp_path, capsys):
    """The command, and that what the model draws its pictures of lies in what it has found."""
    prompts, output = tmp_path / "prompts.txt", tmp_path / "keep.safetensors"
    prompts.write_text("a red star on a blue background --d 1 --s 3\ntwo pink moons --d 2 --s 3\n", encoding="utf-8")
    command = ["--pretrained_model_name_or_path", str(measure.MODEL), "--prompts", str(prompts)]
    command += ["--output", str(output), "--resolution", "64", "--device", "cpu"]
    assert keep.main([*command, "--directions", "16"]) == 0
    assert "layers" in capsys.readouterr().out
    pipeline = keep.load(str(measure.MODEL), "cpu", torch.float32)
    net = deft.create_network(1.0, 2, 2, None, pipeline.text_encoder, pipeline.unet, conv_dim="2", keep=str(output))
    assert all(m.kept is not None and m.kept.shape[1] <= 16 for m in net.all_modules)
    shares, by_chance = {}, {}

    def look(module, layer, args):
        X = deft_keep.inputs_of(layer, args[0])
        shares[module.lora_name] = float((X @ module.kept).norm() / X.norm())
        by_chance[module.lora_name] = (module.kept.shape[1] / X.shape[1]) ** 0.5

    for module in net.all_modules:
        module.org_module.register_forward_pre_hook(lambda layer, args, module=module: look(module, layer, args))
    sampling.draw(pipeline, [Prompt("three blue rings", width=64, height=64, seed=3, steps=3)])
    assert len(shares) == len(net.all_modules)
    assert statistics.median(shares.values()) > 0.6 > 2 * statistics.median(by_chance.values())  # of another picture

    for wrong, line in ((["--prompts", "nowhere.txt"], "--prompts: no such file: nowhere.txt"),
                        (["--resolution", "65"], "--resolution 65: give a multiple of 8"),
                        (["--directions", "0"], "--directions 0: give at least 1")):  # fmt: skip
        assert keep.main([*command, *wrong]) == 2
        assert line in capsys.readouterr().err
    pickled = tmp_path / "pickled"
    shutil.copytree(measure.MODEL, pickled)
    weights = next((pickled / "unet").glob("*.safetensors"))
    weights.rename(weights.with_suffix(".bin"))
    assert keep.main([command[0], str(pickled), *command[2:]]) == 2
    assert "not a readable Diffusers folder" in capsys.readouterr().err
    other = tmp_path / "sdxl.safetensors"
    other.write_bytes(b"")
    for model, line in ((tmp_path, "no Diffusers model folder"), (other, "have to be Diffusers folders here")):
        assert keep.main([command[0], str(model), *command[2:]]) == 2
        assert line in capsys.readouterr().err
