"""`keep=FILE` where there is no such file: sd-scripts' samples before the first step make it."""

from __future__ import annotations

import argparse
from pathlib import Path

import pytest
import torch

from networks import deft, deft_keep
from networks.deft_config import DeftError
from tests.conftest import in_two_processes, relative_error
from tests.test_architectures import Flux

UNUSED = "lora_unet_single_blocks_0_modulation_lin"  # by the small model's forward


@pytest.fixture
def args(tmp_path) -> argparse.Namespace:
    """Of sd-scripts, as far as they count here."""
    (tmp_path / "prompts.txt").write_text("# what is drawn\n" + "a cat --s 2\n" * deft_keep.FEWEST, encoding="utf-8")
    return argparse.Namespace(sample_at_first=True, sample_prompts=str(tmp_path / "prompts.txt"))


def made(model: Flux, file: Path, args: argparse.Namespace, **options: str) -> deft.DeftNetwork:
    """A network as sd-scripts' trainers make one."""
    net = deft.create_network(1.0, 4, 4, None, [], model, keep=str(file), **options)
    net.prepare_network(args)
    net.apply_to([], model, False, True)
    return net


@torch.no_grad()
def draw(model: Flux) -> None:
    for seed in range(3):
        model(torch.randn(2, 50, 4, generator=torch.Generator().manual_seed(seed)))


@pytest.mark.parametrize("options", [{}, {"split_qkv": "true"}], ids=str)
def test_the_samples_make_the_file_and_training_goes_by_it(tmp_path, args, options):
    model, file = Flux(double=0, single=1), tmp_path / "made" / "keep.safetensors"
    with deft_keep.Watch([m.target for m in deft.create_network(1.0, 1, 1, None, [], model).all_modules], 64) as watch:
        draw(model)
    net = made(model, file, args, **options)
    draw(model)
    assert not file.exists()
    net.on_epoch_start(None, model)
    directions = deft_keep.read_kept(file)
    for name, U in watch.directions().items():
        assert relative_error(directions[name] @ directions[name].mT, U.float() @ U.float().mT) < 1e-3
    assert len(directions) == 2
    later = made(Flux(double=0, single=1), file, args, **options)
    assert [m.target.file_name for m in net.all_modules if m.kept is None] == [UNUSED]
    for module, other in zip(net.all_modules, later.all_modules, strict=True):
        if module.kept is not None:
            assert torch.equal(module.kept, directions[module.target.file_name])
            assert torch.equal(module.kept, other.kept)
    optimizer = torch.optim.AdamW(net.prepare_optimizer_params(1e-2, 1e-2)[0])
    for _ in range(3):
        net.on_step_start(None, model)
        model(torch.randn(2, 50, 4)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    net.on_epoch_start(None, model)  # the file stays as it is, whatever is drawn later
    for module in (m for m in net.all_modules if m.kept is not None):
        _, down = module.lora_factors()
        assert down.norm() > 1e-3
        assert (down @ directions[module.target.file_name]).norm() < 1e-5 * down.norm()
    assert not hooks_of(model)


def hooks_of(model: Flux) -> list[object]:
    """That look at a layer's inputs; a network leaves one more at the model's own."""
    return [hook for layer in model.modules() if layer is not model for hook in layer._forward_pre_hooks.values()]


def test_a_removed_network_looks_no_longer(tmp_path, args):
    model = Flux()
    net = made(model, tmp_path / "keep.safetensors", args)
    assert hooks_of(model)
    net.remove()
    assert not hooks_of(model)


def test_what_is_refused_before_the_night(tmp_path, args):
    file = tmp_path / "keep.safetensors"
    few = tmp_path / "few.txt"
    few.write_text("a cat\na dog\n")
    for changes, line in (
        ({"sample_at_first": False}, "no such file; make it with `python -m library.keep`.* --sample_at_first"),
        ({"sample_prompts": None}, "no such file; make it with `python -m library.keep`"),
        ({"sample_prompts": str(few)}, "has to be a .txt of 16 prompts or more"),
        ({"sample_prompts": str(tmp_path / "none.txt")}, "--sample_prompts .*none.txt: cannot be read"),
    ):
        with pytest.raises(DeftError, match=line):
            made(Flux(), file, argparse.Namespace(**(vars(args) | changes)))
    with pytest.raises(DeftError, match=r"only train_network_deft.py takes prompts"):
        made(Flux(), tmp_path / "keep.txt", args)
    with pytest.raises(DeftError, match="nothing has been drawn before the first step"):
        made(Flux(), file, args).on_epoch_start(None, None)
    assert not file.exists()


def test_a_training_that_goes_on_needs_the_file(tmp_path, args):
    file, weights = tmp_path / "keep.safetensors", str(tmp_path / "x.safetensors")
    model = Flux()
    net = made(model, file, args)
    draw(model)
    with torch.no_grad():
        net.all_modules[0].R.fill_(1)  # as a resumed state does
    net.save_weights(weights, None, None)
    with pytest.raises(DeftError, match="this network is trained already"):
        net.on_epoch_start(None, model)
    with pytest.raises(DeftError, match="to go on from weights, give their training's"):
        made(Flux(), file, args).load_weights(weights)


TWO_PROCESSES = """
import argparse, torch
from tests.test_architectures import Flux
from tests.test_keep_samples import made
torch.distributed.init_process_group("gloo")
rank = torch.distributed.get_rank()
torch.manual_seed(0)
model = Flux(double=0, single=1)
net = made(model, {file!r}, argparse.Namespace(sample_at_first=True, sample_prompts={prompts!r}))
inputs = torch.randn(2, 400, 4, generator=torch.Generator().manual_seed(7))
with torch.no_grad():
    if {split}:
        model(inputs[rank : rank + 1])
    elif rank == 0:
        model(inputs)  # the other one draws nothing
net.on_epoch_start(None, model)
torch.save({{m.lora_name: m.kept for m in net.all_modules if m.kept is not None}}, f"{folder}/{{rank}}.pt")
torch.distributed.destroy_process_group()
"""


@pytest.mark.parametrize("split", [True, False])
def test_two_processes_keep_what_both_have_drawn(tmp_path, args, split):
    file = str(tmp_path / "keep.safetensors")
    code = TWO_PROCESSES.format(file=file, prompts=args.sample_prompts, folder=tmp_path.as_posix(), split=split)
    in_two_processes(tmp_path, code)
    one, two = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    torch.manual_seed(0)
    model = Flux(double=0, single=1)
    layers = [m.target for m in deft.create_network(1.0, 1, 1, None, [], model).all_modules]
    with deft_keep.Watch(layers, deft_keep.DIRECTIONS) as watch, torch.no_grad():
        model(torch.randn(2, 400, 4, generator=torch.Generator().manual_seed(7)))
    directions = deft_keep.read_kept(file)
    assert one.keys() == two.keys() == watch.directions().keys() == directions.keys()
    for name, U in watch.directions().items():
        assert torch.equal(one[name], two[name])
        assert relative_error(one[name], directions[name]) < 1e-5  # QR rounds by the number of threads
        assert relative_error(one[name] @ one[name].mT, U.float() @ U.float().mT) < 1e-2
