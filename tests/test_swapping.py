"""Blocks that wait in the host's memory: gradients, files, and how many are on the device at once."""

from __future__ import annotations

import json
import logging
from collections import Counter
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import train_network_deft
from library.estimate import phases
from library.models import family as families
from library.models import lending, swapping
from library.models.flux import Flux
from library.models.quantised import PACKAGES
from library.models.swapping import spread
from library.options.parse import parse
from library.training import given
from library.training.state import Length
from networks.deft_config import DeftError
from tests.conftest import arguments, relative_error, reset_accelerator
from tests.test_fp8_base import DEVICE, backward, placed

FAMILIES = ["sd15", "sdxl", "flux", "omnigen"]
OPTIONS: list[tuple[str, dict[str, str]]] = [
    *((family, {}) for family in FAMILIES),
    ("sdxl", {"conv_dim": "2", "conv_alpha": "1", "removal": "1"}),
    ("flux", {"removal": "1", "basis": "relu"}),
    ("flux", {"train_blocks": "single"}),
    ("flux", {"fuse_qkv": "true"}),
]


class Away:
    """A group whose weights are elsewhere while they wait: on the meta device, where reading one fails, in float64,
    with which no layer computes, or no numbers."""

    now: ClassVar[set[nn.Module]] = set()
    turns: ClassVar[Counter[nn.Module]] = Counter()
    most: ClassVar[int] = 0
    where: ClassVar[Any] = "meta"

    def __init__(self, block: nn.Module, device: torch.device, stream: Any):
        self.block = block
        places = [
            (module, name)
            for module in block.modules()
            for name in module._parameters
            if module._parameters[name] is not None
        ]
        self.home = [(module, name, module._parameters[name]) for module, name in places]
        self.offload_()

    def onload_(self) -> None:
        assert self.block not in Away.now
        for module, name, here in self.home:
            module._parameters[name] = here
        Away.now.add(self.block)
        Away.most = max(Away.most, len(Away.now))
        Away.turns[self.block] += 1

    def offload_(self) -> None:
        for module, name, here in self.home:
            there = torch.full_like(here, torch.nan) if Away.where == "nowhere" else here.data.to(Away.where)
            module._parameters[name] = nn.Parameter(there, requires_grad=False)
        Away.now.discard(self.block)


@pytest.fixture
def away(monkeypatch):
    Away.now, Away.most, Away.turns, Away.where = set(), 0, Counter(), "meta"
    monkeypatch.setattr(swapping, "group_of", Away)
    monkeypatch.setattr(families, "_SHARED", ())
    return Away


@pytest.mark.parametrize("number", [1, "all"])
@pytest.mark.parametrize(("family", "options"), OPTIONS, ids=str)
def test_gradients_are_those_of_a_model_that_stays(family, options, number, folders, away):
    """To the bit, step after step; two blocks are there at once, and no block longer than that."""
    wanted = backward(*placed(folders(family), options, gradient_checkpointing=True))
    all_of_them = len(placed(folders(family))[0].swappable())
    swap = all_of_them if number == "all" else 1
    model, network = placed(folders(family), options, gradient_checkpointing=True, blocks_to_swap=swap)
    waiting = [block for units in model.swappable() for block in units] if number == "all" else [*away.turns]
    for _ in range(3):
        network.zero_grad()
        found = backward(model, network)
        assert found.keys() == wanted.keys()
        assert all(torch.equal(found[name], wanted[name]) for name in found)
        assert len(away.now) <= 1  # the first of the next step
    assert away.most <= 2
    if number == "all":
        assert away.turns.keys() == set(waiting)
        assert max(away.turns.values()) <= 3 * 2 + 1  # loaded for each pass of each step, and no more often


@pytest.mark.parametrize(
    ("family", "more"),
    [*((family, {"blocks_to_swap": number}) for family in FAMILIES for number in (0, 2)),
     ("flux", {"torch_compile": "aot_eager"})],
    ids=str,
)  # fmt: skip
def test_gradients_are_those_of_checkpoints_that_stay(family, more, folders, away, monkeypatch):
    """To the bit; and of what blocks compute, their inputs alone are kept, in the host's memory."""
    wanted = backward(*placed(folders(family), {}, gradient_checkpointing=True, **more))
    kept, save = [], families.save_on_cpu

    def counted(**given: Any) -> Any:
        context = save(**given)
        pack = context.pack_hook

        def copied(tensor: torch.Tensor) -> Any:  # as to locked memory, where strides are not kept
            kept.append(tensor.shape)
            device, there = pack(tensor)
            return device, torch.empty(tensor.size(), dtype=tensor.dtype).copy_(there)

        context.pack_hook = copied
        return context

    monkeypatch.setattr(families, "save_on_cpu", counted)
    inputs: list[torch.Size] = []
    keep = families._kept_by_the_host

    def watched(checkpointing: Any, block: nn.Module, *given: Any) -> Any:
        inputs.extend(one.shape for one in given if torch.is_tensor(one))
        return keep(checkpointing, block, *given)

    monkeypatch.setattr(families, "_kept_by_the_host", watched)
    options = {"gradient_checkpointing": True, "cpu_offload_checkpointing": True, **more}
    model, network = placed(folders(family), {}, **options)
    found = backward(model, network)
    assert found.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in found)
    assert inputs
    assert Counter(shape for shape in kept if shape.numel()) == Counter(inputs)


