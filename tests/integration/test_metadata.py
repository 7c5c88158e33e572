"""ModelSpec's fields of our files beside those that sd-scripts' own code builds from the same command line.

SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... pytest tests/integration/test_metadata.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from library.options.table import MODEL_SPEC
from tests import small_flux, small_models
from tests.conftest import arguments, loaded
from tests.integration.conftest import metadata, needs_sd_scripts, run_script

pytestmark = [needs_sd_scripts, pytest.mark.usefixtures("fresh_accelerator")]

SIDE = Path(__file__).with_name("metadata_side.py")
# the commit of sd-scripts that was run; ours say deft_version instead
THEIRS_ALONE = {"modelspec.implementation_version"}
OF_THEIR_TIME = {"modelspec.date"}
GIVEN = {
    "title": "A cat, ñandú", "author": "me", "description": "two\nlines", "license": "CC0-1.0", "tags": "cat, animal",
    "usage_hint": "short", "merged_from": "a, b", "trigger_phrase": "sks cat", "preprocessor": "none",
    "is_negative_embedding": "false",
}  # fmt: skip


def theirs(kind: str, folder: Path, words: list[str]) -> dict:
    file = folder / f"theirs_{kind}.json"
    run_script(SIDE, file, kind, *words, with_deft=False)
    return json.loads(file.read_text(encoding="utf-8"))


def of_model(kind: str, model_folder: Path, folder: Path) -> Path:
    return model_folder if kind == "sd1" else small_models.build(kind, folder / kind)


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("sd1", {}),
        ("sd1", {"clip_skip": 2, "min_timestep": 10, "max_timestep": 800, "no_metadata": True}),
        ("sd2", {"v2": True, "v_parameterization": True, "max_timestep": 500}),
        ("sdxl", {"resolution": "128,64"}),
    ],
    ids=str,
)
def test_every_field_is_what_sd_scripts_builds(model_folder, photos, tmp_path, run, kind, options):
    thumbnail = tmp_path / "t.png"
    Image.new("RGB", (32, 24), "green").save(thumbnail)
    words = {f"metadata_{name}": value for name, value in GIVEN.items()} | {"metadata_thumbnail": thumbnail}
    changes = {"max_train_steps": 1, "pretrained_model_name_or_path": of_model(kind, model_folder, tmp_path)}
    changes |= options | words
    assert run(**changes) == 0
    expected = theirs(kind, tmp_path, arguments(model_folder, photos, tmp_path, **changes))
    assert expected["options"] == [f"metadata_{name}" for name in MODEL_SPEC]
    ours = {key: value for key, value in metadata(tmp_path, "cat").items() if key.startswith("modelspec.")}
    assert ours.keys() == expected["fields"].keys() - THEIRS_ALONE
    apart = OF_THEIR_TIME | THEIRS_ALONE
    assert {k: v for k, v in ours.items() if k not in apart} == {
        k: v for k, v in expected["fields"].items() if k not in apart
    }
    assert len(ours["modelspec.date"]) == len(expected["fields"]["modelspec.date"])


def test_without_any_the_rest_is_alike(model_folder, photos, tmp_path, run):
    """But for the trigger, which sd-scripts does not look for."""
    assert run(max_train_steps=1) == 0
    expected = theirs("sd1", tmp_path, arguments(model_folder, photos, tmp_path, max_train_steps=1))["fields"]
    ours = metadata(tmp_path, "cat")
    found = {key for key in ours if key.startswith("modelspec.")}
    assert found == expected.keys() - THEIRS_ALONE | {"modelspec.trigger_phrase"}


def test_flux_is_called_the_same(tmp_path):
    folder = small_flux.build(tmp_path / "flux").folder
    ours = {key: value for key, value in loaded(folder).names().items() if key.startswith("modelspec.")}
    expected = theirs("flux", tmp_path, ["--output_name", "cat", "--resolution", "64"])["fields"]
    assert ours == {key: expected[key] for key in ours}
    assert "modelspec.prediction_type" not in expected
