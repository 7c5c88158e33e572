"""Files of the trainer as they are shared: their picture, trigger and what stands beside them."""

from __future__ import annotations

import base64
import io
import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops, ImageStat
from safetensors.torch import save_file

import train_network_deft
from library.options.parse import parse
from library.prompts import Prompt
from library.training import given
from library.training.record import Drawn, Record
from library.training.sharing import Sharing, thumbnail_fields
from networks.deft_config import DeftError
from networks.deft_pictures import COVER, HEADER_LIMIT, THUMBNAIL
from tests import real_uis
from tests.conftest import PHOTOS, arguments, reset_accelerator
from tests.test_sharing import metadata_of

ONE_STEP = {"sample_every_n_steps": 1, "max_train_steps": 2, "network_train_unet_only": True}


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "p.txt"
    path.write_text("a dog --w 64 --h 64 --s 1 --d 1\nsks cat, asleep --w 96 --h 64 --s 1 --d 1\n", encoding="utf-8")
    return path


def cover_of(metadata) -> Image.Image:
    return Image.open(io.BytesIO(base64.b64decode(json.loads(metadata[COVER])[0]))).convert("RGB")


def apart(one: Image.Image, other: Image.Image) -> float:
    """The mean difference of pictures of one size, in grey levels."""
    assert one.size == other.size
    return sum(ImageStat.Stat(ImageChops.difference(one, other)).mean) / 3


def as_jpeg(path: Path) -> Image.Image:
    """As a JPEG of the quality of covers has it: the small model draws noise, of which a JPEG loses more than a step
    of training changes."""
    written = io.BytesIO()
    with Image.open(path) as picture:
        picture.convert("RGB").save(written, "JPEG", quality=90)
    return Image.open(written).convert("RGB")


def beside(tmp_path) -> list[str]:
    return sorted(path.name for path in (tmp_path / "out").iterdir() if path.is_file())


def test_every_file_shows_the_sample_of_its_step_and_its_trigger(run, prompts, tmp_path, caplog):
    options = {"save_every_n_steps": 1, "learning_rate": 3e-2, "sample_at_first": True, "sidecars": True}
    with caplog.at_level("INFO"):
        assert run(sample_prompts=prompts, **ONE_STEP | options) == 0
    assert any(line.startswith("trigger: 'sks cat', from what all captions begin with") for line in caplog.messages)
    drawn = {step: next((tmp_path / "out" / "sample").glob(f"cat_{step:06d}_01_*")) for step in (1, 2)}
    for name, step in (("cat-step00000001", 1), ("cat", 2)):
        file = tmp_path / "out" / f"{name}.safetensors"
        metadata = metadata_of(file)
        off = {step: apart(cover_of(metadata), as_jpeg(path)) for step, path in drawn.items()}
        assert off[step] == 0
        assert off[3 - step] > 0
        assert metadata[THUMBNAIL].startswith("data:image/jpeg;base64,")
        assert metadata["modelspec.trigger_phrase"] == "sks cat"
        assert int.from_bytes(file.read_bytes()[:8], "little") < HEADER_LIMIT
    names = ["cat-step00000001.safetensors", "cat.html", "cat.json", "cat.metadata.json", "cat.png", "cat.safetensors"]
    assert beside(tmp_path) == names
    assert (tmp_path / "out" / "cat.png").read_bytes() == drawn[2].read_bytes()
    webui = json.loads((tmp_path / "out" / "cat.json").read_text(encoding="utf-8"))
    assert (webui["activation text"], webui["preferred weight"], webui["sd version"]) == ("sks cat", 1.0, "SD1")

    # again, under the same name: the picture is the new one, since the old one was a sample; a person's would stay
    webui["notes"] = "mine"
    (tmp_path / "out" / "cat.json").write_text(json.dumps(webui), encoding="utf-8")
    assert run(sample_prompts=prompts, seed=9, **ONE_STEP | options | {"save_every_n_steps": None}) == 0
    newest = max((tmp_path / "out" / "sample").glob("cat_000002_01_*"), key=os.path.getmtime)
    assert (tmp_path / "out" / "cat.png").read_bytes() == newest.read_bytes()
    assert json.loads((tmp_path / "out" / "cat.json").read_text(encoding="utf-8"))["notes"] == "mine"


