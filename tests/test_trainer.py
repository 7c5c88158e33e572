"""The stand-alone trainer: real runs on the small model, and what it says of bad input."""

from __future__ import annotations

import json
import re
import shutil
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import toml
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import train_network_deft
from library import sampling
from library.data.examples import View
from library.data.pixels import read_picture
from library.data.plan import pictures
from library.data.resizing import in_tensor, resize
from library.models import reading
from library.options.parse import parse
from library.prompts import Prompt, read_prompts
from library.training import given, start
from library.training.adapter import merge_base
from library.training.samples import drawing
from networks import deft, deft_io, deft_keep
from networks.deft_config import DeftError
from tests import small_data
from tests.conftest import TEXT, UNET, arguments, in_two_processes, loaded, network_of, relative_error
from tests.test_files import deltas_of_lora

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def test_trains_from_a_config_file_and_its_lora_is_the_network(model_folder, photos, tmp_path, monkeypatch):
    """Loss falls, samples are drawn, saves and logs appear, and a fresh diffusers pipeline with the file draws what
    the trainer's own network drew at the same step."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("# one\nsks cat --w 64 --h 64 --d 5 --l 2 --s 4\n")
    config = tmp_path / "config.toml"
    config.write_text(
        f"[model]\npretrained_model_name_or_path = {json.dumps(str(model_folder))}\n"
        f"[data]\ntrain_data_dir = {json.dumps(str(photos.parent))}\nresolution = 64\ntrain_batch_size = 5\n"
        "[network]\nnetwork_dim = 8\nnetwork_alpha = 8\nnetwork_args = ['conv_dim=4', 'conv_alpha=4']\n"
        "[training]\nmax_train_epochs = 40\nlearning_rate = 2e-3\nseed = 7\n"
        "lr_scheduler = 'cosine'\nlr_warmup_steps = 3\n"
        f"[saving]\noutput_dir = {json.dumps(str(tmp_path / 'out'))}\noutput_name = 'cat'\nsave_precision = 'float'\n"
        f"save_every_n_steps = 15\nsave_every_n_epochs = 20\nlogging_dir = {json.dumps(str(tmp_path / 'logs'))}\n"
        f"sample_prompts = {json.dumps(str(prompts))}\nsample_every_n_steps = 40\nsample_at_first = true\n"
    )
    losses, rates = [], []
    monkeypatch.setattr(
        "library.training.loop.TrainingLoop._after_step",
        lambda self, original=train_network_deft.TrainingLoop._after_step: (
            rates.append(self.schedule.get_last_lr()[0]),
            original(self),
            losses.append(self.recent_losses[-1]),
        ),
    )
    assert train_network_deft.main(["--config_file", str(config)]) == 0
    assert len(losses) == 40
    assert rates[:3] == pytest.approx([2e-3 / 3, 4e-3 / 3, 2e-3])
    assert rates[-1] == pytest.approx(0, abs=1e-9)
    assert sum(losses[-10:]) < 0.9 * sum(losses[:10])
    saved = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert saved == [
        "cat-000020.safetensors",
        "cat-step00000015.safetensors",
        "cat-step00000030.safetensors",
        "cat.safetensors",
    ]
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))
    drawn = sorted((tmp_path / "out" / "sample").iterdir())
    assert [path.name.split("_")[1] for path in drawn] == ["000000", "000040"]

    prompt = read_prompts(str(prompts), (64, 64))
    fresh = loaded(model_folder)
    before = sampling.draw(fresh.pipeline, prompt)[0]
    fresh.pipeline.load_lora_weights(str(tmp_path / "out"), weight_name="cat.safetensors")
    after = sampling.draw(fresh.pipeline, prompt)[0]
    images = [torch.tensor(list(i.tobytes()), dtype=torch.float) for i in (*map(Image.open, drawn), before, after)]
    first, last, before, after = images
    assert (last - after).abs().max() < 2
    assert (first - before).abs().max() < 2
    assert (after - before).abs().max() > 10

    with safe_open(str(tmp_path / "out" / "cat.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert (metadata["ss_network_dim"], metadata["ss_steps"], metadata["ss_seed"]) == ("8", "40", "7")
    assert json.loads(metadata["ss_dataset_dirs"]) == {"1_sks cat": {"n_repeats": 1, "img_count": 5}}
    assert json.loads(metadata["ss_tag_frequency"])["1_sks cat"]["sks cat"] == 5


def test_same_seed_same_file(run, tmp_path):
    for name in ("a", "b"):
        assert run(output_name=name, max_train_steps=2) == 0
    a, b = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("a", "b"))
    assert max(relative_error(a[key], b[key]) for key in a if "lora_up" in key) < 1e-4


def test_accumulated_batches_equal_one_large_batch(model_folder, photos, tmp_path, monkeypatch, in_order):
    """With the noise held fixed, two micro-batches of one image give the gradient of one batch of both."""
    for path in sorted(photos.glob("*_[345].*")):
        path.unlink()
    monkeypatch.setattr("torch.randn_like", lambda t, **_: torch.ones_like(t) * 0.5)
    monkeypatch.setattr("torch.randint", lambda low, high, size, **_: torch.full(size, 500))
    found = []
    for name, batch, accumulation in (("one", 2, 1), ("two", 1, 2)):
        changes = {"train_batch_size": batch, "gradient_accumulation_steps": accumulation, "max_train_steps": 1}
        assert train_network_deft.main(arguments(model_folder, photos, tmp_path, output_name=name, **changes)) == 0
        found.append(load_file(tmp_path / "out" / f"{name}.safetensors"))
    ups = [key for key in found[0] if "unet" in key and "lora_up" in key]
    wrong = 0
    for key in ups:
        deltas = [t[key].flatten(1) @ t[key.replace("lora_up", "lora_down")].flatten(1) for t in found]
        wrong += relative_error(*deltas) > 0.2  # Adam's first step is a sign: rounding flips those of tiny gradients
    assert wrong < len(ups) / 10


@pytest.mark.parametrize(
    "changes",
    [
        {"mixed_precision": "bf16"},
        {"gradient_checkpointing": True},
        {"network_train_unet_only": True},
        {"network_train_text_encoder_only": True},
        {"scale_weight_norms": 0.01},
        {"network_args": ["para=true"]},
        {"no_metadata": True, "save_precision": "bf16"},
        {"unet_lr": 1e-3, "text_encoder_lr": 0, "max_grad_norm": 0, "network_dropout": 0.125},
    ],
    ids=str,
)
def test_options_train_and_save_finite_adapters(run, tmp_path, changes):
    assert run(**changes) == 0
    tensors = load_file(tmp_path / "out" / "cat.safetensors")
    names = {key.split(".")[0] for key in tensors}
    halves = {"network_train_unet_only": UNET, "network_train_text_encoder_only": TEXT}
    assert len(names) == next((count for option, count in halves.items() if option in changes), UNET + TEXT)
    assert all(t.isfinite().all() for t in tensors.values())
    norms = [float(delta.norm()) for delta in deltas_of_lora({k: t.float() for k, t in tensors.items()}).values()]
    assert max(norms) > 0
    if "scale_weight_norms" in changes:
        assert max(norms) < 0.0101
    with safe_open(str(tmp_path / "out" / "cat.safetensors"), framework="pt") as file:
        metadata = file.metadata()
    if changes.get("no_metadata"):
        assert not [k for k in metadata if k.startswith("ss_") and k not in _MINIMUM]
    assert json.loads(metadata["deft_options"])["neuron_dropout"] == changes.get("network_dropout", 0)
    if "text_encoder_lr" in changes:  # the frozen half adds nothing
        frozen = deltas_of_lora({k: t.float() for k, t in tensors.items() if k.startswith("lora_te")})
        assert max(float(delta.norm()) for delta in frozen.values()) < 1e-5


_MINIMUM = {
    *("ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha", "ss_network_args"),
    *("ss_steps", "ss_epoch", "ss_training_finished_at"),
}


def test_goes_on_from_weights_and_merges_base_weights(run, tmp_path):
    assert run(output_name="first") == 0
    first = str(tmp_path / "out" / "first.safetensors")
    assert run(output_name="second", network_weights=first, dim_from_weights=True, network_dim=99) == 0
    assert run(output_name="third", base_weights=[first], base_weights_multiplier=[0.5]) == 0
    hashes = []
    for name in ("first", "second", "third"):
        with safe_open(str(tmp_path / "out" / f"{name}.safetensors"), framework="pt") as file:
            hashes.append(file.metadata()["deft_base_hash"])
            assert file.get_slice("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight").get_shape()[0] == 4
    assert hashes[0] == hashes[1] != hashes[2]


def test_prompts_to_keep_become_directions_once_a_base_model(run, model_folder, tmp_path, caplog, capsys):
    prompts = tmp_path / "keep.txt"
    prompts.write_text("a dog --s 2\na red car --s 2\n", encoding="utf-8")
    kept = {"network_args": [f"keep={prompts}"], "learning_rate": 1e-2}
    with caplog.at_level("INFO"):
        assert run(output_name="first", **kept) == run(output_name="second", seed=3, **kept) == 0
    (file,) = (tmp_path / "out").glob("keep-*.safetensors")
    told = [line for line in caplog.messages if line.startswith(f"keep={prompts}: ")]
    assert ["drawing 2 pictures" in line for line in told] == [True, False]
    directions = deft_keep.read_kept(file)
    for name in ("first", "second"):
        layers = deft_io.read_adapter(tmp_path / "out" / f"{name}.safetensors").layers
        assert any(bool(layer.down.any()) for layer in layers.values())
        for layer, found in layers.items():
            down = found.down.float()
            assert (down @ directions[layer]).norm() <= 1e-2 * down.norm()
    other = tmp_path / "other"
    shutil.copytree(model_folder, other)
    unet = next((other / "unet").glob("*.safetensors"))
    save_file({name: 1.01 * tensor for name, tensor in load_file(unet).items()}, unet)
    assert run(output_name="third", pretrained_model_name_or_path=other, **kept) == 0
    assert len(list((tmp_path / "out").glob("keep-*.safetensors"))) == 2
    prompts.write_text("a dog --s 1\n", encoding="utf-8")
    assert run(output_name="fourth", **kept) == 0
    assert len(list((tmp_path / "out").glob("keep-*.safetensors"))) == 3
    for wrong, line in (("nowhere.safetensors", "keep=nowhere.safetensors: no such file"),
                        ("nowhere.txt", "--network_args keep: no such file: nowhere.txt")):  # fmt: skip
        assert run(network_args=[f"keep={wrong}"], pretrained_model_name_or_path="nowhere") == 2
        assert line in capsys.readouterr().err


def attached(network) -> Namespace:
    """A network as the samples see an adapter."""
    return Namespace(module=network)


def parsed(model_folder, photos, tmp_path, **changes):
    return parse(arguments(model_folder, photos, tmp_path, **changes))


def test_base_weights_are_merged_at_their_strength(run, model_folder, photos, tmp_path):
    assert run(output_name="first", learning_rate=1e-2) == 0
    first = str(tmp_path / "out" / "first.safetensors")
    model, base = loaded(model_folder), loaded(model_folder)
    given_run = parsed(model_folder, photos, tmp_path, base_weights=[first], base_weights_multiplier=[0.5])
    merge_base(given.read(given_run), model)
    found = deltas_of_lora(load_file(first))
    name = "mid_block.attentions.0.transformer_blocks.0.attn2.to_v"
    change = model.denoiser.get_submodule(name).weight - base.denoiser.get_submodule(name).weight
    assert relative_error(change, 0.5 * found["lora_unet_" + name.replace(".", "_")]) < 1e-3


def test_model_is_placed_in_the_trainings_precision_and_memory_options(model_folder):
    model = loaded(model_folder, gradient_checkpointing=True)
    model.place(torch.device("cpu"), torch.bfloat16, encoders=True)
    for part in (model.denoiser, *model.text_encoders):
        assert part.dtype == torch.bfloat16
        assert part.is_gradient_checkpointing


def test_gradients_are_clipped(run, tmp_path):
    """Adam divides by the gradient's size unless that is far below its epsilon of 1e-8."""
    norms = []
    for name, limit in (("free", 0), ("clipped", 1e-13)):
        assert run(output_name=name, max_grad_norm=limit) == 0
        found = deltas_of_lora(load_file(tmp_path / "out" / f"{name}.safetensors"))
        norms.append(max(float(delta.norm()) for delta in found.values()))
    assert norms[1] < 1e-2 * norms[0]


