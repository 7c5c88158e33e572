"""Several concepts in one file, and an adapter that stays out of another's inputs; against dense float64 products."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from networks import compose_deft, deft, deft_factors, deft_formats, deft_io, deft_keep
from networks.deft_config import DeftError
from networks.deft_factors import Factors
from tests.conftest import deltas, file_factors, perturb, relative_error
from tests.test_architectures import Flux, network

NAME = "lora_unet_mid_block_attentions_0_transformer_blocks_0_attn1_to_q"


def written(path, layers: dict[str, Factors], dtype: torch.dtype = torch.float32) -> str:
    deft_io.write_safetensors(deft_io.lora_tensors(layers, dtype, True)[0], path, {"ss_base_model_version": "sd_v1"})
    return str(path)


def made(rank: int, m: int = 20, n: int = 32) -> Factors:
    return Factors(torch.randn(m, rank), torch.randn(rank, n), (n,))


def dense(factors: Factors) -> Tensor:
    return factors.up.double() @ factors.down.double()


def of_file(path) -> dict[str, Tensor]:
    return {name: dense(layer) for name, layer in deft_io.read_adapter(path).layers.items()}


def projector(delta: Tensor) -> Tensor:
    """V V^T of the row space of a matrix, by its SVD."""
    _, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    V = Vh[S > 1e-6 * S[0]].mT
    return V @ V.mT


@pytest.fixture
def three(tmp_path) -> tuple[list[str], list[Factors]]:
    """Files of ranks 2, 3 and 4, one of them in ComfyUI's names, and what they add to their one layer."""
    made_of = [made(2), made(3), made(4)]
    files = [written(tmp_path / f"{i}.safetensors", {NAME: f}) for i, f in enumerate(made_of)]
    other = deft_formats.read(files[1])
    tensors = deft_formats.tensors_as("comfy", other.changes, torch.float32, True, other.architecture)
    deft_io.write_safetensors(tensors, files[1], {"ss_base_model_version": "sd_v1"})
    return files, made_of


def compose(*args: str) -> int:
    return compose_deft.main([str(a) for a in args])


def test_a_sum_is_exact_for_any_ranks(three, tmp_path, capsys):
    files, parts = three
    out = tmp_path / "out.safetensors"
    assert compose("--models", *files, "--ratios", "1", "-0.5", "2", "--save_to", out) == 0
    wanted = dense(parts[0]) - 0.5 * dense(parts[1]) + 2 * dense(parts[2])
    assert relative_error(of_file(out)[NAME], wanted) < 1e-6
    with_history = deft_io.read_tensors(out)[1]
    assert json.loads(with_history["deft_history"])[-1]["tool"] == "compose_deft"
    assert compose("--models", *files, "--mode", "sequence", "--save_to", tmp_path / "same.safetensors") == 0
    assert "in sequence is the same as the sum" in capsys.readouterr().out
    assert relative_error(of_file(tmp_path / "same.safetensors")[NAME], sum(map(dense, parts))) < 1e-6


@pytest.mark.parametrize("symmetric", [False, True])
def test_projected_concepts_add_nothing_to_others_inputs(three, tmp_path, symmetric, capsys):
    files, parts = three
    out = tmp_path / "out.safetensors"
    options = ["--symmetric"] if symmetric else []
    assert compose("--models", *files, "--mode", "projected", *options, "--save_to", out) == 0
    eye, wanted, cut = torch.eye(32, dtype=torch.float64), torch.zeros(20, 32, dtype=torch.float64), []
    for i, part in enumerate(parts):
        others = [dense(p) for j, p in enumerate(parts) if j < i or (symmetric and j != i)]
        inside = projector(torch.cat(others)) if others else 0 * eye
        wanted += dense(part) @ (eye - inside)
        cut.append(float((dense(part) @ inside).square().sum() / dense(part).square().sum()))
    assert relative_error(of_file(out)[NAME], wanted) < 1e-6
    if not symmetric:  # on the first one's inputs, the first one alone
        V = projector(dense(parts[0]))
        assert relative_error(of_file(out)[NAME] @ V, dense(parts[0])) < 1e-6
    row = next(line for line in capsys.readouterr().out.split("\n") if line.startswith("all"))
    told = [float(word[:-1]) / 100 for word in row.split() if word.endswith("%")]
    assert told == pytest.approx(cut, abs=6e-4)


