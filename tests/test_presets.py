"""The presets for the bmaltais GUI, without the GUI; tests/integration/test_kohya_ss.py asks the GUI itself."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest

from networks import deft
from networks.deft_config import parse_options, user_options

PRESETS = Path(__file__).resolve().parents[1] / "configs" / "kohya_ss"
MODELS = {"v2", "sdxl", "sd3_checkbox", "flux1_checkbox", "hunyuan_image_checkbox", "anima_checkbox", "lumina_checkbox"}
TICKED = {"DEFT - SD 1.5": set(), "DEFT - SDXL": {"sdxl"}, "DEFT - FLUX.1": {"flux1_checkbox"}}
USERS_OWN = {
    "pretrained_model_name_or_path", "train_data_dir", "reg_data_dir", "output_dir", "logging_dir", "output_name",
    "vae", "ae", "clip_l", "t5xxl", "network_weights", "resume", "dataset_config", "sample_prompts", "training_comment",
}  # fmt: skip


@pytest.fixture(params=TICKED)
def preset(request):
    return json.loads((PRESETS / f"{request.param}.json").read_text())


def test_its_additional_parameters_name_networks_deft_and_options_that_it_has(preset):
    parser = argparse.ArgumentParser()
    parser.add_argument("--network_module")
    parser.add_argument("--network_args", nargs="*", default=[])
    given = preset["additional_parameters"]
    args = parser.parse_args(given.replace('"', "").split())  # as the GUI splits them
    assert args.network_module == deft.__name__
    options = user_options(dict(pair.split("=", 1) for pair in args.network_args))
    config = parse_options({"dim": preset["network_dim"], "alpha": preset["network_alpha"], **options})
    assert config.scale == 1
    assert not set("[]*()|;\\'") & set(given)  # the GUI puts quotes around such words


def test_it_ticks_its_model_and_unticks_every_other(preset, request):
    assert preset.keys() >= MODELS
    assert {key for key in MODELS if preset[key]} == TICKED[request.node.callspec.params["preset"]]


def test_it_leaves_paths_and_names_alone(preset):
    assert not preset.keys() & USERS_OWN  # an empty string would empty the user's box
    texts = [value for value in preset.values() if isinstance(value, str)]
    assert not [text for text in texts if "/" in text or "\\" in text]


def test_text_encoders_whose_outputs_are_cached_are_not_trained(preset):
    cached = preset.get("sdxl_cache_text_encoder_outputs") or preset.get("flux1_cache_text_encoder_outputs")
    assert bool(cached) == (preset["text_encoder_lr"] == 0)
    assert not cached or not (preset["shuffle_caption"] or preset["caption_dropout_rate"])