def test_latents_and_repeats(model_folder, photos):
    model = loaded(model_folder)
    photos.rename(photos.parent / "3_sks cat")
    plan, latents = small_data.read(photos.parent, model)
    assert [dataset.appearances for dataset in plan] == [15]
    first = next(pictures(plan))
    pixels = in_tensor(resize(np.asarray(read_picture(first.path).image), (64, 64)))
    distribution = model.vae.encode(pixels[None]).latent_dist
    spread = distribution.std * model.vae.config.scaling_factor
    error = (latents.read(View(first))[0] - distribution.mean[0] * model.vae.config.scaling_factor) / spread[0]
    assert 0.5 < error.std() < 1.5  # a draw from the encoder's distribution, scaled


def test_samples_are_drawn_without_dropout(model):
    prompt = [Prompt("a", width=64, height=64, guidance=1, steps=2, seed=1)]
    drawn = []
    for dropout in ("0", "0.9"):
        torch.manual_seed(0)
        network = network_of(model, module_dropout=dropout).train()
        with drawing(model, attached(network), Accelerator(cpu=True)):
            drawn.append(sampling.draw(model.pipeline, prompt)[0].tobytes())
        network.remove()
    assert drawn[0] == drawn[1]


def test_a_grad_scalers_own_skips_do_not_count(run, monkeypatch):
    """On a CPU, with gradients made to overflow as float16's would until the scale has come down."""
    accelerator_of, update, moved = start.accelerator_of, train_network_deft.TrainingLoop._update, []

    def with_scaler(*args):
        accelerator, seed = accelerator_of(*args)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**36)
        return accelerator, seed

    def overflowing(self):
        network = self.adapter.module
        for p in network.parameters():
            if p.grad is not None:
                p.grad[p.grad.abs() > 65504] = float("inf")  # as float16 would
        before = network.unet_modules[0].R.detach().clone()
        norm = update(self)
        moved.append(not torch.equal(before, network.unet_modules[0].R))
        return norm

    monkeypatch.setattr(start, "accelerator_of", with_scaler)
    monkeypatch.setattr(train_network_deft.TrainingLoop, "_update", overflowing)
    assert run(max_train_steps=26, max_nan_steps=2) == 0
    assert moved[0] is False
    assert moved[-1] is True
    assert moved.index(True) > 2


