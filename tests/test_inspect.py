"""networks/inspect_deft.py: what it finds in files, what it prints, and its comparison with a base model."""

from __future__ import annotations

import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks import deft_clients, deft_report, inspect_deft
from networks.deft_clients import CLIENTS
from networks.deft_inventory import inventory
from tests.client_files import few, lora, odd


def written(path: Path, tensors: dict[str, Tensor], **metadata: str) -> str:
    save_file({key: tensor.clone().contiguous() for key, tensor in tensors.items()}, path, metadata or None)
    return str(path)


def facts(capsys, *arguments: str) -> dict:
    assert inspect_deft.main([*arguments, "--json", "-"]) == 0
    return json.loads(capsys.readouterr().out)["files"][0]


def test_ranks_norms_and_spectra_are_those_of_the_plain_products(tmp_path, capsys):
    tensors = lora("sd1", few, attn=3)
    name = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"
    pair = tensors[f"{name}.lora_up.weight"], tensors[f"{name}.lora_down.weight"]
    pair[0][:, 2] = pair[0][:, 1]
    pair[1][2] = 0  # of rank 2, the file says 3
    tensors[f"{name}.alpha"] = torch.tensor(6.0)
    found = facts(capsys, written(tmp_path / "a.safetensors", tensors, ss_base_model_version="sd_v1"))
    layer = next(la for la in found["layers"] if la["name"] == name)
    values = torch.linalg.svdvals(2 * pair[0].double() @ pair[1].double())[:2]
    assert torch.tensor(layer["spectrum"][:2]).double() == pytest.approx(values, rel=1e-4)
    assert (layer["rank"], layer["rank_in_use"], layer["alpha"]) == (3, 2, 6.0)
    assert layer["norm"] == pytest.approx(float(values.norm()), rel=1e-4)
    share = values.square().cumsum(0) / values.square().sum()
    assert layer["effective_rank"] == int((share < 0.99).sum()) + 1
    total = math.sqrt(sum(la["norm"] ** 2 for la in found["layers"]))
    assert found["norm"] == pytest.approx(total, rel=1e-4)
    assert math.sqrt(sum(b["norm"] ** 2 for b in found["blocks"])) == pytest.approx(total, rel=1e-4)
    assert found["model"] == "Stable Diffusion 1.x"


def test_nan_and_nothing_learnt_are_told(tmp_path, capsys):
    tensors = lora("flux", few)
    bad, empty = [key.split(".")[0] for key in tensors if key.endswith("up.weight")][:2]
    tensors[f"{bad}.lora_up.weight"][0, 0] = math.nan
    tensors[f"{empty}.lora_up.weight"].zero_()
    found = facts(capsys, written(tmp_path / "a.safetensors", tensors))
    assert found["not_finite"] == [bad]
    assert found["zero"] == [empty]
    assert len(found["layers"]) == len(tensors) // 3 - 1
    assert inspect_deft.main([str(tmp_path / "a.safetensors")]) == 0
    assert "1 layers have NaN" in capsys.readouterr().out
    nothing = {key: torch.zeros_like(t) if "up" in key else t for key, t in lora("sd1", few).items()}
    assert inspect_deft.main([written(tmp_path / "b.safetensors", nothing)]) == 0


def test_a_file_that_cannot_be_read_comes_after_the_others(tmp_path, capsys):
    good = written(tmp_path / "good.safetensors", lora("sd1", few))
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    assert inspect_deft.main([str(tmp_path / "bad.safetensors"), good]) == 2
    captured = capsys.readouterr()
    assert "good.safetensors" in captured.out
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("error: ")


@pytest.mark.parametrize("case", ["DoRA", "one Diffusers' block name"])
def test_what_is_printed_is_short_and_names_every_client(tmp_path, capsys, case):
    file = written(tmp_path / "a.safetensors", odd("sdxl")[case])
    code = inspect_deft.main([file])
    out = capsys.readouterr().out
    assert code in (0, 2)
    assert max(map(len, out.splitlines())) <= 100
    assert all(client.name in out for client in CLIENTS)


def test_plots_say_what_is_missing(tmp_path, capsys, monkeypatch):
    file = written(tmp_path / "a.safetensors", lora("sd1", few))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert inspect_deft.main([file, "--plot", str(tmp_path / "a.png")]) == 2
    assert "pip install matplotlib" in capsys.readouterr().err
    assert not (tmp_path / "a.png").exists()
    assert inspect_deft.main([file, "--plot", file]) == 2
    assert load_file(file)


