"""extract_deft.py: against the dense difference of two checkpoints in float64, which no code under test has read."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from networks import deft_architectures, deft_factors, deft_io, deft_targets, extract_deft
from tests.conftest import relative_error
from tests.hashes import webui_hashes

# A checkpoint of Stable Diffusion 1.x as far as it matters here: the original's path, Diffusers', and the shape
_BLOCK, _DIFFUSERS = "input_blocks.1.1", "down_blocks.0.attentions.0"
LAYERS = {
    f"{_BLOCK}.transformer_blocks.0.attn1.to_q": (f"{_DIFFUSERS}.transformer_blocks.0.attn1.to_q", (96, 80)),
    f"{_BLOCK}.transformer_blocks.0.attn2.to_k": (f"{_DIFFUSERS}.transformer_blocks.0.attn2.to_k", (96, 768)),
    f"{_BLOCK}.transformer_blocks.0.ff.net.2": (f"{_DIFFUSERS}.transformer_blocks.0.ff.net.2", (24, 40)),
    f"{_BLOCK}.proj_in": (f"{_DIFFUSERS}.proj_in", (80, 96, 1, 1)),
}
CONVS = {
    "input_blocks.1.0.in_layers.2": ("down_blocks.0.resnets.0.conv1", (72, 16, 3, 3)),
    "input_blocks.1.0.emb_layers.1": ("down_blocks.0.resnets.0.time_emb_proj", (72, 100)),
}
TEXT = "text_model.encoder.layers.0.mlp.fc1"
OTHERS = {f"{_BLOCK}.norm.weight": (96,), "input_blocks.0.0.weight": (32, 4, 3, 3), "out.0.bias": (32,)}
UNET = "model.diffusion_model."


def kohya(path: str) -> str:
    return "lora_unet_" + path.replace(".", "_")


NAMES = {kohya(path): f"{UNET}{ldm}.weight" for ldm, (path, _) in (LAYERS | CONVS).items()}
NAMES[f"lora_te_{TEXT}".replace(".", "_")] = f"cond_stage_model.transformer.{TEXT}.weight"
PLAIN = [kohya(path) for path, _ in LAYERS.values()] + ["lora_te_text_model_encoder_layers_0_mlp_fc1"]


def weights() -> dict[str, Tensor]:
    shapes = {f"{UNET}{ldm}.weight": shape for ldm, (_, shape) in (LAYERS | CONVS).items()}
    shapes |= {f"{UNET}{key}": shape for key, shape in OTHERS.items()}
    shapes |= {f"cond_stage_model.transformer.{TEXT}.weight": (64, 90)}
    return {key: torch.randn(shape) * 0.05 for key, shape in shapes.items()}


def change(shape: tuple[int, ...], rank: int, decay: float) -> Tensor:
    """Singular values that fall by a factor."""
    m, n = shape[0], torch.Size(shape[1:]).numel()
    rank = min(rank, m, n)
    U, V = (torch.linalg.qr(torch.randn(size, rank).double())[0] for size in (m, n))
    return ((U * decay ** torch.arange(rank)) @ V.T).reshape(shape).float()


def tuned_of(org: dict[str, Tensor], rank: int = 1000, decay: float = 0.9, every: bool = False) -> dict[str, Tensor]:
    keys = org if every else NAMES.values()
    return org | {key: org[key] + change(tuple(org[key].shape), rank, decay) for key in keys}


class Pair:
    """Two checkpoints in files, and what came of them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.org = folder, weights()
        self.tuned = tuned_of(self.org)

    def write(self, dtype: torch.dtype = torch.float32) -> None:
        for name in ("org", "tuned"):
            save_file({k: v.to(dtype) for k, v in getattr(self, name).items()}, self.folder / f"{name}.safetensors")

    def run(self, *options: object, **paths: Path) -> int:
        org, tuned = (paths.get(name, self.folder / f"{name}.safetensors") for name in ("org", "tuned"))
        files = ["--model_org", org, "--model_tuned", tuned, "--save_to", self.output]
        return extract_deft.main([str(word) for word in [*files, *options]])

    @property
    def output(self) -> Path:
        return self.folder / "lora.safetensors"

    def difference(self, name: str) -> Tensor:
        """(m, n), float64."""
        key = NAMES[name]
        return (self.tuned[key].double() - self.org[key].double()).flatten(1)

    def best(self, name: str, rank: int) -> float:
        """The least error that this rank can have."""
        S = torch.linalg.svdvals(self.difference(name))
        return float(S[rank:].norm() / S.norm())

    @property
    def metadata(self) -> dict[str, str]:
        with safe_open(str(self.output), framework="pt") as file:
            return file.metadata()

    @property
    def done(self) -> dict:
        return json.loads(self.metadata["deft_history"])[-1]