TWO_PROCESSES = """
import pathlib
import train_network_deft as trainer
run = trainer.TrainingLoop.run
def and_tell(self):
    run(self)
    total = sum(p.detach().double().sum().item() for p in self.adapter.module.parameters())
    told = pathlib.Path(__file__).with_name(f"process{self.accelerator.process_index}.txt")
    told.write_text(f"{self.accelerator.num_processes} {self.position.step} {self.average_loss!r} {total!r}")
trainer.TrainingLoop.run = and_tell
sys.exit(trainer.main(sys.argv[1:]))
"""


def test_two_processes_end_with_the_same_network(model_folder, photos, tmp_path):
    """Also where dropout skips a layer in one process and not in the other, and where one makes a file for both."""
    prompts = tmp_path / "keep.txt"
    prompts.write_text("a dog --s 2\n", encoding="utf-8")
    options = ["module_dropout=0.4", f"keep={prompts}"]
    in_two_processes(tmp_path, TWO_PROCESSES, *arguments(model_folder, photos, tmp_path, network_args=options))
    told = [path.read_text().split() for path in sorted(tmp_path.glob("process*.txt"))]  # one pipe would mix them up
    assert len(told) == 2
    assert told[0] == told[1]
    assert told[0][:2] == ["2", "3"]
    assert len(list((tmp_path / "out").glob("keep-*"))) == 1


