"""The trainer's options: every one known once, honoured or refused in a line, and each room given its own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import is_dataclass
from typing import Any, get_args, get_type_hints

import pytest

from library.options import document, rooms
from library.options.parse import build_parser, parse
from library.options.table import OPTIONS
from networks.deft_config import DeftError

NEEDED = ["--pretrained_model_name_or_path", "m", "--train_data_dir", "d", "--output_dir", "o"]
ACCEPTED = [option for option in OPTIONS if option.status in ("always", "no effect")]
NOT_HONOURED = [option for option in OPTIONS if option.status == "refused"]


def given(option) -> list[str]:
    return [f"--{option.name}"] if option.kind is bool else [f"--{option.name}", "7.5"]


@pytest.mark.parametrize("option", NOT_HONOURED, ids=lambda option: option.name)
def test_what_is_not_honoured_ends_in_one_line_that_names_it(option):
    with pytest.raises(DeftError) as error:
        parse([*NEEDED, *given(option)])
    assert str(error.value).startswith(f"--{option.name}: ")
    assert len(str(error.value)) > len(option.name) + 20
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("option", ACCEPTED, ids=lambda o: o.name)
def test_what_is_done_anyway_may_be_asked_for(option):
    assert parse([*NEEDED, *given(option)]) == parse(NEEDED)


def test_a_configuration_with_sd_scripts_defaults_asks_for_nothing(tmp_path):
    """As the GUI writes them: switches that are off, and values that change nothing."""
    (tmp_path / "c.toml").write_text(
        "shuffle_caption = false\nkeep_tokens = 0\ncaption_dropout_rate = 0.0\nnoise_offset = 0\n"
        "huber_c = 0.1\nloss_type = 'l2'\nlr_scheduler_args = []\nprior_loss_weight = 1.0\n"
        "min_bucket_reso = 256\ncaption_separator = ','\nmax_data_loader_n_workers = 0\ncache_latents = true\n"
        "dynamo_backend = 'no'\nzero_stage = 2\n"
    )
    assert parse([*NEEDED, "--config_file", str(tmp_path / "c.toml")]) == parse(NEEDED)
    with pytest.raises(DeftError, match="--zero_stage: "):
        parse([*NEEDED, "--config_file", str(tmp_path / "c.toml"), "--zero_stage", "3"])


def leaves(kind: Any) -> Iterator[str]:
    """The fields of a room and of the rooms within it that hold no room."""
    for name, inner in get_type_hints(kind).items():
        room = next((one for one in (inner, *get_args(inner)) if is_dataclass(one)), None)
        yield from [name] if room is None else leaves(room)


def test_every_honoured_option_reaches_a_room():
    """By its name, but for those that are taken up into another's value or read on the way."""
    other_names = {"batch_size": "train_batch_size", "num_repeats": "dataset_repeats", "image_dir": "train_data_dir",
                   "metadata_file": "in_json"}  # fmt: skip
    reached = [other_names.get(name, name) for name in leaves(rooms.Run)]
    in_the_file = {"custom_attributes", "is_reg", "class_tokens", "network_multiplier"}  # alone
    honoured = {option.name for option in OPTIONS if not option.status}
    one_choice = {option.name for option in OPTIONS if len(option.choices) == 1} - set(reached)
    on_the_way = {"config_file", "dynamo_backend", "network_dropout", "base_weights_multiplier", "training_comment",
                  "use_8bit_adam", "use_lion_optimizer", "compile", "full_bf16", "full_fp16",
                  "fp8_base_unet", "output_config", "caption_extention", "network_module",
                  *(option.name for option in OPTIONS if str(option.metadata).startswith("modelspec."))}  # fmt: skip
    assert set(reached) - {"recorded", "settings", "arguments"} == honoured - on_the_way - one_choice | in_the_file
    assert parse([*NEEDED, "--training_comment", "x"]).recorded["ss_training_comment"] == "x"


def test_help_lists_what_is_honoured_and_nothing_else(capsys):
    with pytest.raises(SystemExit) as stopped:
        build_parser().parse_args(["--help"])
    assert stopped.value.code == 0
    shown = capsys.readouterr().out
    for option in OPTIONS:
        assert (f"--{option.name} " in shown or f"--{option.name}\n" in shown) == (not option.status), option.name


def test_the_docs_table_is_that_of_the_options():
    text = document.PAGE.read_text(encoding="utf-8")
    assert document.page(text) == text, "python -m library.options.document"
    for option in OPTIONS:
        assert f"`{option.name}`" in text


@pytest.mark.parametrize("module", ["networks.lora", "networks.lora_flux"])
def test_configurations_of_lora_train_with_deft(module, caplog):
    found = parse([*NEEDED, "--network_module", module])
    assert found == parse(NEEDED)
    assert f"--network_module {module}: trained as networks.deft" in caplog.text
    with pytest.raises(DeftError, match=r"invalid choice: 'lycoris\.kohya'"):
        parse([*NEEDED, "--network_module", "lycoris.kohya"])