def test_what_is_drawn_without_gradients_is_the_same(folders, away):
    """Between steps as well, when other blocks follow each other than the last time."""
    inputs = torch.randn(1, 4, 8, 8), torch.tensor([40.0])
    answers = []
    for number in (0, 2):
        model, network = placed(folders("sdxl"), {}, gradient_checkpointing=True, blocks_to_swap=number)
        found = []
        for _ in range(2):
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                text = model.encode_text(["a cat"])
                for _ in range(2):
                    found.append(model.predict(*inputs, text, torch.full((1, 6), 64.0)))
            backward(model, network)
        answers.append(torch.stack(found))
    assert torch.equal(*answers)
    assert away.most == 2


@pytest.mark.parametrize("more", [{}, {"fp8_base": True}, {"network_args": ["removal=1"]}], ids=str)
@pytest.mark.usefixtures("fresh_accelerator")
def test_the_file_is_that_of_a_training_without(more, folders, photos, tmp_path, away):
    """With samples, validation and meters beside the steps, and saves, which read all weights where they are."""
    away.where = torch.float64
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 64 --s 2\n")
    common = {"mixed_precision": "bf16", "learning_rate": 1e-3, "max_train_steps": 3, "network_train_unet_only": True,
              "sample_prompts": tmp_path / "p.txt", "sample_at_first": True, "validation_split": 0.4,
              "validate_every_n_steps": 2, "meter_every_n_steps": 2, "t5xxl_max_token_length": 12,
              "gradient_checkpointing": True, **more}  # fmt: skip
    files = []
    for name, number in (("stays", None), ("swapped", 2)):
        reset_accelerator()
        argv = arguments(folders("flux"), photos, tmp_path, output_name=name, blocks_to_swap=number, **common)
        assert train_network_deft.main(argv) == 0
        files.append(load_file(tmp_path / "out" / f"{name}.safetensors"))
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][key], files[1][key]) for key in files[0])
    assert away.most == 2
    assert sum(away.turns.values()) > 3 * 2 * 3


@pytest.mark.usefixtures("fresh_accelerator")
def test_mistakes_are_told(folders, photos, tmp_path, capsys, caplog, monkeypatch):
    few: dict[str, Any] = {"max_train_steps": 1, "network_train_unet_only": True}
    assert train_network_deft.main(arguments(folders("sd15"), photos, tmp_path, blocks_to_swap=2, **few)) == 2
    assert "--blocks_to_swap needs --gradient_checkpointing" in capsys.readouterr().err
    few |= {"cpu_offload_checkpointing": True}
    with caplog.at_level(logging.WARNING):
        assert train_network_deft.main(arguments(folders("sd15"), photos, tmp_path, blocks_to_swap=2, **few)) == 0
    assert "--cpu_offload_checkpointing: --gradient_checkpointing is on with it" in caplog.text
    assert "--cpu_offload_checkpointing: no effect on cpu" in caplog.text
    assert "--blocks_to_swap: no effect on cpu" in caplog.text
    monkeypatch.setattr(families, "_SHARED", ())
    reset_accelerator()
    assert train_network_deft.main(arguments(folders("sd15"), photos, tmp_path, blocks_to_swap=99, **few)) == 2
    number = len(placed(folders("sd15"))[0].swappable())
    assert f"error: --blocks_to_swap 99: this model has {number}; give at most that" in capsys.readouterr().err


@pytest.mark.parametrize("number", [0, 1, 2, 7, 18, 35, 38])
def test_flux_counts_as_sd_scripts_does(number):
    """Half of them double blocks, and two single ones for each of the others (flux_models.py, enable_block_swap)."""
    double, single = ([nn.Linear(1, 1) for _ in range(n)] for n in (19, 38))
    transformer = SimpleNamespace(transformer_blocks=double, single_transformer_blocks=single)
    units = Flux.swappable(SimpleNamespace(pipeline=SimpleNamespace(transformer=transformer)))  # type: ignore[arg-type]
    found = spread(units, number)
    of_double = sum(block in double for block in found)
    assert abs(of_double - number / 2) <= 0.5
    assert len(found) - of_double == 2 * (number - of_double)
    order = [*double, *single]
    places = [order.index(block) for block in found]
    assert places == sorted(set(places))
    with pytest.raises(DeftError, match="39: this model has 38"):
        spread(units, 39)


