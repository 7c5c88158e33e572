"""Configurations as people publish them, and the bmaltais GUI's presets, read here and by sd-scripts' own code.

    SD_SCRIPTS_DIR=/path/to/sd-scripts SD_SCRIPTS_PYTHON=/path/to/its/venv/bin/python \\
      pytest tests/integration/test_dataset_config.py

With KOHYA_SS_DIR and KOHYA_SS_PYTHON, too, the GUI's presets are chosen in the GUI, and the files that it writes for
them are read. A minute.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, fields, is_dataclass
from pathlib import Path
from typing import Any

import pytest
import toml

from library.options.parse import parse
from library.options.rooms import DatasetOptions, Run, SubsetOptions
from networks.deft_config import DeftError
from tests.integration.conftest import SD_SCRIPTS, needs_sd_scripts, run_script
from tests.integration.test_kohya_ss import KOHYA_SS, Gui
from tests.kohya_configs import CASES, MODEL, NEW_CASES, Case, make_data, written
from tests.test_dataset_config import REFUSED

SIDE = Path(__file__).with_name("dataset_config_side.py")
IS_NEW = bool(SD_SCRIPTS) and Path(SD_SCRIPTS or "", "library", "accelerator_setup.py").exists()  # v0.11
pytestmark = needs_sd_scripts


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def theirs(folder: Path, cases: Sequence[tuple[str, list[str]]]) -> list[dict[str, Any]]:
    """What sd-scripts makes of command lines."""
    request, result = folder / "request.json", folder / "result.json"
    request.write_text(json.dumps([{"script": script, "arguments": arguments} for script, arguments in cases]))
    run_script(SIDE, request, result, with_deft=False)
    return json.loads(result.read_text())


def described(run: Run, dataset: DatasetOptions) -> dict[str, Any]:
    """A data set in sd-scripts' words."""
    buckets, subsets = dataset.buckets, dataset.subsets
    found = {name: value if buckets.enable_bucket else None for name, value in asdict(buckets).items()}
    found |= {
        "batch_size": dataset.batch_size, "width": buckets.resolution[0], "height": buckets.resolution[1],
        "network_multiplier": dataset.network_multiplier, "enable_bucket": buckets.enable_bucket,
        "bucket_no_upscale": buckets.enable_bucket and buckets.bucket_no_upscale,
        "skip_image_resolution": buckets.skip_image_resolution,
        "prior_loss_weight": run.preservation.prior_loss_weight,
        "subsets": [subset_in_their_words(subset) for subset in subsets],
    }  # fmt: skip
    del found["resolution"]
    return plain(found)


def subset_in_their_words(subset: SubsetOptions) -> dict[str, Any]:
    found = asdict(subset)
    return found | found.pop("captions") | found.pop("augment")


def plain(value: Any) -> Any:
    return json.loads(json.dumps(value))


def compared(ours: dict[str, Any], other: dict[str, Any], where: str = "") -> list[str]:
    """Where two descriptions of a data set differ, in the names that both have."""
    differ = []
    for name in ours.keys() & other.keys() - {"subsets"}:
        mine, their = (None if value == "" else value for value in (ours[name], other[name]))
        if mine != their:
            differ.append(f"{where}{name}: {mine!r}, sd-scripts {their!r}")
    for i, (mine, their) in enumerate(zip(ours.get("subsets", []), other.get("subsets", []), strict=True)):
        differ += compared(mine, their, f"{where}subset {i + 1} ")
    return differ


def data_differ(run: Run, result: dict[str, Any]) -> list[str]:
    """Where the data sets differ; none is left out and none is too many."""
    found: list[str] = []
    assert len(run.data.datasets) == len(result["datasets"])
    for dataset, their in zip(run.data.datasets, result["datasets"], strict=True):
        ours = described(run, dataset)
        metadata, masks = (
            any(one.get(key) for one in their["subsets"]) for key in ("metadata_file", "conditioning_data_dir")
        )
        for mine, other in zip(ours["subsets"], their["subsets"], strict=True):
            if metadata:  # whose captions, classes and kinds are not looked at
                other |= {name: mine[name] for name in ("caption_extension", "is_reg", "class_tokens")}
            if masks:  # which are all the same to it, as in metadata
                other |= {name: mine[name] for name in ("is_reg", "class_tokens", "alpha_mask")}
                other["custom_attributes"] = other["custom_attributes"] or {}
            if mine["face_crop_aug_range"] is None:  # sd-scripts does not look at it with buckets or cached latents
                cached = result["args"]["cache_latents"] or result["args"]["cache_latents_to_disk"]
                assert other["face_crop_aug_range"] is None or their["enable_bucket"] or cached
                other["face_crop_aug_range"] = None
        ours["subsets"].sort(key=lambda subset: str(subset["image_dir"]))  # sd-scripts takes folders as they come
        their["subsets"].sort(key=lambda subset: str(subset["image_dir"]))
        if metadata or masks:
            their |= {"prior_loss_weight": ours["prior_loss_weight"]}
        found += compared(ours, their)
    return found