def test_stops_on_non_finite_losses_and_keeps_the_last_good_save(run, tmp_path, capsys):
    """A rate so high that the first step already leaves numbers whose products overflow."""
    assert run(learning_rate=1e25, max_grad_norm=0, max_train_steps=50, save_every_n_steps=1, max_nan_steps=4) == 1
    message = capsys.readouterr().err.strip().splitlines()[-1]
    assert "non-finite loss nan 4 times in a row" in message
    assert "stopped at step 5" in message
    assert "Last good save: " in message
    good = Path(message.split("Last good save: ")[1])
    assert all(t.isfinite().all() for t in load_file(good).values())
    assert not (tmp_path / "out" / "cat.safetensors").exists()


def test_a_single_file_names_the_three_places_of_a_tokenizer(tmp_path, monkeypatch):
    save_file({"x": torch.ones(1)}, tmp_path / "model.safetensors")
    monkeypatch.setattr(reading, "CLIP_L", str(tmp_path / "not-in-the-cache"))
    with pytest.raises(DeftError, match=r"--tokenizer FOLDER.*--tokenizer_cache_dir FOLDER.*local hub cache"):
        loaded(tmp_path / "model.safetensors")


def test_tokenizer_comes_from_sd_scripts_cache_folder(model_folder, tmp_path):
    shutil.copytree(model_folder / "tokenizer", tmp_path / "openai_clip-vit-large-patch14")
    assert reading.find_tokenizer(None, str(tmp_path)).model_max_length == 77