@pytest.fixture
def pair(tmp_path) -> Pair:
    return Pair(tmp_path)


def deltas(path: Path) -> dict[str, Tensor]:
    with safe_open(str(path), framework="pt") as file:
        tensors = {key: file.get_tensor(key).double() for key in file.keys()}
    found = {}
    for name in (key.removesuffix(".alpha") for key in tensors if key.endswith(".alpha")):
        up, down = (tensors[f"{name}.lora_{side}.weight"].flatten(1) for side in ("up", "down"))
        found[name] = up @ down * tensors[f"{name}.alpha"] / len(down)
    return found


def test_every_layer_is_near_the_best_approximation_and_its_error_is_the_one_that_is_told(pair, capsys):
    pair.write()
    assert pair.run("--dim", 4, "--conv_dim", 3, "--verbose", "--save_precision", "float") == 0
    printed = capsys.readouterr().out
    found = deltas(pair.output)
    assert set(found) == set(NAMES)
    for name, delta in found.items():
        rank = 3 if name.endswith("conv1") else 4
        error = relative_error(delta, pair.difference(name))
        assert error < 1.01 * pair.best(name, rank)
        assert pair.done["errors"][name] == pytest.approx(error, rel=5e-3)
        assert f"{name}: rank {rank}, relative error {error:.3g}\n" in printed


def test_differences_of_low_rank_are_found_exactly(pair):
    pair.tuned = tuned_of(pair.org, rank=4)
    pair.write()
    assert pair.run("--dim", 4, "--conv_dim", 4) == 0
    for name, delta in deltas(pair.output).items():
        assert relative_error(delta, pair.difference(name)) < 1e-5


def test_layers_are_those_of_a_lora_without_further_options(pair):
    pair.write()
    assert pair.run("--dim", 4) == 0
    assert set(deltas(pair.output)) == set(PLAIN)
    assert pair.run("--dim", 4, "--no_text_encoder") == 0
    assert set(deltas(pair.output)) == set(PLAIN[:-1])


@pytest.mark.parametrize("kind", ["sd15", "sdxl"])
@pytest.mark.parametrize("convolutions", [False, True])
def test_what_a_lora_has_is_seen_by_names_as_by_modules(kind, convolutions):
    from diffusers import UNet2DConditionModel

    from tests.small_models import config_of

    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(config_of(kind, "unet"))
    architecture, part = deft_architectures.recognise(unet)
    names = [target.name for target in deft_targets.targets(unet, part, with_convolutions=True)]
    expected = [target.name for target in deft_targets.targets(unet, part, with_convolutions=convolutions)]
    assert [name for name in names if architecture.adapts(name, convolutions)] == expected
    shapes = {target.name: target.layer.weight.shape for target in deft_targets.targets(unet, part, False)}
    assert deft_architectures.base_metadata_of(architecture.name, shapes) == deft_architectures.base_metadata(
        unet, part
    )


def test_the_layouts_of_the_two_may_differ(pair):
    """An original file against a folder of Diffusers."""
    pair.write()
    unet = pair.folder / "diffusers" / "unet"
    unet.mkdir(parents=True)
    tensors = {f"{path}.weight": pair.tuned[f"{UNET}{ldm}.weight"] for ldm, (path, _) in (LAYERS | CONVS).items()}
    save_file(tensors, unet / "diffusion_pytorch_model.safetensors")
    assert pair.run("--dim", 4) == 0
    same = deltas(pair.output)
    assert pair.run("--dim", 4, tuned=unet) == 0
    found = deltas(pair.output)
    assert set(found) == set(PLAIN[:-1])  # there is no text encoder in it
    for name, delta in found.items():
        assert relative_error(delta, same[name]) < 1e-6


