"""OmniGen's adapters in files: diffusers' names, the original package's folders, the loader for diffusers' class."""

from __future__ import annotations

import json
import re
import textwrap
from pathlib import Path
from types import SimpleNamespace

import diffusers
import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import Phi3Config, Phi3Model

from networks import convert_deft, deft, deft_formats, deft_io, merge_deft
from tests.conftest import ROOT, deltas, file_factors, largest_error, relative_error
from tests.test_architectures import network, omnigen_transformer
from tests.test_fused import PIECES, answer

R = 4
R_OF_THEIRS = 3


class OmniGen(nn.Module):
    """The original's module tree around its language model, which is a Phi3Model of transformers there too."""

    def __init__(self) -> None:
        super().__init__()
        sizes = {"hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 32}
        self.llm = Phi3Model(Phi3Config(**sizes, num_hidden_layers=2, vocab_size=40, pad_token_id=0, eos_token_id=2))
        self.x_embedder = nn.Conv2d(4, 16, 2, 2)
        self.requires_grad_(False)

    def weights(self) -> dict[str, Tensor]:
        """By the key name of files; queries, keys and values apart."""
        found: dict[str, Tensor] = {}
        for k, layer in enumerate(self.llm.layers):
            parts = dict(zip(("to_q", "to_k", "to_v"), layer.self_attn.qkv_proj.weight.chunk(3), strict=True))
            parts["to_out_0"] = layer.self_attn.o_proj.weight
            found |= {f"lora_unet_layers_{k}_self_attn_{name}": weight for name, weight in parts.items()}
            for name in ("gate_up_proj", "down_proj"):
                found[f"lora_unet_layers_{k}_mlp_{name}"] = getattr(layer.mlp, name).weight
        return {name: weight.detach().clone() for name, weight in found.items()}


def trained_file(path: Path, **options) -> dict[str, Tensor]:
    """A file of a network that is as if trained, and its deltas by key name."""
    net = network(omnigen_transformer(), dim=R, **options)
    net.save_weights(str(path), torch.float32, {"ss_output_name": "cat"})
    return {name: factors.delta().detach() for name, factors in file_factors(net).items()}


def convert(*arguments) -> None:
    assert convert_deft.main([str(argument) for argument in arguments]) == 0


def changes_of(path: Path) -> dict[str, Tensor]:
    return {name: change.delta() for name, change in deft_formats.read(path).changes.items()}


@pytest.mark.parametrize("options", [{}, {"train_mlp": "true"}, {"fuse_qkv": "true"}], ids=str)
def test_the_original_merges_what_peft_makes_of_the_folder(tmp_path, options):
    """Its `merge_lora` is peft's from_pretrained and merge_and_unload: every weight is then ours."""
    expected = trained_file(tmp_path / "cat.safetensors", **options)
    convert(tmp_path / "cat.safetensors", "--save_to", tmp_path / "cat", "--to", "peft")
    model = OmniGen()
    before = model.weights()
    merged = peft.PeftModel.from_pretrained(model, tmp_path / "cat").merge_and_unload()
    found = {name: weight - before[name] for name, weight in merged.weights().items()}
    assert largest_error({name: found[name] for name in expected}, expected) < 1e-5
    assert not any(found[name].any() for name in found.keys() - expected.keys())

    config = json.loads((tmp_path / "cat" / "adapter_config.json").read_text())
    fused = 3 * R if "fuse_qkv" not in options else R
    ranks = {"qkv_proj": fused, "o_proj": R}
    for patterns, default in (("rank_pattern", "r"), ("alpha_pattern", "lora_alpha")):  # of peft 0.13 too
        assert {kind: config[patterns].get(kind, config[default]) for kind in ranks} == ranks
        assert set(config[patterns]) <= {"qkv_proj"}
    tensors = load_file(tmp_path / "cat" / "adapter_model.safetensors")
    down, up = (tensors[f"base_model.model.llm.layers.0.self_attn.qkv_proj.lora_{side}.weight"] for side in "AB")
    assert down.shape == (fused, 16)
    assert up.shape == (48, fused)

    convert(tmp_path / "cat", "--save_to", tmp_path / "back.safetensors")
    assert largest_error(changes_of(tmp_path / "back.safetensors"), expected) < 1e-6
    with deft_io._opened(tmp_path / "back.safetensors") as file:
        assert file.metadata()["ss_output_name"] == "cat"


def test_diffusers_names_and_back(tmp_path):
    expected = trained_file(tmp_path / "cat.safetensors", train_mlp="true")
    convert(tmp_path / "cat.safetensors", "--save_to", tmp_path / "x.safetensors", "--to", "diffusers")
    keys = set(load_file(tmp_path / "x.safetensors"))
    assert "transformer.layers.0.self_attn.to_out.0.lora_A.weight" in keys
    assert len(keys) == 2 * len(expected)
    convert(tmp_path / "x.safetensors", "--save_to", tmp_path / "back.safetensors")
    before, after = load_file(tmp_path / "cat.safetensors"), load_file(tmp_path / "back.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)

    model = omnigen_transformer()
    paths = {path for path, _ in model.named_modules()}
    wanted = {key.removeprefix("transformer.").rpartition(".lora_")[0] for key in keys}
    assert wanted <= paths
    peft.inject_adapter_in_model(peft.LoraConfig(r=R, lora_alpha=R, target_modules=sorted(wanted)), model)
    tensors = {key.removeprefix("transformer."): t for key, t in load_file(tmp_path / "x.safetensors").items()}
    outcome = peft.set_peft_model_state_dict(model, tensors)
    assert not outcome.unexpected_keys
    layer = model.layers[1].self_attn.to_k
    assert relative_error(layer.get_delta_weight("default"), expected["lora_unet_layers_1_self_attn_to_k"]) < 1e-6


@pytest.mark.parametrize("alpha", [8, 3])
def test_an_adapter_of_the_originals_training_is_three_layers_with_one_down(tmp_path, alpha):
    """As its train.py makes it: peft's LoRA on qkv_proj and o_proj."""
    model = OmniGen()
    config = peft.LoraConfig(r=8, lora_alpha=alpha, init_lora_weights=False, target_modules=["qkv_proj", "o_proj"])
    trained = peft.get_peft_model(model, config)
    trained.save_pretrained(tmp_path / "theirs")
    before = {name.replace(".base_layer", ""): p.clone() for name, p in model.named_parameters()}
    merged = trained.merge_and_unload()
    expected = {}
    for k, layer in enumerate(merged.llm.layers):
        rows = (layer.self_attn.qkv_proj.weight - before[f"llm.layers.{k}.self_attn.qkv_proj.weight"]).chunk(3)
        expected |= {f"lora_unet_layers_{k}_self_attn_to_{x}": part for x, part in zip("qkv", rows, strict=True)}
        out = layer.self_attn.o_proj.weight - before[f"llm.layers.{k}.self_attn.o_proj.weight"]
        expected[f"lora_unet_layers_{k}_self_attn_to_out_0"] = out
    convert(tmp_path / "theirs", "--save_to", tmp_path / "x.safetensors")
    assert largest_error(changes_of(tmp_path / "x.safetensors"), expected) < 1e-5
    tensors = load_file(tmp_path / "x.safetensors")
    downs = [tensors[f"{name}.lora_down.weight"] for name in PIECES]
    assert downs[0].shape == (8, 16)
    assert torch.equal(downs[0], downs[1])
    assert torch.equal(downs[0], downs[2])

    convert(tmp_path / "x.safetensors", "--save_to", tmp_path / "again", "--to", "peft")
    theirs, again = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("theirs", "again"))
    assert {key: tensor.shape for key, tensor in again.items()} == {key: t.shape for key, t in theirs.items()}

    transformer = omnigen_transformer()
    file = str(tmp_path / "x.safetensors")
    net, _ = deft.create_network_from_weights(1.0, file, None, [], transformer, fuse_qkv="true")
    net.apply_to([], transformer)
    net.load_weights(file)
    assert {m.rank for m in net.all_modules} == {8}


@pytest.mark.parametrize("method", ["qr", "None"])
def test_an_adapter_of_the_papers_authors_becomes_a_lora_on_its_base(tmp_path, method, capsys):
    """As their finetune.py leaves it: P and R over the fused weight, of "qr" with the Q that was kept."""
    model, state, layers, expected = OmniGen(), {}, {}, {}
    for k, layer in enumerate(model.llm.layers):
        W, path = layer.self_attn.qkv_proj.weight.double(), f"llm.layers.{k}.self_attn.qkv_proj"
        P, R = 0.02 * torch.randn(48, R_OF_THEIRS), 0.02 * torch.randn(R_OF_THEIRS, 16)
        Q = torch.linalg.qr(P)[0]
        state |= {f"{path}.P": P, f"{path}.R_new": R} | ({f"{path}.Q_P_cached": Q} if method == "qr" else {})
        layers[path] = {"r": R_OF_THEIRS, "injection_method": "residual_projection", "decomposition_method": method}
        left, eraser = (Q, Q) if method == "qr" else (P, torch.relu(P))
        delta = left.double() @ (R.double() - eraser.double().T @ W)
        for x, rows in zip("qkv", delta.chunk(3), strict=True):
            expected[f"lora_unet_layers_{k}_self_attn_to_{x}"] = rows.float()
    torch.save(state, tmp_path / "knowledge_injection_state.bin")
    torch.save({"layer_configs": layers}, tmp_path / "knowledge_injection_config.bin")
    weights = {name: p.contiguous() for name, p in model.state_dict().items()}
    save_file(weights | {"input_x_embedder.proj.weight": torch.zeros(16, 4, 2, 2)}, tmp_path / "model.safetensors")

    arguments = [str(tmp_path), "--save_to", str(tmp_path / "x.safetensors"), "--energy", "1"]
    assert convert_deft.main(arguments) == 2
    assert "depends on the base model's weight; give it with --base MODEL" in capsys.readouterr().err
    convert(*arguments, "--base", tmp_path / "model.safetensors")
    assert largest_error(changes_of(tmp_path / "x.safetensors"), expected) < 1e-5
    arguments = ["--sd_model", tmp_path / "model.safetensors", "--save_to", tmp_path / "y.safetensors"]
    assert merge_deft.main([str(argument) for argument in [*arguments, "--models", tmp_path]]) == 2
    assert "of several layers in one and depends on all their weights" in capsys.readouterr().err


def test_a_file_is_merged_into_either_forms_checkpoint(tmp_path):
    expected = trained_file(tmp_path / "cat.safetensors", train_mlp="true")
    theirs, ours = omnigen_transformer(), OmniGen()
    state = {name: p.contiguous() for name, p in ours.state_dict().items()} | {
        "input_x_embedder.proj.weight": torch.zeros(16, 4, 2, 2)
    }
    save_file(state, tmp_path / "model.safetensors")
    theirs.save_pretrained(tmp_path / "transformer")
    for checkpoint in ("model.safetensors", "transformer/diffusion_pytorch_model.safetensors"):
        arguments = ["--sd_model", tmp_path / checkpoint, "--save_to", tmp_path / "merged.safetensors"]
        arguments += ["--models", tmp_path / "cat.safetensors"]
        assert merge_deft.main([str(argument) for argument in arguments]) == 0
        before, after = load_file(tmp_path / checkpoint), load_file(tmp_path / "merged.safetensors")
        changed = {key: after[key] - before[key] for key in before if not torch.equal(after[key], before[key])}
        qkv = torch.cat([expected[name] for name in PIECES])
        if checkpoint == "model.safetensors":
            assert relative_error(changed["llm.layers.0.self_attn.qkv_proj.weight"], qkv) < 1e-5
            assert len(changed) == 8
        else:
            assert relative_error(changed["layers.0.self_attn.to_v.weight"], expected[PIECES[2]]) < 1e-5
            assert len(changed) == 12


def test_comfyui_has_no_names_for_it(tmp_path, capsys):
    trained_file(tmp_path / "cat.safetensors")
    arguments = [tmp_path / "cat.safetensors", "--save_to", tmp_path / "x.safetensors", "--to", "comfy"]
    assert convert_deft.main([str(argument) for argument in arguments]) == 2
    assert "has no name in it that is known here" in capsys.readouterr().err


# --- the loader that docs/clients.md shows ----------------------------------------------------------------------------


def load_lora(transformer: nn.Module, file: Path, strength: float) -> deft.DeftNetwork:
    """The lines of docs/clients.md."""
    lora, _ = deft.create_network_from_weights(strength, str(file), None, [], transformer, for_inference=True)
    lora.apply_to([], transformer)
    lora.load_weights(str(file))
    return lora.to(transformer.device)


@pytest.mark.parametrize("options", [{}, {"removal": "1", "train_mlp": "true"}, {"fuse_qkv": "true"}, {"para": "true"}],
                         ids=str)  # fmt: skip
def test_loaded_it_answers_as_the_trainers_network_and_taken_out_as_the_base(tmp_path, options):
    model, file = omnigen_transformer(), tmp_path / "cat.safetensors"
    base, before = answer(model), {name: p.clone() for name, p in model.state_dict().items()}
    net = network(model, dim=R, **options)
    trained = answer(model)
    net.save_weights(str(file), torch.float32, None)
    net.remove()
    with torch.no_grad():
        lora = load_lora(model, file, 1.0)
        assert relative_error(answer(model), trained) < 1e-5
        assert relative_error(base, trained) > 1e-3
        lora.set_multiplier(0.0)
        assert torch.equal(answer(model), base)
        lora.remove()
        assert torch.equal(answer(model), base)
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


@pytest.mark.parametrize("order", [0, 1])
def test_several_at_their_strengths_are_the_sum_of_their_deltas(tmp_path, order):
    """They are taken out in any order.

    :param order: which one first
    """
    model = omnigen_transformer()
    base = answer(model)
    wanted: dict[str, Tensor] = {}
    with torch.no_grad():
        for k, strength in enumerate((0.8, -0.5)):
            torch.manual_seed(k)
            for name, delta in trained_file(tmp_path / f"{k}.safetensors").items():
                wanted[name] = wanted.get(name, 0) + strength * delta
        loras = [load_lora(model, tmp_path / f"{k}.safetensors", strength) for k, strength in enumerate((0.8, -0.5))]
        found = answer(model)
        loras[order].remove()
        alone = answer(model)
        loras[1 - order].remove()
        assert torch.equal(answer(model), base)
        other = load_lora(model, tmp_path / f"{1 - order}.safetensors", (0.8, -0.5)[1 - order])
        assert relative_error(answer(model), alone) < 1e-6
        other.remove()
        layers = {m.lora_name: m.org_module for m in loras[0].all_modules}
        for name, delta in wanted.items():
            layers[name].weight += delta
        assert relative_error(found, answer(model)) < 1e-5
        assert relative_error(base, found) > 1e-3


def test_in_bfloat16_as_pipelines_are(tmp_path):
    model, file = omnigen_transformer().to(torch.bfloat16), tmp_path / "cat.safetensors"
    trained_file(file)
    with torch.no_grad():
        base = answer(model)
        lora = load_lora(model, file, 1.0)
        assert answer(model).dtype == torch.bfloat16
        assert not torch.equal(answer(model), base)
        assert set(deltas(lora)) == {m.lora_name for m in lora.all_modules}
        lora.remove()
        assert torch.equal(answer(model), base)


def test_the_lines_of_the_docs_run(tmp_path, monkeypatch):
    """As they stand there, with a pipeline that has the small transformer and answers with it."""
    transformer, drawn = omnigen_transformer(), []

    class Pipeline:
        @classmethod
        def from_pretrained(cls, folder: str, **options) -> Pipeline:
            return cls()

        def to(self, device: str) -> Pipeline:
            self.transformer = transformer
            return self

        def __call__(self, prompt: str) -> SimpleNamespace:
            with torch.no_grad():
                drawn.append(answer(transformer))
            return SimpleNamespace(images=[SimpleNamespace(save=lambda path: None)])

    text = (ROOT / "docs" / "clients.md").read_text(encoding="utf-8")
    lines = re.search(r"^## OmniGen\n[^#]*?\n\n((?:    .*\n)+)", text, re.MULTILINE)
    assert lines is not None
    assert lines[1].count("\n") == 10
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(vars(diffusers), "OmniGenPipeline", Pipeline)
    expected = trained_file(tmp_path / "cat.safetensors")
    transformer = omnigen_transformer()  # that of the file has its network
    base = answer(transformer)
    exec(textwrap.dedent(lines[1]).replace('"cuda"', '"cpu"'), {})
    assert torch.equal(answer(transformer), base)
    for name, delta in expected.items():
        layer, kind = re.search(r"_layers_(\d)_self_attn_(to_\w+?)(?:_0)?$", name).groups()
        found = getattr(transformer.layers[int(layer)].self_attn, kind)
        (found[0] if kind == "to_out" else found).weight += 0.8 * delta
    assert relative_error(drawn[0], answer(transformer)) < 1e-5
