"""convert_deft.py: forms of adapter files, their repair, and DEFTs on other bases."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import diffusers
import peft
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks import convert_deft, deft, deft_architectures, deft_io, deft_rebase, deft_targets
from networks.deft_checkpoint import open_checkpoint
from networks.deft_clients import CLIENTS, Outline, read_by
from networks.deft_inventory import inventory
from tests import client_files, small_flux, small_models
from tests.conftest import deltas, largest_error, loaded, network_of, relative_error

CONVOLUTIONS = {"conv_dim": "2", "conv_alpha": "2"}


@pytest.fixture(scope="session")
def bases(tmp_path_factory) -> list[Path]:
    """Two models of SDXL's architecture."""
    return [small_models.build("sdxl", tmp_path_factory.mktemp(f"base{seed}"), seed) for seed in (0, 1)]


@pytest.fixture(scope="session")
def lora(bases, tmp_path_factory) -> Path:
    """A LoRA of some layers of the first, of mixed ranks, padded, in float32."""
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("lora") / "cat.safetensors"
    network = network_of(loaded(bases[0]), removal="0", **CONVOLUTIONS)
    network.save_weights(str(path), torch.float32, {"ss_output_name": "cat", "ss_network_dim": "4"})
    some = re.compile(r"_layers_[023]_|_unet_(input_blocks_[47]_|middle_block_2|output_blocks_[25]_)")
    tensors = {key: tensor for key, tensor in load_file(path).items() if some.search(key)}
    save_file(tensors, path, metadata_of(path))
    return path


@pytest.fixture(scope="session")
def removing(bases, tmp_path_factory) -> Path:
    """Of removal=1, the formula's own matrices, trained on the first model."""
    return removing_file(bases[0], tmp_path_factory.mktemp("removing") / "cat.safetensors")[1]


@pytest.fixture(scope="session")
def flux(tmp_path_factory) -> Path:
    return small_flux.build(tmp_path_factory.mktemp("flux")).folder


@pytest.fixture(scope="session")
def flux_lora(flux, tmp_path_factory) -> Path:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("flux_lora") / "cat.safetensors"
    network_of(loaded(flux), removal="0").save_weights(str(path), torch.float32, {})
    return path


def convert(*arguments) -> None:
    assert convert_deft.main([str(argument) for argument in arguments]) == 0


def products(path: Path) -> dict[str, Tensor]:
    """Kohya's key name -> delta (m, n), in float64, of a LoRA file, as its formula says."""
    tensors, found = load_file(path), {}
    for key, down in tensors.items():
        name, _, part = key.partition(".")
        if part == "lora_down.weight":
            alpha = float(tensors.get(f"{name}.alpha", down.shape[0]))
            up = tensors[f"{name}.lora_up.weight"].double().flatten(1)
            found[name] = up @ down.double().flatten(1) * (alpha / down.shape[0])
    return found


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(str(path), "pt") as file:
        return file.metadata()


# --- forms ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("to", ["diffusers", "comfy", "peft", "deft"])
@pytest.mark.parametrize("which", ["lora", "flux_lora"])
def test_there_and_back_is_the_same(which, to, tmp_path, request, capsys):
    source = request.getfixturevalue(which)
    there, back = tmp_path / ("there" if to == "peft" else "there.safetensors"), tmp_path / "back.safetensors"
    convert(source, "--save_to", there, "--to", to)
    assert "read back: every layer's change is" in capsys.readouterr().out
    convert(there, "--save_to", back)
    assert largest_error(products(back), products(source)) < (1e-6 if to == "deft" else 1e-12)
    if to in ("diffusers", "comfy") and which == "lora":
        before, after = load_file(source), load_file(back)
        assert before.keys() == after.keys()
        assert all(torch.equal(before[key], after[key]) for key in before)
    history = json.loads(metadata_of(back)["deft_history"])
    assert [(step["from"], step["to"]) for step in history][-1] == (to, "kohya")
    assert metadata_of(back).get("ss_output_name") == metadata_of(source).get("ss_output_name")