def test_energy_takes_as_few_directions_as_it_can(pair):
    pair.tuned = tuned_of(pair.org, decay=0.8)
    pair.write()
    assert pair.run("--energy", 0.9, "--no_pad") == 0
    known = json.loads(pair.metadata[deft_io.LAYERS_KEY])
    for name, delta in deltas(pair.output).items():
        S = torch.linalg.svdvals(pair.difference(name)).square()
        fewest = int((S.cumsum(0) < 0.9 * S.sum()).sum()) + 1
        assert known[name][0] == fewest
        assert relative_error(delta, pair.difference(name)) < 0.1**0.5
    assert pair.run("--energy", 0.9, "--dim", 3) == 0
    assert pair.metadata["ss_network_dim"] == "3"


def test_layers_without_a_change_are_left_out_and_rounding_is_no_change(pair, capsys):
    still = PLAIN[0]
    pair.tuned[NAMES[still]] = pair.org[NAMES[still]]
    pair.write()
    half = pair.folder / "half.safetensors"
    save_file({key: value.half() for key, value in pair.tuned.items()}, half)
    for tuned in (pair.folder / "tuned.safetensors", half):
        assert pair.run("--dim", 4, tuned=tuned) == 0
        assert set(deltas(pair.output)) == set(PLAIN) - {still}
        assert f"without any change: 1 layers, {still} for one" in capsys.readouterr().out


def test_what_a_lora_cannot_express_is_told_with_its_share(pair, capsys, monkeypatch):
    monkeypatch.setattr(extract_deft, "CHUNK", 40)  # numbers compared at once
    pair.tuned = tuned_of(pair.org, every=True)
    pair.write()
    assert pair.run("--dim", 4) == 0
    printed = capsys.readouterr().out
    squares = {key: float((pair.tuned[key].double() - pair.org[key].double()).norm() ** 2) for key in pair.org}
    whole = sum(squares.values())

    def share(*keys: str) -> str:
        return f"{len(keys)} tensors, {sum(squares[key] for key in keys) / whole:.2%} of the squared difference"

    assert f"{share(f'{UNET}{_BLOCK}.norm.weight', f'{UNET}out.0.bias')}: norms, biases and embeddings" in printed
    assert f"{share(f'{UNET}input_blocks.0.0.weight')}: inputs and outputs of the model" in printed
    assert share(*(f"{UNET}{ldm}.weight" for ldm in CONVS)) in printed
    assert "--conv_dim" in printed
    assert len(pair.done["left_out"]) == 3
    assert sum(pair.done["left_out"].values()) == pytest.approx(
        1 - sum(squares[NAMES[n]] for n in PLAIN) / whole, rel=1e-2
    )


def test_uis_know_what_the_file_is_for(pair):
    pair.write(torch.float16)
    assert pair.run("--dim", 4, "--conv_dim", 2) == 0
    found = pair.metadata
    assert found["ss_base_model_version"] == "sd_v1"
    assert found["modelspec.architecture"] == "stable-diffusion-v1/lora"
    assert found["ss_network_dim"] == found["ss_network_alpha"] == "4"
    assert json.loads(found["ss_network_args"]) == {"conv_dim": "2", "conv_alpha": "2"}
    assert pair.done["from"] == ["org.safetensors", "tuned.safetensors"]
    tensors, metadata = deft_io.read_tensors(pair.output)
    assert {k: v for k, v in found.items() if k.startswith("sshs_")} == webui_hashes(tensors, metadata)
    assert {tensor.dtype for key, tensor in tensors.items() if "lora" in key and "alpha" not in key} == {torch.float16}
    assert len({tensor.shape[0] for key, tensor in tensors.items() if key.endswith("lora_down.weight")}) == 1


def one_line(pair: Pair, capsys, *options: object, **paths: Path) -> str:
    """The error of a run that has to be refused, with nothing written."""
    before = {path.name: path.read_bytes() for path in pair.folder.iterdir() if path.is_file()}
    try:
        code = pair.run(*options, **paths)
    except SystemExit as stopped:
        code = stopped.code  # type: ignore[assignment]
    error = capsys.readouterr().err
    assert code == 2
    assert error.count("\n") == 1
    assert {path.name: path.read_bytes() for path in pair.folder.iterdir() if path.is_file()} == before
    return error


