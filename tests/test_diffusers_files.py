"""What diffusers itself saves: LoRA files, carried to kohya's form and back; models in its folders and in files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from diffusers import FluxPipeline, StableDiffusionPipeline, StableDiffusionXLPipeline
from diffusers.loaders import lora_conversion_utils
from peft.utils import get_peft_model_state_dict
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from networks import convert_deft, deft_formats, extract_deft, inspect_deft, merge_deft, resize_deft
from networks.deft_clients import Outline, readings
from networks.deft_factors import Factors
from networks.deft_inventory import inventory
from networks.deft_io import PEFT_KEY
from tests import small_flux, small_models
from tests.client_files import dotted, few, lora

PIPELINES = {"sd15": StableDiffusionPipeline, "sdxl": StableDiffusionXLPipeline, "flux": FluxPipeline}
TARGETS = {
    "unet": ["to_q", "to_k", "to_v", "to_out.0", "proj_in", "ff.net.2", "conv1"],
    "transformer": ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "ff.net.0.proj", "proj_mlp", "norm.linear"],
    "text_encoder": ["q_proj", "out_proj", "fc1"],
}


@pytest.fixture(scope="module", params=PIPELINES)
def saved(request, tmp_path_factory) -> tuple[str, Path, dict[str, Tensor], Path]:
    """(kind, a file of `save_lora_weights`, component and path -> the delta that peft's layer applies, the model)"""
    kind, folder = request.param, tmp_path_factory.mktemp(request.param)
    model = small_flux.build(folder).folder if kind == "flux" else small_models.build(kind, folder / "model")
    pipe: Any = PIPELINES[kind].from_pretrained(model)
    deltas, given = {}, {}
    components = ["transformer" if kind == "flux" else "unet", "text_encoder"]
    components += ["text_encoder_2"] if kind == "sdxl" else []
    for component in components:
        targets = TARGETS[component.removesuffix("_2")]
        # a scale that is no 1 and ranks and alphas that differ, which only the file's metadata tells
        config = peft.LoraConfig(r=4, lora_alpha=2, target_modules=targets, init_lora_weights=False,
                                 rank_pattern={"to_k": 2}, alpha_pattern={"to_v": 7})  # fmt: skip
        module = getattr(pipe, component)
        peft.inject_adapter_in_model(config, module)
        for path, layer in module.named_modules():
            if isinstance(layer, peft.tuners.lora.LoraLayer):
                deltas[f"{component}.{path}"] = layer.get_delta_weight("default").detach()
        given[f"{component}_lora_layers"] = get_peft_model_state_dict(module)
        given[f"{component}_lora_adapter_metadata"] = config.to_dict()
    pipe.save_lora_weights(folder / "lora", **given)
    (file,) = (folder / "lora").iterdir()
    return kind, file, deltas, model


def deltas_in(file: Path) -> dict[str, Tensor]:
    """Kohya's key name -> delta (m, n) of the whole weight, in float64."""
    changes = deft_formats.read(file).changes
    found = {}
    for name, change in changes.items():
        assert isinstance(change, Factors)
        found[name] = change.up.double() @ change.down.double()
    return found


def applied_by(kind: str, file: Path, model: Path) -> dict[str, Tensor]:
    """What `load_lora_weights` of diffusers makes of a file: component and path -> delta."""
    pipe: Any = PIPELINES[kind].from_pretrained(model)
    pipe.load_lora_weights(str(file))
    return {
        f"{component}.{path}": layer.get_delta_weight(layer.active_adapters[0]).detach()
        for component in ("unet", "transformer", "text_encoder", "text_encoder_2")
        if getattr(pipe, component, None) is not None
        for path, layer in getattr(pipe, component).named_modules()
        if isinstance(layer, peft.tuners.lora.LoraLayer)
    }


def test_scales_in_the_metadata_are_read_and_carried_into_every_form(saved, tmp_path, monkeypatch, capsys):
    """diffusers reads what we made of its file as its own layers were: forms, sums and lower ranks."""
    kind, file, wanted, model = saved
    converter = "_convert_kohya_flux_lora_to_diffusers"
    small = small_flux.of_small_width(getattr(lora_conversion_utils, converter))
    monkeypatch.setattr(f"diffusers.loaders.lora_pipeline.{converter}", small)
    read = deltas_in(file)
    assert sum(float(d.double().square().sum()) for d in wanted.values()) == pytest.approx(
        sum(float(d.square().sum()) for d in read.values()), rel=1e-5
    )
    made = {form: tmp_path / f"{form}.safetensors" for form in ("kohya", "diffusers", "repaired", "sum", "lower")}
    assert convert_deft.main([str(file), "--to", "kohya", "--save_to", str(made["kohya"])]) == 0
    assert convert_deft.main([str(made["kohya"]), "--to", "diffusers", "--save_to", str(made["diffusers"])]) == 0
    assert convert_deft.main([str(file), "--repair", "--save_to", str(made["repaired"])]) == 0
    assert (
        merge_deft.main(["--models", str(file), str(file), "--ratios", "0.25", "0.75", "--save_to", str(made["sum"])])
        == 0
    )
    assert resize_deft.main(["--model", str(file), "--new_rank", "16", "--save_to", str(made["lower"])]) == 0
    for form, path in made.items():
        again = deltas_in(path)
        assert read.keys() <= again.keys()
        assert not any(again[name].any() for name in again.keys() - read.keys())  # of CLIP-G's attention
        errors = [float((again[name] - read[name]).norm() / read[name].norm()) for name in read]
        assert max(errors) == 0.0 if form in ("kohya", "diffusers") else max(errors) < 1e-5, form
        with safe_open(str(path), "pt") as opened:
            assert PEFT_KEY not in opened.metadata()
        applied = applied_by(kind, path, model)
        for key, delta in wanted.items():
            torch.testing.assert_close(applied[key], delta, rtol=1e-4, atol=1e-5, msg=f"{form}: {key}")
    capsys.readouterr()


def test_who_does_not_look_into_that_record_is_told():
    record = json.dumps({"unet.r": 1, "unet.lora_alpha": 0.5})
    plain = dotted("sd1", lora("sd1", lambda layer: few(layer) and layer.part == "unet"), "diffusers")
    found = readings(Outline.of(plain, {PEFT_KEY: record}), inventory("sd1"))
    for client, said in found.items():
        if said is not None and said.matched and client != "diffusers":
            assert set(said.factors.values()) == {2.0}, client
            assert any("scales" in line and "2 times" in line for line in said.wrong), client
    assert found["diffusers"] is not None
    assert not found["diffusers"].wrong
    assert not readings(Outline.of(plain, {}), inventory("sd1"))["Forge"].wrong


@pytest.mark.parametrize("record", ["[[", "null", "[" * 5000])
def test_a_record_that_cannot_be_read_is_one_line(record, tmp_path, capsys):
    plain = dotted("sd1", lora("sd1", lambda layer: few(layer) and layer.part == "unet"), "diffusers")
    save_file(plain, tmp_path / "a.safetensors", metadata={PEFT_KEY: record})
    for tool, options in ((inspect_deft, []), (convert_deft, ["--save_to", str(tmp_path / "b.safetensors")])):
        assert tool.main([str(tmp_path / "a.safetensors"), *options]) == 2
        (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert line.startswith(f"error: {tmp_path / 'a.safetensors'}: its {PEFT_KEY} cannot be read")


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
def test_the_difference_of_a_folder_and_a_single_file(kind, tmp_path):
    """Base as a Diffusers folder and tuned as a single file, and the other way round: what the folders give."""
    tuned = [small_models.build(kind, tmp_path / name) for name in ("base", "tuned")][1]
    pipe: Any = PIPELINES[kind].from_pretrained(tuned)
    generator = torch.Generator().manual_seed(0)
    for module in (pipe.unet, pipe.text_encoder):
        for weight in module.parameters():
            if weight.dim() > 1:  # of rank 3, so that rank 4 has all of it
                m, n = weight.shape[0], weight[0].numel()
                up, down = torch.randn(m, 3, generator=generator), torch.randn(3, n, generator=generator)
                weight.data += 0.05 * (up @ down).reshape(weight.shape)
    pipe.save_pretrained(tuned)
    for name in ("base", "tuned"):
        of_folder: Any = PIPELINES[kind].from_pretrained(tmp_path / name)
        save_file(small_models.single_file(of_folder), tmp_path / f"{name}.safetensors")
    found = []
    for number, (org, new) in enumerate(
        [("base", "tuned"), ("base", "tuned.safetensors"), ("base.safetensors", "tuned")]
    ):
        output = tmp_path / f"{number}.safetensors"
        options = ["--dim", "4", "--conv_dim", "4", "--save_to", str(output)]
        paths = ["--model_org", str(tmp_path / org), "--model_tuned", str(tmp_path / new)]
        assert extract_deft.main([*paths, *options]) == 0
        found.append(deltas_in(output))
    for other in found[1:]:
        assert other.keys() == found[0].keys()
        for name, delta in found[0].items():
            assert float((other[name] - delta).norm() / delta.norm()) < 1e-4, name
    assert len(found[0]) > 200