def adapted(model: torch.nn.Module) -> dict[str, Tensor]:
    """Path -> delta, of a model with a LoRA of peft's."""
    return {
        path.removeprefix("base_model.model."): layer.get_delta_weight(layer.active_adapters[0]).flatten(1).double()
        for path, layer in model.named_modules()
        if hasattr(layer, "get_delta_weight")
    }


def by_path(model: torch.nn.Module, part: deft_architectures.Part, deltas: dict[str, Tensor]) -> dict[str, Tensor]:
    """Path in Diffusers' model -> its rows of a delta that goes by kohya's key name, as the network has them."""
    found, paths = {}, {layer: path for path, layer in model.named_modules()}
    for target in deft_targets.targets(model, part, True):
        first = target.file_rows[0] if target.file_rows else 0
        if target.file_name in deltas:
            found[paths[target.layer]] = deltas[target.file_name][first : first + target.shape[0]]
    return found


def parts_of(unet: torch.nn.Module) -> dict[str, deft_architectures.Part]:
    architecture, denoiser = deft_architectures.recognise(unet)
    encoders = {f"text_encoder{'_2' if i else ''}": part for i, part in enumerate(architecture.text_encoders)}
    return {"unet": denoiser, **encoders}


def test_peft_loads_its_folders(lora, bases, tmp_path):
    convert(lora, "--save_to", tmp_path / "cat", "--to", "peft")
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(bases[0])
    parts = parts_of(pipeline.unet)
    assert {path.name for path in (tmp_path / "cat").iterdir()} == set(parts)
    for folder, part in parts.items():
        model = getattr(pipeline, folder)
        expected = by_path(model, part, products(lora))
        found = adapted(peft.PeftModel.from_pretrained(model, tmp_path / "cat" / folder))
        assert largest_error(found, expected) < 1e-5


@pytest.mark.parametrize("to", ["kohya", "diffusers", "repair"])
def test_diffusers_loads_every_layer(lora, bases, tmp_path, to):
    """A file of another form, and one that nothing is wrong with any more."""
    source = broken(lora, tmp_path / "broken.safetensors") if to == "repair" else lora
    convert(source, "--save_to", tmp_path / "x.safetensors", *(["--repair"] if to == "repair" else ["--to", to]))
    pipeline = diffusers.StableDiffusionXLPipeline.from_pretrained(bases[0])
    deltas = products(lora if to != "repair" else tmp_path / "x.safetensors")
    parts = parts_of(pipeline.unet)
    expected = {name: by_path(getattr(pipeline, name), part, deltas) for name, part in parts.items()}
    pipeline.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
    for name in parts:
        assert largest_error(adapted(getattr(pipeline, name)), expected[name]) < 1e-5


def test_a_network_takes_over_what_is_written_as_deft(lora, bases, tmp_path):
    convert(lora, "--save_to", tmp_path / "x.safetensors", "--to", "deft")
    model = loaded(bases[0])
    network, tensors = deft.create_network_from_weights(
        1.0, str(tmp_path / "x.safetensors"), None, model.text_encoders, model.denoiser
    )
    network.apply_to(model.text_encoders, model.denoiser)
    network.load_weights(str(tmp_path / "x.safetensors"))
    assert any(key.endswith(".deft_E0") for key in tensors)
    assert largest_error(deltas(network), {name: delta.float() for name, delta in products(lora).items()}) < 1e-5