def test_leading_inputs_are_those_with_the_share_asked_for():
    strong = Factors(torch.eye(20, 2), torch.eye(2, 32) * torch.tensor([[10.0], [1.0]]), (32,)).double()
    U = deft_factors.decomposed(strong).leading_inputs(0.9)
    assert U.shape == (32, 1)
    assert abs(float(U[0, 0])) == pytest.approx(1)
    zero = Factors(torch.zeros(20, 2), torch.zeros(2, 32), (32,))
    assert deft_factors.decomposed(zero).leading_inputs(1.0).shape == (32, 0)


def test_angles_are_those_of_planes():
    angles = torch.tensor([0.3, 1.2], dtype=torch.float64)
    one = torch.eye(4, 2, dtype=torch.float64)
    other = torch.cat([torch.diag(angles.cos()), torch.diag(angles.sin())])
    turned = other @ torch.linalg.qr(torch.randn(2, 2, dtype=torch.float64))[0]
    assert torch.allclose(deft_factors.cosines(one, turned).acos(), angles)


def test_a_new_rank_is_the_best_approximation(three, tmp_path, capsys):
    files, parts = three
    out = tmp_path / "out.safetensors"
    assert compose("--models", *files, "--new_rank", 4, "--save_precision", "fp16", "--save_to", out) == 0
    S = torch.linalg.svdvals(sum(map(dense, parts)))
    assert f"relative error {float(S[4:].norm() / S.norm()):.2g}" in capsys.readouterr().out
    assert deft_io.read_tensors(out)[0][f"{NAME}.lora_down.weight"].shape == (4, 32)


def test_in_sequence_the_second_removes_from_the_firsts_result(monkeypatch, tmp_path):
    """Of removal=1: W2 = (I - Q Q^T) W1 + Q (s R + E0^T W1), by the formula itself; and a base is asked for."""
    model = Flux(double=0, single=1)
    files, matrices = [], []
    for i in range(2):
        torch.manual_seed(i)
        net = network(model, 3, removal="1", save_format="deft")
        files.append(str(tmp_path / f"{i}.safetensors"))
        net.save_weights(files[-1], torch.float32, {})
        matrices.append({m.lora_name: (*m.left_and_eraser(), m.effective_R, m.E0, m.scale) for m in net.all_modules})
        weights = {m.lora_name: m.org_module.weight.detach().clone() for m in net.all_modules}
        net.remove()
    assert compose("--models", *files, "--mode", "sequence", "--save_to", tmp_path / "no.safetensors") == 2

    class Opened:
        __enter__ = lambda self: self  # noqa: E731
        __exit__ = lambda self, *_: None  # noqa: E731
        weight = staticmethod(weights.__getitem__)

    monkeypatch.setattr(compose_deft.deft_checkpoint, "open_checkpoint", lambda path: Opened())
    out, plain = tmp_path / "out.safetensors", tmp_path / "sum.safetensors"
    assert compose("--models", *files, "--mode", "sequence", "--base", "model", "--save_to", out) == 0
    assert compose("--models", *files, "--mode", "sum", "--base", "model", "--save_to", plain) == 0
    found, summed, differ = of_file(out), of_file(plain), []
    assert found.keys() == weights.keys()
    for name, weight in weights.items():
        W = weight.double().flatten(1)
        below = W
        for of_one in matrices:
            L, E, R, E0, s = (t.detach().double() if isinstance(t, Tensor) else t for t in of_one[name])
            below = below - L @ E.mT @ below + L @ (s * R + E0.mT @ below)
        assert relative_error(found[name], below - W) < 1e-5, name
        differ.append(relative_error(summed[name], below - W))
    assert max(differ) > 1e-3


def test_a_convolution_of_a_deft_file_is_one_again():
    """Such files have its inputs in one number."""
    W, up, down = torch.randn(8, 4, 3, 3), torch.randn(8, 2), torch.randn(2, 36)
    change = deft_formats.OnBase("DEFT", (8, 36), lambda W: up @ down + 0 * W)
    whole, _ = compose_deft.composed([("x", change, 0.5), None], W, compose_deft.Options("sum"))
    assert whole.kernel == (4, 3, 3)
    assert whole.rank == 2
    assert relative_error(dense(whole), 0.5 * (up @ down).double()) < 1e-6


