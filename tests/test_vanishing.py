"""Pictures and caches that change or vanish while they are trained on, and names of pictures that are none."""

from __future__ import annotations

import os
import shutil

import pytest
from PIL import Image
from safetensors.torch import load_file

from library.data.index import Index
from library.data.plan import divided, pictures, plan_of
from library.data.remarks import Remarks
from library.options.rooms import BucketOptions, DataOptions, DatasetOptions, SubsetOptions
from library.training.loop import TrainingLoop
from tests.test_resume import assert_equal


@pytest.fixture
def after_step(monkeypatch):
    """Something happens behind one of the optimizer's steps."""

    def arrange(step: int, action) -> None:
        method = TrainingLoop._after_step

        def wrapped(loop):
            method(loop)
            if loop.position.step == step:
                action()

        monkeypatch.setattr(TrainingLoop, "_after_step", wrapped)

    return arrange


@pytest.mark.parametrize("step", [2, 5])  # in the middle of an epoch of 5 steps, and at its end
def test_a_picture_that_vanishes_stops_the_training_which_saves_and_goes_on_when_it_is_back(
    run, photos, tmp_path, after_step, capsys, step
):
    options = {"random_crop": True, "max_train_steps": 8}
    assert run(output_name="undisturbed", **options) == 0
    away = tmp_path / "away"
    after_step(step, lambda: os.replace(photos, away))
    assert run(**options) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    step += step == 2  # whose next batch has been read meanwhile
    state = tmp_path / "out" / f"cat-step{step:08d}-state"
    assert f"stopped at step {step}: {photos}" in line
    assert f"--resume {state} goes on" in line
    os.replace(away, photos)
    after_step(-1, lambda: None)
    assert run(resume=state, **options) == 0
    out = tmp_path / "out"
    assert_equal(load_file(out / "cat.safetensors"), load_file(out / "undisturbed.safetensors"))


@pytest.mark.parametrize("texts", [False, True])
def test_a_cache_that_is_deleted_stops_the_training_in_a_line(run, tmp_path, after_step, capsys, texts):
    of_texts = {"cache_text_encoder_outputs_to_disk": True, "cache_text_encoder_outputs": True}
    of_texts["network_train_unet_only"] = True
    options = {"cache_dir": tmp_path / "cache"} | (of_texts if texts else {"cache_latents_to_disk": True})
    after_step(1, lambda: shutil.rmtree(tmp_path / "cache"))
    assert run(**options) == 1
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert "gone from the cache" in line
    assert "last good save: " in line
    assert "--resume " in line


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes there")
def test_a_pipe_is_no_picture_and_no_caption(run, photos, caplog, capsys):
    os.mkfifo(photos / "pipe.png")
    assert run() == 0
    assert any("1 pipe or socket" in message and "pipe.png" in message for message in caplog.messages)
    os.remove(photos / "chelsea_1.txt")
    os.mkfifo(photos / "chelsea_1.txt")
    assert run() == 2
    assert "chelsea_1.txt: no file, but the name of a caption" in capsys.readouterr().err


def test_a_trigger_word_may_stand_in_a_prefix_alone(run, capsys):
    words = {"trigger_word": "zwx", "diff_output_preservation_class": "a cat", "max_train_steps": 1}
    assert run(**words) == 2
    assert "--trigger_word zwx: no caption has it" in capsys.readouterr().err
    assert run(**words, caption_prefix="zwx,") == 0


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"flip_aug": True}, "flip_aug False -> True"),
        ({"caption_dropout_rate": 0.5}, "caption_dropout_rate 0.0 -> 0.5"),
        ({"clip_skip": 2}, "clip_skip None -> 2"),
        ({"resize_interpolation": "nearest"}, "resize_interpolation None -> nearest"),
    ],
)
def test_what_becomes_of_pictures_and_captions_is_told_when_it_changes_at_a_resume(
    run, tmp_path, caplog, options, told
):
    assert run(save_state_on_train_end=True, max_train_steps=1) == 0
    assert run(resume=tmp_path / "out" / "cat-state", max_train_steps=2) == 0
    assert not [line for line in caplog.messages if "->" in line]
    assert run(resume=tmp_path / "out" / "cat-state", max_train_steps=3, **options) == 0
    assert [line.split("-state: ")[1] for line in caplog.messages if "->" in line] == [
        f"{told}: taking effect from here on"
    ]


def test_a_picture_that_was_edited_before_a_resume_is_told(run, photos, tmp_path, caplog):
    assert run(save_state_on_train_end=True, max_train_steps=1) == 0
    with Image.open(photos / "chelsea_1.jpg") as image:
        edited = image.transpose(Image.Transpose.ROTATE_180)
    edited.save(photos / "chelsea_1.jpg")
    assert run(resume=tmp_path / "out" / "cat-state", max_train_steps=2) == 0
    (line,) = [line for line in caplog.messages if "->" in line]
    assert "goes on with other pictures" in line


def test_a_picture_that_changes_while_it_is_cached_leaves_no_entry_under_the_old_ones_key(
    run, photos, tmp_path, monkeypatch, caplog
):
    hashes = Index.hashes

    def and_edit(index, paths):
        found = hashes(index, paths)
        with Image.open(photos / "chelsea_1.jpg") as image:
            edited = image.transpose(Image.Transpose.ROTATE_180)
        edited.save(photos / "chelsea_1.jpg")
        return found

    monkeypatch.setattr(Index, "hashes", and_edit)
    assert run(cache_latents_to_disk=True, cache_dir=tmp_path / "cache", max_train_steps=1) == 0
    assert len(list((tmp_path / "cache").glob("*/*.safetensors"))) == 4
    assert any("chelsea_1.jpg has changed in the meantime" in message for message in caplog.messages)


def test_regularisation_pictures_are_as_many_as_those_that_validation_leaves(tmp_path):
    folders = [tmp_path / "5_cat", tmp_path / "1_class"]
    for folder, number in zip(folders, (6, 40), strict=True):
        folder.mkdir()
        for i in range(number):
            Image.new("RGB", (64, 64), (i, 0, 0)).save(folder / f"{i:02d}.png")
    subsets = (
        SubsetOptions(str(folders[0]), num_repeats=5, class_tokens="cat", validation_split=0.5),
        SubsetOptions(str(folders[1]), class_tokens="a cat", is_reg=True, validation_split=0.5),
    )
    options = DataOptions(datasets=(DatasetOptions(subsets, BucketOptions((64, 64))),))
    plan = plan_of(options, Index(tmp_path / "index"), Remarks())
    for part, wanted in ((plan, (30, 30)), (divided(plan, 1)[0], (15, 15))):
        repeats = [(picture.subset.is_reg, picture.repeats) for picture in pictures(part)]
        assert tuple(sum(n for is_reg, n in repeats if is_reg is kind) for kind in (False, True)) == wanted