def test_what_is_given_wins_and_a_persons_picture_stays(run, prompts, photos, tmp_path):
    photo = sorted(photos.glob("*.jpg"))[0]
    (tmp_path / "out").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "out" / "cat.png")
    before = (tmp_path / "out" / "cat.png").read_bytes()
    options = {"metadata_thumbnail": photo, "metadata_trigger_phrase": "xyz", "sidecars": True, "model_card": True}
    assert run(sample_prompts=prompts, **ONE_STEP | options) == 0
    metadata = metadata_of(tmp_path / "out" / "cat.safetensors")
    with Image.open(photo) as opened:
        whole = opened.convert("RGB")
        whole.thumbnail((512, 512))
    assert apart(cover_of(metadata), whole) < 5
    assert metadata["modelspec.trigger_phrase"] == "xyz"
    assert (tmp_path / "out" / "cat.png").read_bytes() == before
    assert "cat.README.md" in beside(tmp_path)


def test_no_metadata_tells_nothing_of_captions_and_samples_but_what_the_author_says(run, prompts, tmp_path):
    assert run(sample_prompts=prompts, no_metadata=True, trigger_word="sks", metadata_author="me", **ONE_STEP) == 0
    metadata = metadata_of(tmp_path / "out" / "cat.safetensors")
    assert metadata["modelspec.author"] == "me"
    assert not {COVER, THUMBNAIL, "modelspec.trigger_phrase", "ss_tag_frequency", "ss_dataset_dirs"} & metadata.keys()


@pytest.fixture
def sharing(tmp_path):
    record = Record(samples=[Drawn("sample/x.png", 1, 0)])
    (tmp_path / "sample").mkdir()
    return Sharing(tmp_path, record, [Prompt("sks cat")], "sks cat", True, None, (), True, True)


@pytest.mark.parametrize("content", [None, b"", b"\x89PNG\r\n\x1a\nno picture"])
def test_a_sample_that_is_gone_or_damaged_is_told_in_a_line_and_nothing_ends(sharing, tmp_path, caplog, content):
    if content is not None:
        (tmp_path / "sample" / "x.png").write_bytes(content)
    assert sharing.cover("cat.safetensors", 1) == {}
    (told,) = caplog.messages
    assert told.startswith("cat.safetensors: without a picture, sample/x.png cannot be read")
    assert "\n" not in told


def test_a_training_that_goes_on_with_fewer_prompts_shows_what_there_is(sharing, tmp_path):
    sharing.record.samples[:] = [Drawn("sample/x.png", 1, 4)]
    Image.new("RGB", (16, 16)).save(tmp_path / "sample" / "x.png")
    file = tmp_path / "cat.safetensors"
    save_file({"lora_unet_a.lora_up.weight": torch.zeros(2, 2)}, str(file), {"modelspec.trigger_phrase": "sks cat"})
    assert COVER in sharing.cover(file.name, 1)
    sharing.beside({file: 1})
    assert '- text: "sks cat"' in (tmp_path / "cat.README.md").read_text(encoding="utf-8")


def test_what_cannot_be_written_beside_a_file_is_told_and_nothing_ends(run, tmp_path, caplog):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "cat.json").write_text("{", encoding="utf-8")
    assert run(max_train_steps=1, sidecars=True, network_train_unet_only=True) == 0
    assert (tmp_path / "out" / "cat.json").read_text(encoding="utf-8") == "{"
    assert any("cat.json: is there and cannot be read" in line for line in caplog.messages)


