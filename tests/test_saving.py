"""Saved files: metadata and hashes, and that nothing bad ever replaces a good one."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from networks import deft_io
from networks.deft_config import DeftError
from tests.conftest import deltas, largest_error, network_of
from tests.test_architectures import Flux, network
from tests.test_files import loaded_from, metadata_of, save

ROOT = Path(__file__).resolve().parents[1]


def test_values_that_overflow_the_files_precision_never_replace_a_good_file(model, tmp_path):
    network = network_of(model)
    good = Path(save(network, tmp_path)).read_bytes()
    with torch.no_grad():
        network.unet_modules[3].R.fill_(1e12)
    with pytest.raises(DeftError, match=rf"{network.unet_modules[3].lora_name}.* is not finite in torch.float16"):
        save(network, tmp_path, dtype=torch.float16)
    assert (tmp_path / "a.safetensors").read_bytes() == good


def test_metadata_brings_deft_back_and_leaves_the_trainers_alone(model, tmp_path):
    network = network_of(model, 8, 2, basis="relu", conv_dim="2", conv_alpha="1")
    given = {"ss_output_name": "x", "ss_steps": "3"}
    file = save(network, tmp_path, metadata=given)
    assert given == {"ss_output_name": "x", "ss_steps": "3"}
    metadata = metadata_of(file)
    assert metadata["ss_output_name"] == "x"
    options = json.loads(metadata["deft_options"])
    assert (options["basis"], options["alpha"], options["conv_dim"]) == ("relu", 2.0, 2)
    ranks = {name: rank for name, (rank, _, _) in json.loads(metadata["deft_layers"]).items()}
    assert ranks == {m.lora_name: m.rank for m in network.all_modules}
    assert metadata["deft_base_dtype"] == "float32"
    network.remove()
    again = loaded_from(file, model)
    assert {m.lora_name: m.scale for m in again.all_modules} == {m.lora_name: m.scale for m in network.all_modules}


@pytest.mark.parametrize("save_format", ["lora", "deft"])
def test_files_carry_the_version_and_one_of_a_newer_version_is_read(tmp_path, monkeypatch, save_format):
    file = str(tmp_path / "a.safetensors")
    model = Flux()
    trained = network(copy.deepcopy(model), save_format=save_format)
    for version in (deft_io.VERSION, "99.0.0"):
        monkeypatch.setattr(deft_io, "VERSION", version)
        trained.save_weights(file, None, None)
        assert metadata_of(file)["deft_version"] == version
        again = network(copy.deepcopy(model), trained=False)
        again.load_weights(file)
        assert largest_error(deltas(again), deltas(trained)) < 1e-5
        tensors, metadata = deft_io.kept_tensors({"lora_unet_x": torch.eye(4)[:, :2]})
        assert metadata["deft_version"] == version
        assert deft_io.kept_directions(tensors, metadata)["lora_unet_x"].shape == (4, 2)


def test_the_version_is_that_of_the_newest_entry_in_the_change_log():
    entries = re.findall(r"^## \[(\d+\.\d+\.\d+)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert entries[0] == deft_io.VERSION
    numbers = [tuple(map(int, entry.split("."))) for entry in entries]
    assert numbers == sorted(numbers, reverse=True)


def test_files_say_what_model_they_are_for_where_the_trainer_does_not(model, tmp_path):
    network = network_of(model)
    found = metadata_of(save(network, tmp_path, metadata={"ss_leco_prompt_count": "4"}))
    known = {"ss_v2": "False", "ss_base_model_version": "sd_v1", "modelspec.architecture": "stable-diffusion-v1/lora"}
    assert (known | {"ss_leco_prompt_count": "4"}).items() <= found.items()
    assert known.items() <= metadata_of(save(network, tmp_path, metadata=None)).items()
    given = {"ss_v2": "True", "ss_base_model_version": "sd_v2_v", "modelspec.architecture": "x"}
    assert given.items() <= metadata_of(save(network, tmp_path, metadata=given)).items()


def test_base_hash_follows_the_weights_as_the_forward_pass_sees_them(model, tmp_path):
    network = network_of(model)
    hashes = [metadata_of(save(network, tmp_path))["deft_base_hash"] for _ in range(2)]
    layer = network.unet_modules[5].org_module
    layer.weight.data = layer.weight.data.flip(0)
    hashes.append(metadata_of(save(network, tmp_path))["deft_base_hash"])
    layer.weight.data = layer.weight.data.flip(0)
    model.denoiser.to(torch.bfloat16)
    metadata = metadata_of(save(network, tmp_path))
    hashes.append(metadata["deft_base_hash"])
    assert metadata["deft_base_dtype"] == "bfloat16,float32"
    assert hashes[0] == hashes[1]
    assert len(set(hashes)) == 3


def test_hashes_are_those_that_webuis_compute(model, tmp_path):
    """sshs_model_hash is SHA-256 of everything behind the file's header, as A1111's lora.py hashes a file."""
    file = save(network_of(model), tmp_path, metadata={"ss_steps": "3"})
    content = Path(file).read_bytes()
    (header,) = struct.unpack("<Q", content[:8])
    assert metadata_of(file)["sshs_model_hash"] == hashlib.sha256(content[8 + header :]).hexdigest()
    assert len(metadata_of(file)["sshs_legacy_hash"]) == 8


def test_non_finite_networks_never_replace_a_good_file(model, tmp_path):
    network = network_of(model)
    good = Path(save(network, tmp_path)).read_bytes()
    with torch.no_grad():
        network.unet_modules[3].R[0, 0] = float("nan")
    with pytest.raises(DeftError, match=rf"{network.unet_modules[3].lora_name}.R has non-finite values"):
        save(network, tmp_path)
    assert (tmp_path / "a.safetensors").read_bytes() == good
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


SAVE_IN_A_CHILD = """
import os, signal, sys, torch
sys.path.insert(0, {root!r})
from networks import deft_io
{sabotage}
deft_io.write_safetensors({{"x": torch.ones(300_000)}}, {file!r}, {{}})
"""


@pytest.mark.skipif(sys.platform == "win32", reason="signals and limits of POSIX")
@pytest.mark.parametrize(
    ("sabotage", "leftover"),
    [
        (
            "import resource; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
            "resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))",
            0,
        ),
        ("deft_io.os.fsync = lambda _: os.kill(os.getpid(), signal.SIGKILL)", 1),
    ],
    ids=["no room on the disk", "killed"],
)
def test_a_failing_save_leaves_the_previous_file_whole(tmp_path, sabotage, leftover):
    file = tmp_path / "a.safetensors"
    save_file({"x": torch.zeros(10)}, file)
    good = file.read_bytes()
    code = SAVE_IN_A_CHILD.format(root=str(ROOT), sabotage=sabotage, file=str(file))
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode != 0
    assert file.read_bytes() == good
    others = [p.name for p in tmp_path.iterdir() if p != file]
    assert len(others) == leftover
    assert all(name.endswith(".partial") for name in others)
    if not leftover:
        assert "could not be saved, what was there is untouched" in child.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="permissions of POSIX")
def test_files_can_be_read_by_whom_the_users_settings_allow(tmp_path):
    (tmp_path / "plain").touch()
    deft_io.write_safetensors({"x": torch.ones(3)}, tmp_path / "a.safetensors", {})
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_fingerprint_is_that_of_the_bits():
    weight = torch.randn(6, 10)
    one = deft_io.base_fingerprint([("a", weight)])
    assert one == deft_io.base_fingerprint([("a", weight.clone().t().contiguous().t())])
    assert one != deft_io.base_fingerprint([("b", weight)])
    changed = weight.clone()
    changed[2, 3] = torch.nextafter(changed[2, 3], torch.tensor(9.0))
    assert one != deft_io.base_fingerprint([("a", changed)])
    assert one != deft_io.base_fingerprint([("a", weight.to(torch.bfloat16))])


@pytest.mark.parametrize("save_format", ["lora", "deft"])
def test_an_adapter_that_has_learnt_nothing_is_not_saved_without_a_word(model, tmp_path, caplog, save_format):
    network = network_of(model, trained=False, removal="0", save_format=save_format)
    base = {m: m.base_weight().norm() for m in network.all_modules}
    dtype = torch.float16
    told = []
    for size in (0, 1e-7, 1e-2):  # of the weights' own; float16 rounds 5e-4 away
        with torch.no_grad():
            for module, norm in base.items():
                module.R.fill_(1)
                module.R.mul_(size * norm / (module.effective_R.norm() * module.scale))
        caplog.clear()
        save(network, tmp_path, dtype=dtype)
        told.append([line for line in caplog.messages if "nearly nothing has been learnt yet" in line])
    assert ["every delta is 0" in line for line in told[0]] == [True]
    assert ["largest delta is 1e-07 of its weight" in line for line in told[1]] == [True]
    assert told[2] == []


def test_a_training_without_effect_says_so(run, caplog):
    """At a rate of nearly 0, of the file; at a usual one, nothing is said."""
    said = []
    for rate in (1e-30, 1e-3):
        caplog.clear()
        assert run(learning_rate=rate) == 0
        said.append([line for line in caplog.messages if "has been learnt" in line])
    assert len(said[0]) == 1
    assert said[0][0].split(": ")[0].endswith("cat.safetensors")
    assert said[1] == []