def test_sampling_leaves_the_trainings_random_numbers_alone(model):
    network = deft.create_network(1.0, 4, 4, None, model.text_encoders, model.denoiser)
    network.apply_to(model.text_encoders, model.denoiser)
    network.train()
    torch.manual_seed(3)
    wanted = torch.rand(3)
    torch.manual_seed(3)
    prompt = Prompt("a", width=64, height=64, guidance=1, steps=2)
    with drawing(model, attached(network), Accelerator(cpu=True)):
        sampling.draw(model.pipeline, [prompt])
    assert torch.equal(torch.rand(3), wanted)
    assert network.training


def test_every_option_has_the_type_of_its_default():
    found = parse(["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o"])
    assert (found.network.network_dim, found.network.network_alpha) == (None, 1.0)
    assert found.network.network_args == {}
    assert found.data.datasets[0].buckets.resolution == (512, 512)


def test_command_line_wins_over_the_config_file(tmp_path):
    (tmp_path / "c.toml").write_text(
        "pretrained_model_name_or_path='m'\ntrain_data_dir='d'\noutput_dir='o'\n"
        "seed=1\nnetwork_args=['a=1']\nxformers=false"
    )
    found = parse(["--config_file", str(tmp_path / "c.toml"), "--seed", "2"])
    assert (found.process.seed, found.network.network_args, found.model.xformers) == (2, {"a": "1"}, False)


@pytest.mark.parametrize("config", sorted(path.name for path in (ROOT / "configs").glob("*.toml")))
def test_the_shipped_configurations_are_read(config):
    found = parse(["--config_file", str(ROOT / "configs" / config)])
    assert found.network.network_args.get("keep", "configs/keep.txt") == "configs/keep.txt"
    assert (ROOT / "configs" / "keep.txt").is_file()


def test_each_card_in_flux_toml_is_one_that_was_tried():
    """A whole training in a card's memory, by benchmarks/small_cards.py, had the options of its line."""
    text = (ROOT / "configs" / "flux.toml").read_text(encoding="utf-8")
    lines = re.findall(r"^#   (\d+) GB: ([^#\n]+)", text, re.M)
    lines += [("24", re.search(r"^blocks_to_swap.*$", text, re.M)[0])]
    assert len(lines) == 6
    measured = json.loads((ROOT / "benchmarks" / "results" / "small_cards.json").read_text(encoding="utf-8"))["cases"]
    trained = [(case["card_gib"], case["options"]) for case in measured.values() if "s_per_step" in case]
    for card, line in lines:
        given = toml.loads(line.replace(", ", "\n"))
        words = [f"--{name}" if value is True else f"--{name} {value}" for name, value in given.items()]
        assert [
            options for gib, options in trained
            if gib == int(card) and options.endswith(f"--gradient_checkpointing {' '.join(words)}")
        ], line  # fmt: skip
