"""Trainings on data sets of every kind: buckets, masks, regularisation, crops, caches, several data sets at once."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import train_network_deft
from library.data.batches import Batch
from library.data.index import Index
from library.models.family import Family
from library.options.rooms import ObjectiveOptions, PreservationOptions
from library.training.given import METERED
from library.training.losses import Losses
from library.training.objective import objective_of
from library.training.randoms import Randoms
from library.training.texts import Texts
from tests.conftest import arguments, in_two_processes, network_of, relative_error
from tests.test_trainer import TWO_PROCESSES

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


class Attached:
    """An adapter that is a network already."""

    def __init__(self, module):
        self.module, self.set_multiplier = module, module.set_multiplier


def losses_of(model, moved: bool, **preservation) -> Losses:
    network, accelerator = network_of(model, trained=False), Accelerator(cpu=True)
    if moved:
        with torch.no_grad():
            for parameter in network.parameters():
                parameter.add_(torch.randn(parameter.shape) * 0.1)
    objective = objective_of(ObjectiveOptions(), model)
    options = PreservationOptions(**preservation)
    return Losses(model, Attached(network), Texts(model, accelerator), objective, options, accelerator)


def batch_of(captions: list[str], **more) -> Batch:
    number = len(captions)
    latents = torch.randn(number, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return Batch(latents, captions, torch.tensor([[64, 64, 0, 0, 64, 64]] * number).float(), **more)


RANDOMS = Randoms(1, 0, range(2))


@torch.no_grad()
def test_a_mask_decides_what_counts(model):
    losses = losses_of(model, True)
    captions = ["a cat", "a dog"]
    plain = losses(batch_of(captions), RANDOMS)
    half = torch.ones(2, 1, 8, 8)
    half[:, :, :, :4] = 0
    left, right = (losses(batch_of(captions, masks=mask), RANDOMS) for mask in (half, 1 - half))
    assert torch.allclose(left + right, plain, rtol=1e-5)
    assert torch.allclose(losses(batch_of(captions, masks=torch.ones(2, 1, 8, 8)), RANDOMS), plain)
    assert losses(batch_of(captions, masks=torch.zeros(2, 1, 8, 8)), RANDOMS).eq(0).all()


@torch.no_grad()
def test_regularisation_pictures_have_their_weight(model):
    losses, captions = losses_of(model, True), ["a cat", "a dog"]
    weighted = losses(batch_of(captions, weights=torch.tensor([1.0, 0.25])), RANDOMS)
    assert torch.allclose(weighted, losses(batch_of(captions), RANDOMS) * torch.tensor([1.0, 0.25]))


@torch.no_grad()
def test_preserved_pictures_cost_what_the_adapter_changes(model):
    """custom_attributes.diff_output_preservation: nothing at the start, whatever the noise was."""
    captions = ["a cat", "a dog"]
    fresh = losses_of(model, False)
    found = fresh(batch_of(captions, preserved=(1,)), RANDOMS)
    assert found[1] < 1e-9
    assert torch.allclose(found[0], fresh(batch_of(captions), RANDOMS)[0])
    moved = losses_of(model, True)
    assert moved(batch_of(captions, preserved=(1,)), RANDOMS)[1] > 1e-6


def test_the_class_is_preserved(model):
    """Nothing at the start; later what the adapter changes of the class's answers, times the multiplier."""
    captions = ["sks on grass", "a dog"]
    options = {"trigger_word": "sks", "diff_output_preservation_class": "a cat"}
    with torch.no_grad():
        fresh, plain = losses_of(model, False, **options), losses_of(model, False)
        assert torch.allclose(fresh(batch_of(captions), RANDOMS), plain(batch_of(captions), RANDOMS), atol=1e-7)
    torch.manual_seed(3)
    once = losses_of(model, True, **options)
    added = []
    for multiplier in (0.0, 1.0, 3.0):
        preservation = PreservationOptions(**options, diff_output_preservation_multiplier=multiplier)
        changed = Losses(once.model, once.adapter, once.texts, once.objective, preservation, once.accelerator)
        added.append(changed(batch_of(captions), RANDOMS))
    assert added[1][0] > added[0][0] + 1e-6
    assert torch.allclose(added[2] - added[0], 3 * (added[1] - added[0]), atol=1e-5)
    assert added[1][1] == added[0][1]
    (added[1] - added[0]).sum().backward()
    assert any(p.grad is not None and p.grad.abs().max() > 0 for p in once.adapter.module.parameters())