def test_as_read_is_each_clients_arithmetic():
    """Scales, DoRA's forms and half precision against float64."""
    torch.manual_seed(0)
    W, up, down = torch.randn(12, 8), torch.randn(12, 2), torch.randn(2, 8)
    parts = {".lora_up.weight": up, ".lora_down.weight": down, ".alpha": torch.tensor(1.0)}
    right = 0.5 * (up.double() @ down.double())
    rows = slice(None)
    by_name = {client.name: client for client in CLIENTS}
    for client in CLIENTS:
        seen = deft_report.as_read(client, parts, W, torch.float32, rows)
        assert (seen - right).norm() / right.norm() < 1e-6
        half = deft_report.as_read(client, parts, W, torch.float16, rows)
        error = float((half - right).norm() / right.norm())
        assert (error > 1e-5) == (client.order == "model"), client.name
    lengths = torch.rand(1, 8) + 1
    dora = parts | {deft_clients.DORA_SCALE: lengths}
    new = W.double() + right
    wanted = new * lengths / new.norm(dim=0, keepdim=True) - W
    for name in ("A1111", "ComfyUI", "Forge", "InvokeAI"):
        assert deft_report.as_read(by_name[name], dora, W, torch.float32, rows) == pytest.approx(wanted, abs=1e-5)
    for name in ("diffusers", "sd-scripts"):
        assert deft_report.as_read(by_name[name], dora, W, torch.float32, rows) == pytest.approx(right, abs=1e-5)
    nothing = parts | {".alpha": torch.tensor(0.0)}
    assert deft_report.as_read(by_name["ComfyUI"], nothing, W, torch.float32, rows).abs().max() == 0
    assert deft_report.as_read(by_name["sd-scripts"], nothing, W, torch.float32, rows).abs().max() > 0


class Base:
    """Stands for a checkpoint of SD 1.5's size: weights made when they are asked for."""

    source, architecture = Path("base"), "Stable Diffusion 1.x or 2.x"

    def __init__(self) -> None:
        known = inventory("sd1")
        self.layers = {known.key(la): SimpleNamespace(shape=la.shape, pieces=[SimpleNamespace(key="w")])
                       for la in known.layers if not la.is_norm}  # fmt: skip
        self.further: dict[str, SimpleNamespace] = {}
        self.entries = {"w": SimpleNamespace(dtype=torch.float16)}

    def place(self, name: str) -> SimpleNamespace:
        return self.layers[name]

    def weight(self, name: str) -> Tensor:
        return torch.ones(self.layers[name].shape)


@pytest.mark.parametrize(("other", "wrong"), [("nothing", ()), ("attn2_to_q.alpha", ("diffusers",))])
def test_against_a_base_model_each_clients_error_is_told(tmp_path, other, wrong):
    plain = {key: t for key, t in lora("sd1", few).items() if re.search("attn|ff_net", key)}
    tensors = {key: torch.tensor(8.0) if key.endswith(other) else t for key, t in plain.items()}
    found = deft_report.report(written(tmp_path / "a.safetensors", tensors, ss_base_model_version="sd_v1"), Base())
    assert found.errors.keys() == {client.name for client in CLIENTS if "sd1" in client.models} - {
        name for name, reading in found.readings.items() if reading is None or reading.refused
    }
    for name, error in found.errors.items():
        assert (error.largest > 0.5) == (name in wrong), name
        assert error.largest < 2e-3 or name in wrong
    assert not found.base_missing
    for layer in found.layers:
        assert layer.relative == pytest.approx(layer.norm / math.sqrt(math.prod(layer.shape)), rel=1e-4)


def test_a_plot_is_a_picture_of_sane_size(tmp_path, capsys):
    """One row a file, whatever is in it."""
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    tensors = lora("sd1", few)
    zero = {key: torch.zeros_like(tensor) if "lora_up" in key else tensor for key, tensor in tensors.items()}
    files = [written(tmp_path / "a.safetensors", tensors), written(tmp_path / "zero.safetensors", zero)]
    plot = tmp_path / "plot.png"
    heights = []
    for chosen in (files[:1], files):
        assert inspect_deft.main([*chosen, "--plot", str(plot)]) == 0
        with image.open(plot) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert 500 <= picture.width <= 2000
            assert len(picture.convert("L").getcolors() or []) > 10  # something is drawn
            heights.append(picture.height)
    assert 200 <= heights[0] <= 1000
    assert heights[1] == 2 * heights[0]