@pytest.mark.parametrize("broken", ["org", "tuned"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_no_numbers_are_refused(pair, capsys, broken, value):
    getattr(pair, broken)[NAMES[PLAIN[1]]] = torch.full((96, 768), value)
    pair.write()
    error = one_line(pair, capsys, "--dim", 4)
    assert f"{broken}.safetensors: {PLAIN[1]}" in error
    getattr(pair, broken)[NAMES[PLAIN[1]]] = torch.zeros(96, 768)
    getattr(pair, broken)[f"{UNET}out.0.bias"][0] = value
    pair.write()
    assert "out.0.bias has non-finite values" in one_line(pair, capsys, "--dim", 4)


def test_two_that_are_the_same_give_nothing(pair, capsys):
    pair.tuned = dict(pair.org)
    pair.write()
    assert "nothing differs" in one_line(pair, capsys, "--dim", 4)


def test_other_models_are_refused(pair, capsys):
    pair.write()
    other = pair.folder / "other.safetensors"
    save_file(
        {key: value[:, :64].clone() if key.endswith("to_k.weight") else value for key, value in pair.org.items()}, other
    )
    error = one_line(pair, capsys, "--dim", 4, org=other)
    assert f"{PLAIN[1]} is 96 x 768" in error
    assert "96 x 64" in error
    flux = {
        "double_blocks.0.img_attn.qkv.weight": torch.zeros(6, 2),
        "single_blocks.0.linear1.weight": torch.zeros(6, 2),
    }
    save_file(flux, other)
    assert "FLUX.1" in one_line(pair, capsys, "--dim", 4, org=other)
    save_file({"a": torch.zeros(2)}, other)
    assert "other.safetensors" in one_line(pair, capsys, "--dim", 4, org=other)
    assert "missing.safetensors" in one_line(pair, capsys, "--dim", 4, org=pair.folder / "missing.safetensors")


MISTAKES = {
    "": "--dim",
    "--dim 0": "--dim 0",
    "--dim 4 --conv_dim 0": "--conv_dim 0",
    "--energy 1.5": "--energy 1.5",
    "--energy nan": "--energy nan",
    "--dim 4 --adapter x.safetensors": "--model_tuned",
    "--dim 4 --save_to x.pt": "--save_to x.pt",
    "--dim 4 --device toaster": "--device toaster",
    "--dim four": "--dim",
}


@pytest.mark.parametrize(("options", "word"), MISTAKES.items())
def test_mistakes_are_one_line(pair, capsys, options, word):
    pair.write()
    assert word in one_line(pair, capsys, *options.split())


# --- from adapters of other kinds: a file by LyCORIS' own code, and what each of its layers does ----------------------

FOREIGN = Path(__file__).parent / "foreign"


@pytest.fixture
def lycoris(tmp_path) -> tuple[list[str], dict[str, Tensor]]:
    """A command without its options, and key name -> the change that LyCORIS makes; the base is there too."""
    expected = load_file(FOREIGN / "lycoris.expected.safetensors")
    changes = {key.removesuffix(".delta"): value for key, value in expected.items() if key.endswith(".delta")}
    base = {"down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.weight": torch.zeros(4, 4)}
    for name, delta in changes.items():
        kind, number, layer = re.fullmatch(r"lora_unet_down_blocks_0_(\w+?)_(\d+)_(\w+)", name).groups()
        W = expected.get(f"base.{delta.shape[1]}", torch.zeros_like(delta))  # some kinds depend on no base
        kernel = (W.shape[1] // 9, 3, 3) if layer == "conv1" and W.shape[1] == 18 else (W.shape[1], 1, 1)
        base[f"down_blocks.0.{kind}.{number}.{layer}.weight"] = W.reshape(-1, *kernel).clone()
    (tmp_path / "unet").mkdir()
    save_file(base, tmp_path / "unet" / "diffusion_pytorch_model.safetensors")
    command = ["--adapter", str(FOREIGN / "lycoris.safetensors"), "--save_to", str(tmp_path / "lora.safetensors")]
    return command, changes


def test_adapters_of_every_kind_become_loras(lycoris, tmp_path):
    command, changes = lycoris
    command += ["--model_org", str(tmp_path / "unet")]
    assert extract_deft.main([*command, "--dim", "36", "--save_precision", "float"]) == 0
    found = deltas(tmp_path / "lora.safetensors")
    assert set(found) == {name for name, delta in changes.items() if delta.any()}
    for name, delta in found.items():
        assert relative_error(delta, changes[name]) < 2e-5, name

    assert extract_deft.main([*command, "--dim", "2", "--save_precision", "float"]) == 0
    metadata = deft_io.read_tensors(tmp_path / "lora.safetensors")[1]
    told = json.loads(metadata["deft_history"])[-1]["errors"]
    for name, delta in deltas(tmp_path / "lora.safetensors").items():
        S = torch.linalg.svdvals(changes[name].double())
        best = float(S[2:].norm() / S.norm())
        error = relative_error(delta, changes[name])
        assert error < 1.01 * best + 2e-5, name
        assert told[name] == pytest.approx(error, rel=1e-2, abs=2e-5), name
    assert metadata["ss_network_module"] == "networks.lora"
    assert metadata["modelspec.architecture"] == "stable-diffusion-v1/lora"


def test_adapters_that_depend_on_their_base_need_it(lycoris, tmp_path, capsys):
    command, _ = lycoris
    assert extract_deft.main([*command, "--dim", "2"]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert error.endswith("depends on the base model's weights; give it with --model_org\n")
    save_file(weights(), tmp_path / "other.safetensors")
    assert extract_deft.main([*command, "--dim", "2", "--model_org", str(tmp_path / "other.safetensors")]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "give the model that it was trained on" in error
    assert not (tmp_path / "lora.safetensors").exists()


# --- the approximation itself -----------------------------------------------------------------------------------------

SPECTRA = {
    "flat": torch.ones(150),
    "slow": 1 / torch.arange(1, 151).sqrt(),
    "falling": 0.95 ** torch.arange(150),
    "gap behind the rank": torch.where(torch.arange(150) < 20, 1.0, 0.9),
    "low rank and noise": torch.where(torch.arange(150) < 8, 1.0, 1e-5),
}


@pytest.mark.parametrize("name", SPECTRA)
@pytest.mark.parametrize(("rank", "size"), [(8, (150, 400)), (20, (300, 150)), (100, (150, 200))])
def test_approximations_are_within_a_hundredth_of_the_best(name, rank, size):
    U, V = (torch.linalg.qr(torch.randn(n, 150).double())[0] for n in size)
    D = ((U * SPECTRA[name]) @ V.T).float()
    found, said = deft_factors.approximated(D, (size[1],), rank)
    S = torch.linalg.svdvals(D.double())
    best = float(S[rank:].norm() / S.norm())
    error = relative_error(found.up.double() @ found.down.double(), D)
    assert found.rank == rank
    assert error <= 1.01 * best + 1e-6
    assert said == pytest.approx(error, rel=1e-3, abs=1e-6)


def test_the_approximation_of_a_wide_matrix_needs_no_full_decomposition(monkeypatch):
    """No singular value decomposition of more than the sketch."""
    sizes = []
    svd = torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda A, **kw: sizes.append(max(A.shape)) or svd(A, **kw))
    deft_factors.approximated(torch.randn(400, 500), (500,), 8)
    assert sizes
    assert max(sizes) <= 8 + deft_factors.OVERSAMPLING


FLUX = "FLUX.1 or Chroma"


@pytest.mark.parametrize(
    ("name", "expected"),
    [("guidance_in_in_layer", "flux-1-dev"), ("img_in", "flux-1-schnell"), ("distilled_guidance_layer_in", "chroma")],
)
def test_kinds_of_flux_are_known_by_what_only_one_of_them_has(name, expected):
    found = deft_architectures.base_metadata_of(
        FLUX, {f"lora_unet_{name}": (8, 8), "lora_unet_double_blocks_0": (8, 8)}
    )
    assert found["modelspec.architecture"] == f"{expected}/lora"


def test_layers_outside_of_fluxs_blocks_are_in_no_plain_lora():
    architecture = next(a for a in deft_architectures.ARCHITECTURES if a.name == FLUX)
    names = [f"lora_unet_{name}" for name in ("img_in", "double_blocks_0_img_attn_qkv", "single_blocks_0_linear1")]
    assert [name for name in names if architecture.adapts(name, True)] == names[1:]