def test_what_is_refused(three, tmp_path, capsys):
    files, _ = three
    out = tmp_path / "out.safetensors"
    narrow = written(tmp_path / "narrow.safetensors", {NAME: made(2, n=24)})
    flux = tmp_path / "flux.safetensors"
    net = network(Flux(), removal="0")
    net.save_weights(str(flux), torch.float32, {})
    for args, line in (
        (["--models", files[0]], "give two or more"),
        (["--models", *files, "--ratios", "1", "1"], "--ratios: 2 for 3 files"),
        (["--models", files[0], narrow], "has the shape"),
        (["--models", files[0], flux], "FLUX.1"),
        (["--models", *files, "--symmetric"], "is for --mode projected"),
        (["--models", *files, "--new_rank", "0"], "--new_rank 0"),
    ):
        assert compose(*args, "--save_to", out) == 2, args
        told = capsys.readouterr().err.strip().split("\n")
        assert len(told) == 1, told
        assert line in told[0]
    before = (tmp_path / "0.safetensors").read_bytes()
    assert compose("--models", *files, "--save_to", files[0]) == 2
    assert (tmp_path / "0.safetensors").read_bytes() == before
    assert not out.exists()


# --- keep=OTHER_LORA -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"split_qkv": "true"}], ids=str)
@pytest.mark.parametrize("save_format", ["lora", "deft"])
def test_a_second_adapter_adds_nothing_to_the_firsts_inputs(tmp_path, options, save_format):
    model, file = Flux(dim=48), str(tmp_path / "first.safetensors")
    first = network(model, 2, removal="0", save_format=save_format, **options)
    first.save_weights(file, torch.float32, None)
    whole = {name: dense(factors) for name, factors in file_factors(first).items()}
    first.remove()
    for name, U in deft_keep.read_kept(file).items():
        assert relative_error(U.mT @ U, torch.eye(U.shape[1])) < 1e-6
        assert relative_error(whole[name] @ U.double() @ U.double().mT, whole[name]) < 1e-5
    second = network(model, removal="0", keep=file)
    parts = network(Flux(dim=48), removal="0", keep=file, split_qkv="true")
    for net in (second, parts):
        for module in net.all_modules:
            up, down = (t.double() for t in module.lora_factors())
            delta = up @ down
            assert delta.norm() > 0.01
            assert (delta @ projector(whole[module.target.file_name])).norm() < 1e-6 * delta.norm()


def test_several_files_to_keep(tmp_path):
    files = [written(tmp_path / f"{i}.safetensors", {NAME: made(3)}) for i in range(2)]
    kept = str(tmp_path / "kept.safetensors")
    tensors, metadata = deft_io.kept_tensors({NAME: torch.linalg.qr(torch.randn(32, 4))[0], "another": torch.eye(8, 2)})
    deft_io.write_safetensors(tensors, kept, metadata)
    together = deft_keep.read_kept(",".join([*files, kept, files[0]]))
    U = together[NAME].double()
    assert U.shape == (32, 10)
    for file in (*files, kept):
        V = deft_keep.read_kept(file)[NAME].double()
        assert relative_error(U @ U.mT @ V, V) < 1e-6
    assert together["another"].shape == (8, 2)
    many = [written(tmp_path / f"more{i}.safetensors", {NAME: made(8)}) for i in range(4)]
    with pytest.raises(DeftError, match=f"{NAME}: together all 32 inputs of it are taken; name fewer"):
        deft_keep.read_kept(",".join(many))
    with pytest.raises(DeftError, match=r"keep=nowhere.safetensors: no such file"):
        deft_keep.read_kept(f"{files[0]},nowhere.safetensors")


def test_adapters_that_cannot_be_kept(tmp_path, caplog):
    file = str(tmp_path / "x.safetensors")
    network(Flux(), removal="1", save_format="deft").save_weights(file, torch.float32, None)
    with pytest.raises(DeftError, match=r"depends on the base model \(DEFT\); save it as a LoRA"):
        network(Flux(), removal="0", keep=file)
    nothing = deft.create_network(1.0, 2, 2, None, [], Flux())
    nothing.apply_to([], Flux())
    nothing.save_weights(file, torch.float32, None)
    with pytest.raises(DeftError, match="an adapter that changes nothing"):
        network(Flux(), removal="0", keep=file)
    other = written(tmp_path / "sd.safetensors", {NAME: made(2)})
    with pytest.raises(DeftError, match="none of the adapted layers is in it; it is made for another model"):
        network(Flux(), removal="0", keep=other)
    wide = network(Flux(dim=32), removal="0")
    wide.save_weights(file, torch.float32, None)
    with pytest.raises(DeftError, match="has 24 inputs, the file is made for a model with 32"):
        network(Flux(), removal="0", keep=file)
    high = network(Flux(), 12, removal="0")
    perturb(high)
    high.save_weights(file, torch.float32, None)
    with caplog.at_level("WARNING"):
        found = deft_keep.read_kept(file)
    assert max(U.shape[1] / len(U) for U in found.values()) <= 0.25
    assert "of its square is in the directions that are kept" in caplog.text
    assert any(bool(delta.any()) for delta in deltas(high).values())