def leaves(room: Any) -> dict[str, Any]:
    """The values of all rooms but those of the data sets."""
    found: dict[str, Any] = {}
    for field in fields(room):
        value = getattr(room, field.name)
        if is_dataclass(value):
            found |= leaves(value)
        elif field.name not in ("datasets", "recorded"):
            found[field.name] = value
    return found


# taken apart, or with a default of its own; each is tested in its own file
OTHERWISE = {"network_args", "optimizer_args", "lr_scheduler_args", "base_weights", "transparent_background",
             "optimizer_type", "text_encoder_lr", "cache_text_encoder_outputs", "fp8_base", "train_data_dir",
             "reg_data_dir"}  # fmt: skip
OFF = {"min_snr_gamma", "noise_offset", "multires_noise_iterations", "ip_noise_gamma", "v_pred_like_loss",
       "adaptive_noise_scale", "max_train_epochs", "blocks_to_swap", "torch_compile"}  # fmt: skip
DEFAULTS = {"learning_rate": (1e-4, 2e-6), "output_name": ("last", None), "save_precision": ("fp16", None),
            "max_timestep": (1000, None), "min_timestep": (0, None), "lr_scheduler_type": (None, ""),
            "sample_sampler": (None, "ddim"), "console_log_level": ("INFO", None)}  # fmt: skip


def options_differ(run: Run, result: dict[str, Any]) -> list[str]:
    args = result["args"]
    differ = []
    for name, value in leaves(run).items():
        if name in OTHERWISE or name not in args:
            continue
        mine, their = plain(value), args[name]
        if mine != their and (mine, their) != DEFAULTS.get(name) and not (name in OFF and not mine and not their):
            differ.append(f"{name}: {mine!r}, sd-scripts {their!r}")
    return differ


def test_published_configurations(data, tmp_path):
    cases = CASES | (NEW_CASES if IS_NEW else {})
    commands = []
    for i, case in enumerate(cases.values()):
        (tmp_path / str(i)).mkdir()
        commands.append((case.script, [*written(case, data, tmp_path / str(i)), "--network_module", "networks.deft"]))
    differ = {}
    for name, (_, arguments), result in zip(cases, commands, theirs(tmp_path, commands), strict=True):
        assert "error" not in result, (name, result)
        run = parse(arguments)
        differ[name] = data_differ(run, result) + options_differ(run, result)
    assert {name: found for name, found in differ.items() if found} == {}


def test_what_is_refused_here_is_refused_there(data, tmp_path):
    """But for what sd-scripts takes and passes over: those cases say so."""
    commands = []
    for i, case in enumerate(REFUSED.values()):
        (tmp_path / str(i)).mkdir()
        command = Case(case.config, case.dataset, (*MODEL, *case.arguments), case.ending, case.script)
        commands.append((case.script, written(command, data, tmp_path / str(i))))
    otherwise = []
    for (name, case), (_, arguments), result in zip(REFUSED.items(), commands, theirs(tmp_path, commands), strict=True):
        with pytest.raises(DeftError):
            parse(arguments)
        print(f"--- {name}: {result.get('error', 'passed over')[:100]}")
        if ("error" in result) == case.passed_over:
            otherwise.append(name)
    assert otherwise == []


@pytest.mark.skipif(not KOHYA_SS, reason="set KOHYA_SS_DIR to a checkout of bmaltais/kohya_ss")
def test_the_presets_of_the_gui(tmp_path):
    gui = Gui(tmp_path)
    presets = sorted(Path(KOHYA_SS, "presets", "lora").glob("*.json"))
    assert len(presets) > 25
    own = gui.own | {"reg_data_dir": "", "vae": "", "resume": "", "dataset_config": ""}
    weights = ["model.safetensors" if '"dim_from_weights": true' in preset.read_text() else "" for preset in presets]
    boxes = [own | {"network_weights": file and str(gui.folder / file)} for file in weights]
    results = gui.run(*([preset.stem, filled] for preset, filled in zip(presets, boxes, strict=True)))
    commands = []
    for i, result in enumerate(results):
        file = tmp_path / f"{i}.toml"
        file.write_text(toml.dumps(result["toml"]))
        script = "flux_train_network" if "flux" in presets[i].stem else "train_network"
        script = "sdxl_train_network" if "sdxl" in presets[i].stem.lower() else script
        commands.append((script, ["--config_file", str(file), "--network_module", "networks.deft", "--network_args"]))
    os.environ["HF_HUB_OFFLINE"] = "1"
    differ = {}
    for preset, (_, arguments), result in zip(presets, commands, theirs(tmp_path, commands), strict=True):
        if "error" in result:
            print(f"--- {preset.stem}: sd-scripts: {result['error'][:200]}")
            with pytest.raises(DeftError):
                parse(arguments)
            continue
        run = parse(arguments)
        differ[preset.stem] = data_differ(run, result) + options_differ(run, result)
    print(f"--- {len(differ)} of {len(presets)} read")
    assert {name: found for name, found in differ.items() if found} == {}
    assert len(differ) > 20