@pytest.mark.parametrize("to", ["diffusers", "peft"])
def test_flux_in_diffusers_and_peft(flux, flux_lora, tmp_path, to):
    """What kohya's form has fused goes to each of its layers."""
    output = tmp_path / ("x" if to == "peft" else "x.safetensors")
    convert(flux_lora, "--save_to", output, "--to", to)
    pipeline = diffusers.FluxPipeline.from_pretrained(flux)
    expected = by_path(pipeline.transformer, deft_architectures.recognise(pipeline.transformer)[1], products(flux_lora))
    if to == "peft":
        model = peft.PeftModel.from_pretrained(pipeline.transformer, output / "transformer")
    else:
        pipeline.load_lora_weights(str(tmp_path), weight_name="x.safetensors")
        model = pipeline.transformer
    assert largest_error(adapted(model), expected) < 1e-5


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_loses_what_its_rounding_loses(lora, tmp_path, precision):
    convert(lora, "--save_to", tmp_path / "x.safetensors", "--save_precision", precision)
    tensors = load_file(tmp_path / "x.safetensors")
    dtype = {"fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    assert {t.dtype for key, t in tensors.items() if "alpha" not in key} == {dtype}
    assert 0 < largest_error(products(tmp_path / "x.safetensors"), products(lora)) < 4 * torch.finfo(dtype).eps


def test_a_full_difference_needs_a_rank_and_tells_its_error(tmp_path, capsys):
    deltas = {
        f"lora_unet_mid_block_attentions_0_transformer_blocks_0_attn{i}_to_q": torch.randn(24, 16) for i in (1, 2)
    }
    save_file({f"{name}.diff": delta for name, delta in deltas.items()}, tmp_path / "full.safetensors")
    arguments = [str(tmp_path / "full.safetensors"), "--save_to", str(tmp_path / "x.safetensors")]
    assert convert_deft.main(arguments) == 2
    assert "say how much to keep: --rank N" in capsys.readouterr().err
    convert(*arguments, "--rank", 5, "--verbose")
    told, found = capsys.readouterr().out, products(tmp_path / "x.safetensors")
    stored = json.loads(metadata_of(tmp_path / "x.safetensors")["deft_history"])[-1]["errors"]
    for name, delta in deltas.items():
        S = torch.linalg.svdvals(delta.double())
        best = float(S[5:].norm() / S.norm())
        assert relative_error(found[name], delta.double()) == pytest.approx(best, rel=1e-3)
        assert stored[name] == pytest.approx(best, rel=1e-3)
        assert f"{name}: relative error {best:.1e}"[:-4] in told
    convert(*arguments[:2], tmp_path / "y.safetensors", "--energy", 0.9)
    errors = [
        relative_error(products(tmp_path / "y.safetensors")[name], delta.double()) for name, delta in deltas.items()
    ]
    assert max(errors) <= 0.1**0.5
    assert "largest" in told or "at most" in told


def test_dora_is_the_weights_that_peft_merges(bases, tmp_path, capsys):
    """With the base model; without it, it is refused in words."""
    unet = diffusers.UNet2DConditionModel.from_pretrained(bases[0] / "unet")
    before = {path: layer.weight.detach().clone() for path, layer in unet.named_modules() if path.endswith("to_q")}
    config = peft.LoraConfig(r=3, lora_alpha=6, use_dora=True, target_modules=["to_q"], init_lora_weights=False)
    model = peft.get_peft_model(unet, config)
    model.save_pretrained(tmp_path / "unet")
    after = dict(model.merge_and_unload().named_modules())
    arguments = [str(tmp_path / "unet"), "--save_to", str(tmp_path / "x.safetensors")]
    assert convert_deft.main(arguments) == 2
    assert "DoRA, whose change depends on the base model's weight; give it with --base MODEL" in capsys.readouterr().err
    convert(*arguments, "--base", bases[0], "--energy", 1)
    found = by_path(after[""], deft_architectures.recognise(unet)[1], products(tmp_path / "x.safetensors"))
    assert largest_error(found, {path: (after[path].weight - W).flatten(1) for path, W in before.items()}) < 1e-5


# --- repair -----------------------------------------------------------------------------------------------------------


DIFFUSERS_NAMES = (("down_blocks_1_attentions_0", "input_blocks_4_1"), ("mid_block_resnets_1", "middle_block_2"),
                   ("conv1", "in_layers_2"), ("conv2", "out_layers_3"), ("time_emb_proj", "emb_layers_1"))  # fmt: skip


def broken(source: Path, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """The file as careless programs write it: every fault at once, and every delta the same but those cut off."""
    tensors, bad = load_file(source), {}
    for i, name in enumerate(sorted({key.partition(".")[0] for key in tensors})):
        up, down = (tensors[f"{name}.lora_{way}.weight"].to(dtype) for way in ("up", "down"))
        if name.endswith("layers_3_self_attn_k_proj") and "te2" in name:
            continue
        if i % 3 == 0:
            up, down = up[:, :2], down[:2]
        if name.endswith("skip_connection"):
            up, down = up.flatten(1), down.flatten(1)
        elif name.endswith("to_k"):
            up, down = up[..., None, None], down[..., None, None]
        new = name.replace("lora_te1_text_model_", "lora_te1_")
        for theirs, ours in DIFFUSERS_NAMES if "input_blocks_4_1" in name or "middle_block_2" in name else ():
            new = new.replace(ours, theirs)
        bad[f"{new}.lora_up.weight"], bad[f"{new}.lora_down.weight"] = up.contiguous(), down.contiguous()
        if i % 5:
            bad[f"{new}.alpha"] = torch.tensor(len(down) * (0.5 if i % 2 else 0.3))
    save_file(bad, path, {"ss_base_model_version": "sd_v1"})
    return path


def original_name(name: str) -> str:
    """Of a name that `broken` has made."""
    for theirs, ours in DIFFUSERS_NAMES:
        name = name.replace(theirs, ours)
    return name.replace("lora_te1_encoder", "lora_te1_text_model_encoder")


def test_a_repaired_file_has_every_delta_and_no_fault(lora, tmp_path, capsys):
    bad = broken(lora, tmp_path / "bad.safetensors")
    convert(bad, "--save_to", tmp_path / "good.safetensors", "--repair")
    told, tensors = capsys.readouterr().out, load_file(tmp_path / "good.safetensors")
    found = products(tmp_path / "good.safetensors")
    expected = {original_name(name): delta for name, delta in products(bad).items()}
    added = found.keys() - expected.keys()
    assert added == {"lora_te2_text_model_encoder_layers_3_self_attn_k_proj"}
    assert not any(found[name].any() for name in added)
    assert largest_error({name: found[name] for name in expected}, expected) < 1e-6
    assert found.keys() == products(lora).keys()
    for key, tensor in load_file(lora).items():  # of the network's own file
        assert tensors[key].shape == tensor.shape, key
    assert {float(t) for key, t in tensors.items() if key.endswith("alpha")} == {4.0}
    assert metadata_of(tmp_path / "good.safetensors")["ss_base_model_version"] == "sdxl_base_v1-0"
    assert metadata_of(tmp_path / "good.safetensors")["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    for said in (
        "text_model_ put into",
        "have SGM's now",
        "ranks: 2 to 4",
        "had none",
        "another than their rank",
        "four dimensions again",
        "two dimensions again",
        "CLIP-G: 1 zero layers",
        "change nothing",
    ):
        assert said in told, said


@pytest.mark.parametrize(("width", "dims", "version"), [(768, 4, "sd_v1"), (1024, 2, "sd_v2"), (640, 2, None)])
def test_projections_are_convolutions_in_stable_diffusion_1_alone(tmp_path, width, dims, version):
    """Which it is shows in the width of the text; where it does not, the shape stays."""
    block = "lora_unet_down_blocks_0_attentions_0_"
    shapes = {f"{block}proj_in": (8, 8), f"{block}transformer_blocks_0_attn2_to_k": (8, width)}
    tensors = {}
    for name, (m, n) in shapes.items():
        tensors |= {f"{name}.lora_up.weight": torch.randn(m, 2), f"{name}.lora_down.weight": torch.randn(2, n)}
    save_file(tensors, tmp_path / "bad.safetensors")
    convert(tmp_path / "bad.safetensors", "--save_to", tmp_path / "good.safetensors", "--repair")
    found = load_file(tmp_path / "good.safetensors")
    assert found[f"{block}proj_in.lora_down.weight"].dim() == dims
    assert found[f"{block}transformer_blocks_0_attn2_to_k.lora_down.weight"].dim() == 2
    assert metadata_of(tmp_path / "good.safetensors").get("ss_base_model_version") == version
    assert largest_error(products(tmp_path / "good.safetensors"), products(tmp_path / "bad.safetensors")) < 1e-6


@pytest.mark.parametrize("name", ["sd1", "sdxl", "flux"])
def test_a_text_encoder_without_outputs_is_repaired_for_diffusers(name, tmp_path):
    broken = client_files.without(client_files.lora(name, client_files.few), "self_attn_out")
    save_file(broken, tmp_path / "broken.safetensors")
    paths = [str(tmp_path / "broken.safetensors"), "--save_to", str(tmp_path / "a.safetensors")]
    assert convert_deft.main([*paths, "--repair"]) == 0
    (client,) = (client for client in CLIENTS if client.name == "diffusers")
    before, after = broken, load_file(tmp_path / "a.safetensors")
    said = [read_by(client, Outline.of(tensors, {}), inventory(name)) for tensors in (before, after)]
    assert any("no out_proj" in line for line in said[0].wrong)
    assert not said[1].wrong
    assert said[1].matched == set(after)
    assert all(torch.equal(after[key], tensor) for key, tensor in before.items())


def test_repair_changes_nothing_where_nothing_is_wrong(lora, tmp_path, capsys):
    convert(lora, "--save_to", tmp_path / "x.safetensors", "--repair")
    assert "nothing to mend" in capsys.readouterr().out
    before, after = load_file(lora), load_file(tmp_path / "x.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


def test_scales_that_are_powers_of_two_cost_half_precision_nothing(lora, tmp_path):
    tensors = {key: t.half() if "alpha" not in key else t / 2 for key, t in load_file(lora).items()}
    save_file(tensors, tmp_path / "half.safetensors")
    convert(tmp_path / "half.safetensors", "--save_to", tmp_path / "x.safetensors", "--repair")
    # 1e-4 if it were rounded once more
    assert largest_error(products(tmp_path / "x.safetensors"), products(tmp_path / "half.safetensors")) < 1e-6


def test_nan_is_refused_by_the_layers_name(lora, tmp_path, capsys):
    tensors = load_file(lora)
    name = "lora_unet_middle_block_2_in_layers_2"
    tensors[f"{name}.lora_up.weight"][0, 0] = float("nan")
    save_file(tensors, tmp_path / "bad.safetensors")
    assert (
        convert_deft.main([str(tmp_path / "bad.safetensors"), "--save_to", str(tmp_path / "x.safetensors"), "--repair"])
        == 2
    )
    assert f"{name} has 1 values that are NaN or infinite" in capsys.readouterr().err
    assert not (tmp_path / "x.safetensors").exists()


# --- another base -----------------------------------------------------------------------------------------------------


def removing_file(folder, path, **options):
    network = network_of(loaded(folder), save_format="deft", **options)
    network.save_weights(str(path), None, {})
    return network, path


@pytest.mark.parametrize(
    "options",
    [CONVOLUTIONS | {"gate": "true"}, {"basis": "relu"}, {"init": "paper"}, {"para": "true"}, {"removal": "0.5"}],
)
def test_on_its_own_base_it_is_what_was_trained(bases, tmp_path, options):
    network, path = removing_file(bases[0], tmp_path / "cat.safetensors", **options)
    adapter = deft_io.read_adapter(path)
    assert deft_rebase.depends_on_base(adapter)
    with open_checkpoint(bases[0]) as base:
        found = deft_rebase.rebased(adapter, base)
        assert deft_rebase.trained_on(adapter, deft_io.read_metadata(path), base) is True
    assert largest_error({name: change.delta() for name, change in found.items()}, deltas(network)) < 1e-5


@pytest.mark.parametrize(("x", "y"), [(1, 1), (0.4, 1), (1, -0.7), (0, 0)])
def test_on_another_base_it_is_the_formula_in_float64(bases, removing, tmp_path, x, y, capsys):
    convert(removing, "--save_to", tmp_path / "x.safetensors", "--base", bases[1], "--removal", x, "--injection", y)
    assert "another model than the one that it was trained on" in capsys.readouterr().out
    found, adapter = products(tmp_path / "x.safetensors"), deft_io.read_adapter(removing)
    with open_checkpoint(bases[1]) as base:
        weights = {name: base.weight(name).flatten(1).double() for name in found}
    for name, layer in adapter.layers.items():
        Q, W = torch.linalg.qr(layer.P.double())[0], weights[name]
        Q = Q * torch.sign((Q * layer.P.double()).sum(0))  # QR's sign is free, E0's is not
        expected = -x * Q @ (Q - layer.E0.double()).T @ W + y * layer.scale * Q @ layer.R.double()
        assert (found[name] - expected).norm() < 1e-6 * W.norm()


def test_parts_of_a_fused_weight_come_to_the_whole(flux, tmp_path):
    """Diffusers' model has queries, keys and values apart, and so has the file of the formula's matrices."""
    network, path = removing_file(flux, tmp_path / "cat.safetensors")
    assert any("-" in name for name in deft_io.read_adapter(path).layers)
    network.config = network.config.__class__(**{**network.config.__dict__, "save_format": "lora"})
    network.save_weights(str(tmp_path / "plain.safetensors"), torch.float32, {})
    convert(path, "--save_to", tmp_path / "x.safetensors", "--base", flux)
    assert largest_error(products(tmp_path / "x.safetensors"), products(tmp_path / "plain.safetensors")) < 1e-5


def test_what_takes_nothing_out_does_not_depend_on_the_base(lora, bases, tmp_path, capsys):
    convert(lora, "--save_to", tmp_path / "deft.safetensors", "--to", "deft")
    for base in bases:
        convert(tmp_path / "deft.safetensors", "--save_to", tmp_path / f"{base.name}.safetensors", "--base", base)
        assert "removal=0, it changes every base in the same way" in capsys.readouterr().out
    first, second = (products(tmp_path / f"{base.name}.safetensors") for base in bases)
    assert largest_error(first, second) == 0
    for source in (lora, tmp_path / "deft.safetensors"):
        arguments = [
            str(source),
            "--save_to",
            str(tmp_path / "y.safetensors"),
            "--base",
            str(bases[1]),
            "--removal",
            "0.5",
        ]
        assert convert_deft.main(arguments) == 2
        assert "no DEFT of removal=1, and takes nothing out" in capsys.readouterr().err
    convert(lora, "--save_to", tmp_path / "w.safetensors", "--base", bases[1])
    assert "made no difference" in capsys.readouterr().out
    convert(lora, "--save_to", tmp_path / "z.safetensors", "--to", "kohya", "--injection", 0.25)
    quarter = {name: delta / 4 for name, delta in products(lora).items()}
    assert largest_error(products(tmp_path / "z.safetensors"), quarter) < 1e-12


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        ([], "--save_to: give the file to write"),
        (["--to", "peft"], "--save_to: give the file to write"),
        (["--to", "kohya", "--save_to", "LORA"], "never overwritten"),
        (["--repair", "--to", "peft", "--save_to", "NEW"], "--repair: writes kohya's form"),
        (["--to", "peft", "--save_to", "FULL"], "not there yet or empty"),
        (["--to", "peft", "--save_to", "NEW", "--sidecars"], "a peft folder has none"),
        (["--set", "trigger=x", "--rank", "4", "--save_to", "x.safetensors"], "--rank: has no effect"),
        (["--to", "kohya", "--rank", "0", "--save_to", "x.safetensors"], "--rank 0: give 1 or more"),
        (["--to", "kohya", "--energy", "1.5", "--save_to", "x.safetensors"], "--energy 1.5"),
        (["--base", "NEW", "--save_to", "x.safetensors"], "no such file or folder"),
        (["--to", "kohya", "--save_to", "x.pt"], "ends in .safetensors"),
    ],
)
def test_mistakes_are_one_line_and_nothing_is_written(lora, tmp_path, monkeypatch, capsys, arguments, told):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").write_text("")
    shutil.copy(lora, tmp_path / "cat.safetensors")
    names = {"LORA": "cat.safetensors", "NEW": "new", "FULL": "full"}
    before = sorted(tmp_path.rglob("*"))
    assert convert_deft.main(["cat.safetensors", *(names.get(argument, argument) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert told in error
    assert error.count("\n") == 1
    assert sorted(tmp_path.rglob("*")) == before


def test_metadata_alone_moves_no_byte_and_sidecars_stand_beside(lora, tmp_path, capsys):
    out = tmp_path / "shared.safetensors"
    convert(lora, "--save_to", out, "--set", "trigger=sks cat", "--unset", "ss_network_dim", "--sidecars")
    tensors = [path.read_bytes()[8 + int.from_bytes(path.read_bytes()[:8], "little") :] for path in (lora, out)]
    assert tensors[0] == tensors[1]
    assert metadata_of(out)["sshs_model_hash"] == metadata_of(lora)["sshs_model_hash"]
    assert metadata_of(out)["modelspec.trigger_phrase"] == "sks cat"
    assert "ss_network_dim" not in metadata_of(out)
    assert json.loads((tmp_path / "shared.json").read_text())["activation text"] == "sks cat"
    convert(lora, "--save_to", tmp_path / "d.safetensors", "--to", "diffusers", "--set", "title=Cat")
    assert metadata_of(tmp_path / "d.safetensors")["modelspec.title"] == "Cat"


@pytest.mark.parametrize("to", ["diffusers", "comfy"])
def test_a_few_layers_of_sdxl_stay_those_of_sdxl(tmp_path, to):
    """Whose names in other forms Stable Diffusion 1.x has too: the file says which it is."""
    name = "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"
    tensors = {f"{name}.lora_up.weight": torch.randn(64, 2), f"{name}.lora_down.weight": torch.randn(2, 64)}
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", "--to", to, "--save_to", tmp_path / "b.safetensors")
    convert(tmp_path / "b.safetensors", "--save_to", tmp_path / "c.safetensors")
    found = load_file(tmp_path / "c.safetensors")
    expected = tensors[f"{name}.lora_up.weight"] @ tensors[f"{name}.lora_down.weight"]
    assert torch.allclose(found[f"{name}.lora_up.weight"] @ found[f"{name}.lora_down.weight"], expected, atol=1e-6)


@pytest.mark.parametrize(("width", "added"), [(1024, {"k", "out"}), (768, {"out"})])
def test_openclips_attention_of_stable_diffusion_2_is_whole(tmp_path, capsys, width, added):
    """A1111 takes OpenCLIP-H's queries, keys, values and outputs together; CLIP-L's of 1.x one by one.

    diffusers wants one out_proj in either.
    """
    stem = "lora_te_text_model_encoder_layers_3_self_attn"
    tensors = {}
    for part in "qv":
        tensors[f"{stem}_{part}_proj.lora_up.weight"] = torch.randn(width, 2)
        tensors[f"{stem}_{part}_proj.lora_down.weight"] = torch.randn(2, width)
        tensors[f"{stem}_{part}_proj.alpha"] = torch.tensor(2.0)
    save_file(tensors, tmp_path / "a.safetensors")
    convert(tmp_path / "a.safetensors", "--save_to", tmp_path / "b.safetensors", "--repair")
    before, after = products(tmp_path / "a.safetensors"), products(tmp_path / "b.safetensors")
    assert after.keys() - before.keys() == {f"{stem}_{part}_proj" for part in added}
    assert not any(after[name].any() for name in after.keys() - before.keys())
    assert largest_error({name: after[name] for name in before}, before) < 1e-6
    assert ("q, k, v and out are all there" in capsys.readouterr().out) == (width == 1024)
