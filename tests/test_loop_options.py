"""What happens beside the steps: validation, logs, cached texts, counts of saves, the file's metadata."""

from __future__ import annotations

from pathlib import Path

import pytest
import toml
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train_network_deft
from library.data import plan
from networks.deft_config import DeftError
from tests import small_data
from tests.conftest import arguments, relative_error
from tests.small_models import build

pytestmark = pytest.mark.usefixtures("fresh_accelerator")


def logged(folder: Path) -> EventAccumulator:
    (file,) = folder.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(file.parent), size_guidance={"images": 0})
    found.Reload()
    return found


def test_validation_is_split_off_measured_alike_and_logged(run, tmp_path, caplog):
    """At a rate of nearly nothing the loss on the same pictures with the same noise stays the same."""
    changes = {"validation_split": 0.4, "validation_seed": 3, "validate_every_n_steps": 2, "max_train_steps": 6,
               "learning_rate": 1e-12, "logging_dir": tmp_path / "logs", "log_prefix": "my"}  # fmt: skip
    with caplog.at_level("INFO"):
        assert run(**changes) == 0
    assert "5 images, 5 with repeats, in 1 size; latents cached in memory" in caplog.messages
    found = logged(tmp_path / "logs")
    assert next((tmp_path / "logs").iterdir()).name.startswith("my20")
    by_step, by_epoch = (found.Scalars(f"loss/validation/{when}_average") for when in ("step", "epoch"))
    assert [event.step for event in by_step] == [2, 4, 6]
    assert [event.step for event in by_epoch] == [3, 6]
    assert {round(event.value, 5) for event in (*by_step, *by_epoch)} == {round(by_step[0].value, 5)}
    assert len(found.Scalars("loss/current")) == 6
    assert {tag for tag in found.Tags()["scalars"] if tag.startswith("lr/")} == {"lr/textencoder", "lr/unet"}


def test_pictures_of_the_validation_are_sd_scripts_choice(tmp_path):
    """random.seed(3), random.shuffle of five names, as train_util.split_train_val (48d368fa) has it."""
    import random

    folder = tmp_path / "4_f"
    folder.mkdir()
    for i in range(5):
        Image.new("RGB", (64, 64)).save(folder / f"{i}.png")
    random.seed(3)
    expected = list(range(5))
    random.shuffle(expected)
    trained, kept = plan.divided(small_data.planned(tmp_path, validation_split=0.4), 3)
    assert [int(picture.path.stem) for picture in plan.pictures(trained)] == expected[:3]
    assert [(int(p.path.stem), p.repeats) for p in plan.pictures(kept)] == [(i, 1) for i in expected[3:]]
    assert plan.divided(small_data.planned(tmp_path), 3)[1] == ()


def test_a_schedule_free_file_holds_the_averages(run, tmp_path):
    """The file of step 3 in the middle of a training is that of a training of three steps."""
    pytest.importorskip("schedulefree")
    common = {"optimizer_type": "AdamWScheduleFree", "learning_rate": 1e-2}
    assert run(max_train_steps=6, save_every_n_steps=3, **common) == 0
    assert run(max_train_steps=3, output_name="short", **common) == 0
    one, two = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("cat-step00000003", "short"))
    assert max(relative_error(one[key], two[key]) for key in one if "lora_up" in key) < 1e-3


@pytest.mark.parametrize("family", ["sd", "sdxl"])
def test_cached_texts_give_the_same_training_and_samples(model_folder, photos, tmp_path, family):
    model = model_folder if family == "sd" else build("sdxl", tmp_path / "model")
    (tmp_path / "p.txt").write_text("a cat --n blurry --w 64 --h 64 --s 2 --d 1\n", encoding="utf-8")
    common = {"network_train_unet_only": True, "sample_prompts": tmp_path / "p.txt", "sample_every_n_steps": 2,
              "max_train_steps": 2, "learning_rate": 1e-3}  # fmt: skip
    for name, cached in (("each", False), ("once", True)):
        changes = {"output_name": name, "cache_text_encoder_outputs": cached or None, "text_encoder_batch_size": 2}
        assert train_network_deft.main(arguments(model, photos, tmp_path, **common, **changes)) == 0
    each, once = (load_file(tmp_path / "out" / f"{name}.safetensors") for name in ("each", "once"))
    assert max(relative_error(each[key], once[key]) for key in each if "lora_up" in key) < 1e-3
    drawn = sorted((tmp_path / "out" / "sample").iterdir())
    from PIL import Image

    pixels = [torch.tensor(list(Image.open(path).tobytes()), dtype=torch.float) for path in drawn]
    assert len(pixels) == 2
    assert (pixels[0] - pixels[1]).abs().max() < 2


def test_samples_are_shown_to_the_trackers(run, tmp_path):
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 32 --s 1 --d 1 --ss euler_a\n", encoding="utf-8")
    assert run(sample_prompts=tmp_path / "p.txt", sample_at_first=True, logging_dir=tmp_path / "logs") == 0
    (image,) = logged(tmp_path / "logs").Images("sample_0")
    assert (image.width, image.height) == (64, 32)


def test_save_n_epoch_ratio(run, tmp_path):
    assert run(max_train_epochs=6, max_train_steps=None, train_batch_size=5, save_n_epoch_ratio=2) == 0
    assert sorted(path.stem for path in (tmp_path / "out").glob("*.safetensors")) == ["cat", "cat-000003"]


def test_the_authors_fields_are_in_the_file(run, tmp_path, photos):
    thumbnail = sorted(photos.glob("*.jpg"))[0]
    assert run(max_train_steps=1, metadata_author="me", metadata_thumbnail=thumbnail, metadata_title="A cat") == 0
    with safe_open(str(tmp_path / "out" / "cat.safetensors"), "pt") as file:
        metadata = file.metadata()
    assert (metadata["modelspec.author"], metadata["modelspec.title"]) == ("me", "A cat")
    assert metadata["modelspec.thumbnail"].startswith("data:image/jpeg;base64,/9j/")
    assert "modelspec.license" not in metadata


def test_output_config_writes_what_can_be_read_again(model_folder, photos, tmp_path):
    from library.options.parse import parse

    given = arguments(model_folder, photos, tmp_path, network_args=["conv_dim=4"], noise_offset=0.1, full_bf16=True,
                      mixed_precision="bf16", optimizer_args=["betas=0.9,0.99"])  # fmt: skip
    file = tmp_path / "new" / "mine.toml"
    with pytest.raises(SystemExit):
        parse([*given, "--output_config", "--config_file", str(file), "--wandb_api_key", "secret"])
    assert [path.name for path in file.parent.iterdir()] == ["mine.toml"]
    assert "secret" not in file.read_text()
    assert toml.load(file)["noise_offset"] == 0.1
    assert parse(["--config_file", str(file)]) == parse(given)
    with pytest.raises(DeftError, match="is there already"):
        parse([*given, "--output_config", "--config_file", str(file)])
    with pytest.raises(DeftError, match="could not be saved"):
        parse([*given, "--output_config", "--config_file", str(file / "other.toml")])