@torch.no_grad()
def test_a_data_sets_multiplier_is_the_adapters(model):
    losses, captions = losses_of(model, True), ["a cat", "a dog"]
    off, half, on = (losses(batch_of(captions, multiplier=m), RANDOMS) for m in (0.0, 0.5, 1.0))
    assert torch.allclose(losses(batch_of(captions), RANDOMS, multiplier=0.5), half)
    assert not torch.allclose(off, on)
    assert not torch.allclose(off, half)


def photo(path: Path, size: tuple[int, int], mode: str = "RGB", seed: int = 0) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    values = np.random.default_rng(seed).integers(0, 256, (size[1] // 8, size[0] // 8, len(mode)), np.uint8)
    Image.fromarray(values, mode).resize(size).save(path)
    return path


def data_sets(folder: Path) -> Path:
    """Two data sets of other sizes and batches, with everything that a subset can have."""
    for i, size in enumerate([(96, 64), (64, 96), (80, 80), (130, 60), (64, 64)]):
        photo(folder / "cat" / f"{i}.png", size, seed=i)
        (folder / "cat" / f"{i}.txt").write_text(f"sks cat, tag {i}, sitting, indoors")
        photo(folder / "masks" / f"{i}.png", size, seed=9)
        photo(folder / "reg" / f"{i}.webp", size, seed=20 + i)
        photo(folder / "clear" / f"{i}.png", size, "RGBA", seed=30 + i)
    config = folder / "sets.toml"
    config.write_text(
        f"""
[general]
caption_extension = ".txt"
shuffle_caption = true
keep_tokens = 1
enable_bucket = true
min_bucket_reso = 32
max_bucket_reso = 128
bucket_reso_steps = 32

[[datasets]]
resolution = 64
batch_size = 2
  [[datasets.subsets]]
  image_dir = '{folder / "cat"}'
  num_repeats = 2
  conditioning_data_dir = '{folder / "masks"}'
  caption_dropout_rate = 0.3
  [[datasets.subsets]]
  image_dir = '{folder / "reg"}'
  is_reg = true
  class_tokens = "cat"
  custom_attributes = {{diff_output_preservation = true}}

[[datasets]]
resolution = [96, 64]
batch_size = 2
network_multiplier = 0.5
  [[datasets.subsets]]  # which shares batches with pictures that are cropped anew each time
  image_dir = '{folder / "clear"}'
  class_tokens = "a ghost"
  alpha_mask = true
  flip_aug = true
  [[datasets.subsets]]
  image_dir = '{folder / "cat"}'
  random_crop = true
  color_aug = true
"""
    )
    return config


def test_several_data_sets_train_together(model_folder, photos, tmp_path):
    config = data_sets(tmp_path / "data")
    given = arguments(model_folder, photos, tmp_path, train_data_dir=None, dataset_config=config, resolution=None,
                      masked_loss=True, prior_loss_weight=0.5, max_train_steps=None, max_train_epochs=2,
                      save_state=True, save_every_n_steps=9)  # fmt: skip
    assert train_network_deft.main(given) == 0
    with safe_open(tmp_path / "out" / "cat.safetensors", "pt") as file:
        fields = file.metadata()
    first, second = json.loads(fields["ss_datasets"])
    assert (first["num_train_images"], first["num_reg_images"]) == (10, 10)
    assert (second["num_train_images"], second["num_reg_images"]) == (10, 0)
    assert first["batch_size_per_device"] == 2
    assert sum(one["count"] for one in first["bucket_info"]["buckets"].values()) == 20
    assert fields["ss_num_train_images"] == "20"
    assert json.loads(fields["ss_dataset_dirs"]) == {
        "cat": {"n_repeats": 2, "img_count": 5},
        "clear": {"n_repeats": 1, "img_count": 5},
        "cat (2)": {"n_repeats": 1, "img_count": 5},
    }
    assert json.loads(fields["ss_tag_frequency"])["cat"]["sks cat"] == 5
    undisturbed = load_file(tmp_path / "out" / "cat.safetensors")
    state = tmp_path / "out" / "cat-step00000009-state"
    assert train_network_deft.main([*given, "--resume", str(state)]) == 0
    resumed = load_file(tmp_path / "out" / "cat.safetensors")
    assert max(relative_error(undisturbed[key], resumed[key]) for key in resumed if "lora_up" in key) < 1e-3


def test_two_processes_train_several_data_sets(model_folder, photos, tmp_path):
    """An odd number of batches; both processes end with the same network."""
    config = data_sets(tmp_path / "data")
    given = arguments(model_folder, photos, tmp_path, train_data_dir=None, dataset_config=config, resolution=None,
                      masked_loss=True, max_train_steps=None, max_train_epochs=1)  # fmt: skip
    in_two_processes(tmp_path, TWO_PROCESSES, *given)
    one, two = sorted(path.read_text() for path in tmp_path.glob("process*.txt"))
    assert one == two


@pytest.fixture
def counted(monkeypatch):
    """How many pictures and texts are encoded."""
    from library.models.sd import StableDiffusion

    numbers = {"pictures": 0, "texts": 0}
    encode_image, encode_text = Family.encode_image, StableDiffusion.encode_text

    def image(self, pixels, generators):
        numbers["pictures"] += len(pixels)
        return encode_image(self, pixels, generators)

    def text(self, captions):
        numbers["texts"] += len(captions)
        return encode_text(self, captions)

    monkeypatch.setattr(Family, "encode_image", image)
    monkeypatch.setattr(StableDiffusion, "encode_text", text)
    return numbers


def test_caches_on_the_disk_are_used_by_the_next_training_and_change_nothing(run, tmp_path, counted):
    common = {"network_train_unet_only": True, "cache_text_encoder_outputs": True, "cache_dir": tmp_path / "cache",
              "learning_rate": 1e-3, "flip_aug": True, "max_train_steps": 6, "vae_batch_size": 2}  # fmt: skip
    on_disk = common | {"cache_latents_to_disk": True, "cache_text_encoder_outputs_to_disk": True}
    files = {}
    for name, changes, pictures, texts in (
        ("memory", common, 10, 5 + METERED),
        ("first", on_disk, 10, 5 + METERED),
        ("second", on_disk, 0, 0),
        ("unchecked", on_disk | {"skip_cache_check": True}, 0, 0),
        ("larger", on_disk | {"resolution": "96"}, 10, 0),
        ("other words", on_disk | {"caption_prefix": "my"}, 0, 5),
        ("again", on_disk, 0, 0),
    ):
        counted.update(pictures=0, texts=0)
        assert run(output_name=name, **changes) == 0
        assert counted == {"pictures": pictures, "texts": texts}, name
        files[name] = load_file(tmp_path / "out" / f"{name}.safetensors")
    for name in ("first", "second", "unchecked", "again"):
        errors = [relative_error(files["memory"][key], files[name][key]) for key in files[name] if "lora_up" in key]
        assert max(errors) < 1e-3, name


def test_a_changed_picture_is_encoded_anew_and_a_damaged_entry_too(run, photos, tmp_path, counted):
    common = {"cache_dir": tmp_path / "cache", "cache_latents_to_disk": True, "max_train_steps": 1}
    assert run(**common) == 0
    path = next(photos.glob("*_1.jpg"))
    Image.open(path).rotate(90).save(path)
    entry = next((tmp_path / "cache").glob("??/*.safetensors"))
    entry.write_bytes(entry.read_bytes()[:-1] + b"\x7f")
    counted.update(pictures=0)
    assert run(**common) == 0
    assert counted["pictures"] in (1, 2)  # the damaged one may be that of the changed picture
    counted.update(pictures=0)
    assert run(**common) == 0
    assert counted["pictures"] == 0


def test_a_picture_in_two_subsets_has_two_captions_in_the_cache(model_folder, photos, tmp_path):
    photo(tmp_path / "data" / "cat" / "1.png", (64, 64))
    subset = f"[[datasets]]\nresolution = 64\n  [[datasets.subsets]]\n  image_dir = '{tmp_path / 'data' / 'cat'}'\n"
    config = tmp_path / "sets.toml"
    config.write_text("".join(f"{subset}  class_tokens = '{words}'\n" for words in ("a cat", "a fine cat")))
    given = arguments(model_folder, photos, tmp_path, train_data_dir=None, dataset_config=config, resolution=None,
                      cache_text_encoder_outputs=True, network_train_unet_only=True)  # fmt: skip
    assert train_network_deft.main(given) == 0


def test_a_mask_that_cannot_be_opened_costs_its_picture_alone(model_folder, photos, tmp_path, caplog, monkeypatch):
    for i in range(2):
        photo(tmp_path / "data" / "1_cat" / f"{i}.png", (64, 64), seed=i)
        photo(tmp_path / "masks" / f"{i}.png", (64, 64), seed=9)
    hashes = Index.hashes
    monkeypatch.setattr(
        Index, "hashes", lambda self, files: {f: h for f, h in hashes(self, files).items() if f.parent.name != "masks"
                                              or f.stem != "1"}
    )  # fmt: skip
    given = arguments(model_folder, photos, tmp_path, train_data_dir=tmp_path / "data", masked_loss=True,
                      conditioning_data_dir=tmp_path / "masks")  # fmt: skip
    assert train_network_deft.main(given) == 0
    (line,) = (line for line in caplog.messages if "left out" in line)
    assert "1.png: left out" in line