def test_a_thumbnail_that_is_no_picture_ends_it_before_the_model_is_loaded(tmp_path, photos):
    caption = sorted(photos.glob("*.txt"))[0]
    for wrong, told in ((caption, "cannot be read as a picture"), (tmp_path / "none.png", "No such file")):
        options = parse(arguments(tmp_path / "no model", photos, tmp_path, metadata_thumbnail=wrong))
        with pytest.raises(DeftError, match=f"--metadata_thumbnail .*{told}"):
            given.read(options)


def test_a_data_url_is_shown_too_and_another_stays_as_it_is():
    red = io.BytesIO()
    Image.new("RGB", (40, 30), "red").save(red, "PNG")
    url = f"data:image/png;base64,{base64.b64encode(red.getvalue()).decode()}"
    found = thumbnail_fields(url)
    assert found[THUMBNAIL] == url
    assert cover_of(found).size == (40, 30)
    assert thumbnail_fields("data:,hello") == {THUMBNAIL: "data:,hello"}


# What UIs' own code shows: FORGE_DIR, COMFYUI_DIR, LORA_MANAGER_DIR, a checkout of each


def program(variable: str):
    return pytest.param(variable, marks=pytest.mark.skipif(not os.environ.get(variable), reason=f"{variable} not set"))


@pytest.fixture(scope="module")
def shared_file(model_folder, tmp_path_factory):
    """A file that the trainer wrote, its sidecars beside it, and a copy without them."""
    folder = tmp_path_factory.mktemp("shared")
    photos = shutil.copytree(PHOTOS / "8_sks cat", folder / "photos" / "1_sks cat")
    (folder / "p.txt").write_text("sks cat --w 64 --h 64 --s 1 --d 1\n", encoding="utf-8")
    reset_accelerator()
    words = {"metadata_description": "A cat", "metadata_title": "Sks cat", "sample_prompts": folder / "p.txt"}
    given = arguments(model_folder, photos, folder, sidecars=True, model_card=True, **ONE_STEP | words)
    assert train_network_deft.main(given) == 0
    reset_accelerator()
    (folder / "bare").mkdir()
    bare = Path(shutil.copy(folder / "out" / "cat.safetensors", folder / "bare"))
    return folder / "out" / "cat.safetensors", bare


@pytest.mark.parametrize("variable", [program("FORGE_DIR")])
def test_what_forge_shows(shared_file, variable):
    whole, bare = (real_uis.shown_by_forge(Path(os.environ[variable]), file) for file in shared_file)
    for shown in (whole, bare):
        assert (shown.name, shown.model) == ("cat", "SD1")
        assert shown.picture.size == (64, 64)
        assert dict(shown.tags)["sks cat"] == 5
        assert shown.hash == metadata_of(shared_file[0])["sshs_model_hash"][:12]
    assert (whole.trigger, whole.strength, whole.description) == ("sks cat", 1.0, "A cat")
    assert bare.trigger is None
    assert (whole.picture.format, bare.picture.format) == ("PNG", "JPEG")


@pytest.mark.parametrize("variable", [program("COMFYUI_DIR")])
def test_what_comfyui_shows(shared_file, variable):
    for file, number in zip(shared_file, (2, 1), strict=True):
        pictures, metadata = real_uis.shown_by_comfyui(Path(os.environ[variable]), file)
        assert [one.size for one in pictures] == [(64, 64)] * number  # the file beside it, and the embedded one
        assert metadata["modelspec.trigger_phrase"] == "sks cat"


@pytest.mark.parametrize("variable", [program("LORA_MANAGER_DIR")])
def test_what_comfyui_lora_manager_shows(shared_file, variable):
    shown = real_uis.shown_by_the_manager(Path(os.environ[variable]), shared_file[0])
    assert (shown.name, shown.model, shown.description) == ("Sks cat", "SD 1.5", "A cat")
    assert (shown.trigger, shown.strength) == (["sks cat"], 1.0)
    assert shown.picture.size == (64, 64)
    assert shown.tags[0] == ("sks cat", 5)