def training_peak(folder, photos, tmp_path, **options) -> tuple[int, list[int]]:
    """What --dry_run says of FLUX.1's, and the sizes of the blocks that are swapped, in bytes."""
    argv = arguments(
        folder, photos, tmp_path, gradient_checkpointing=True, network_dim=2, mixed_precision="bf16",
        cache_text_encoder_outputs=True, network_train_unet_only=True, max_train_steps=1, **options,
    )  # fmt: skip
    run = parse(argv)
    model = phases.empty_model(run)
    blocks = spread(model.swappable(), run.model.blocks_to_swap)
    found = phases.estimate(run, given.read(run), model, None, Length(1, 1), asked=[phases.TRAINING])
    return found.deciding.peak, sorted(sum(p.nbytes for p in block.parameters()) for block in blocks)


def test_a_dry_run_knows_what_is_saved(photos, folders, tmp_path):
    """Of the weights, all but one or two blocks of those that are swapped."""
    (stays, _), (swapped, sizes) = (
        training_peak(folders("flux"), photos, tmp_path, blocks_to_swap=number) for number in (0, 4)
    )
    assert sum(sizes[:-2]) <= stays - swapped <= sum(sizes)


def test_checkpoints_that_wait_take_no_room(photos, folders, tmp_path):
    """Of pictures so large that these are most of what a step takes: a block's input is all that is there of them."""
    large = {"resolution": 1024, "t5xxl_max_token_length": 12}
    stays, waits = (
        training_peak(folders("flux"), photos, tmp_path, cpu_offload_checkpointing=away, **large)[0]
        for away in (None, True)
    )
    config = json.loads((folders("flux") / "transformer" / "config.json").read_text())
    width = config["num_attention_heads"] * config["attention_head_dim"]
    blocks = config["num_layers"] + config["num_single_layers"]
    one = 2 * width * (64 * 64 + 12)
    assert 0.95 * (blocks - 2) * one <= stays - waits <= blocks * one


@pytest.mark.usefixtures("fresh_accelerator")
def test_what_does_not_fit_is_lent_by_blocks(folders, photos, tmp_path, away, monkeypatch):
    """Texts that are cached and directions to keep are those of models that are there whole."""
    away.where, close = "nowhere", swapping.Swapping.close

    def closed(lent: swapping.Swapping) -> None:
        close(lent)
        for group in lent._groups.values():  # as weights in the host's memory are
            group.onload_()
        away.now.clear()

    monkeypatch.setattr(swapping.Swapping, "close", closed)
    (tmp_path / "keep.txt").write_text("a dog --w 64 --h 64 --s 2\na red house --w 64 --h 64 --s 2\n")
    files, kept = [], []
    for name, free in (("whole", 2**40), ("parts", 2**20)):
        reset_accelerator()
        monkeypatch.setattr(lending, "_free", lambda device, free=free: free)
        argv = arguments(
            folders("flux"), photos, tmp_path / name, output_name="cat", network_train_unet_only=True,
            cache_text_encoder_outputs=True, network_args=[f"keep={tmp_path / 'keep.txt'}"], t5xxl_max_token_length=12,
            max_train_steps=1,
        )  # fmt: skip
        assert train_network_deft.main(argv) == 0
        files.append(load_file(next((tmp_path / name / "out").glob("cat.safetensors"))))
        kept.append(load_file(next((tmp_path / name / "out").glob("keep-*.safetensors"))))
        assert bool(away.turns) == (name == "parts")
    for one, other in (files, kept):
        assert one.keys() == other.keys()
        assert all(torch.equal(one[key], other[key]) for key in one)


def test_a_model_says_what_device_it_is_on_while_its_blocks_wait(folders, away):
    """By its first weight, which therefore stays: transformers' CLIP counts its embeddings among its blocks."""
    model = placed(folders("sd15"))[0]
    for part in (*model.text_encoders, model.denoiser):
        swapping.Swapping(part, swapping.blocks_of(part), DEVICE)
        assert next(part.parameters()).device == DEVICE
    assert len(swapping.blocks_of(model.text_encoders[0])) > 0


@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a GPU")
@pytest.mark.parametrize("removal", ["0", "1"])
@pytest.mark.parametrize("kind", ["int8", "fp8", "nf4"])
def test_quantised_blocks_wait_in_the_memory_of_the_host(kind, removal, folders):
    """And are read there, as a save does; gradients are those of a model that stays."""
    pytest.importorskip(PACKAGES[kind])
    found, norms, waiting = [], [], []
    for number in (0, 4):
        more = {"blocks_to_swap": number, "gradient_checkpointing": True, "quantize_base": kind}
        model, network = placed(folders("flux"), {"removal": removal}, **more)
        found.append(backward(model, network))
        norms.append(network._norms_of_base().cpu())
        waiting.append(sum(one.device.type == "cpu" for one in model.denoiser.parameters()))
    assert waiting[0] == 0 < waiting[1]
    assert all(relative_error(found[1][name], found[0][name]) < 1e-2 for name in found[0])
    assert torch.equal(*norms)
