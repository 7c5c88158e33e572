"""Steps that are queued one behind the other: nobody waits for the device, and what is read late is right."""

from __future__ import annotations

import json
import threading
import traceback
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.data import Dataset

from library import transfer
from library.data.batches import Batch, Example, Gone, Loader
from library.data.cache import Memory
from library.data.masks import stacked
from library.data.resizing import in_tensor
from library.estimate import phases, pretending
from library.estimate.ledger import Ledger
from library.estimate.pretending import CARD
from library.options.parse import parse
from library.options.rooms import OptimizerOptions
from library.training import given, loop, optimizers, state
from library.training.losses import Losses
from library.training.record import Record
from networks import deft_batch
from networks.deft import DeftNetwork
from tests import small_flux, small_models
from tests.conftest import PHOTOS, ROOT, arguments, network_of
from tests.test_architectures import Flux, network
from tests.test_batches import plan_with
from tests.test_loop_options import logged

aten = torch.ops.aten
OWN = {ROOT, *(ROOT / "library").glob("*/"), ROOT / "library", ROOT / "networks"}
FAKES = Path(pretending.__file__)


# --- what waits -------------------------------------------------------------------------------------------------------


class Waits(TorchDispatchMode):
    """Notes where values of the card's are asked for, and where copies from or to it are waited for."""

    def __init__(self) -> None:
        super().__init__()
        self.places: set[str] = set()

    def taken(self) -> set[str]:
        found, self.places = self.places, set()
        return found

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _is_waited_for(func, args, kwargs or {}):
            frames = [(Path(one.filename), one.name) for one in traceback.extract_stack()]
            file, name = [(file, name) for file, name in frames if file.parent in OWN and file != FAKES][-1]
            self.places.add(f"{file.name}: {name}")
        return func(*args, **(kwargs or {}))


def _is_waited_for(func: Any, args: Any, kwargs: Any) -> bool:
    tensors = [one for one in tree_leaves((args, kwargs)) if isinstance(one, Tensor)]
    if not any(one.device == CARD for one in tensors) and kwargs.get("device") != CARD:
        return False
    if func is aten._to_copy.default:
        device = kwargs.get("device") or args[0].device
        return device != args[0].device and not kwargs.get("non_blocking")
    if func is aten.copy_.default:
        return args[0].device != args[1].device and not (len(args) > 2 and args[2])
    if func in (aten.index.Tensor, aten.index_put_.default, aten._index_put_impl_.default):
        return any(one.dtype == torch.bool or one.device != CARD for one in tree_leaves(args[1]) if one is not None)
    if func is aten.lift_fresh.default:  # of numbers, by a torch that was built for CUDA
        return args[0].device == CARD
    return func in (aten._local_scalar_dense.default, aten.equal.default, aten.nonzero.default,
                    aten.masked_select.default, aten._pin_memory.default)  # fmt: skip


class Reads:
    """In `Late`'s place: says when numbers are sent, and when they are read."""

    def __init__(self) -> None:
        self.told: list[str] = []
        self.number = 0

    def __call__(self, numbers: Tensor) -> Namespace:
        self.number += 1
        number, found = self.number, [*[1.0] * (len(numbers) - 2), 0.0, 1.0]
        self.told.append(f"queued {number}")
        return Namespace(read=lambda: self.told.append(f"read {number}") or found)


class Batches(list):
    """A loader of so many."""

    batch_size = 1

    def epoch(self, number: int, done: int) -> Iterator[Batch]:
        return iter(self[done:])


FAMILIES = {
    "sd15": {"min_snr_gamma": 5, "noise_offset": 0.1, "ip_noise_gamma": 0.1, "scale_weight_norms": 1.0,
             "random_crop": True, "loss_type": "huber", "network_args": ["network_reg_dims=down_blocks=0,up_blocks=0"]},
    "sdxl": {"gradient_checkpointing": True, "network_train_unet_only": True, "cache_text_encoder_outputs": True,
             "network_args": ["network_reg_dims=input_blocks=0,output_blocks=0"]},
    "flux": {"network_train_unet_only": True, "timestep_sampling": "flux_shift", "guidance_scale": 1},
}  # fmt: skip


@pytest.mark.parametrize("kind", FAMILIES)
def test_steps_wait_for_nothing_and_numbers_are_read_one_step_later(
    kind, photos, tmp_path, monkeypatch, fresh_accelerator
):
    """On a card that is not there, where everything but values is as on one that is."""
    folder = tmp_path / "model"
    model = small_flux.build(folder).folder if kind == "flux" else small_models.build(kind, folder)
    run = parse(arguments(model, photos, tmp_path, network_dim=2, max_train_steps=3, **FAMILIES[kind]))
    files, length = given.read(run), state.Length(3, 1)
    accelerator, waits, reads = Accelerator(cpu=True), Waits(), Reads()
    monkeypatch.setattr(Accelerator, "device", CARD)
    monkeypatch.setattr(loop, "Late", reads)
    monkeypatch.setattr(deft_batch, "Late", lambda numbers: Namespace(read=lambda: [1.0] * len(numbers)))
    trial = phases._Trial(run, files, phases.empty_model(run), Ledger(None), length)
    with pretending.card(), trial.ledger:
        if run.data.caches.cache_text_encoder_outputs:
            trial.passes[phases.TEXTS]()
            trial.texts._keys = dict.fromkeys(trial.batch_of.captions, "")
            trial.texts._entries.write("", trial.kept)
        trial.passes[phases.TRAINING]()  # moves all to the card, and what is moved once
        losses = Losses(trial.model, trial.adapter, trial.texts, trial.objective, run.preservation, accelerator)
        groups, names = trial.adapter.groups(run.optimizer)
        optimizer = accelerator.prepare(optimizers.optimizer_of(run.optimizer, groups))
        steps: list[set[str]] = []
        beside = Namespace(due=lambda step: False, at_epoch=lambda position: None,
                           at_step=lambda position: steps.append(waits.taken()))  # fmt: skip
        batches = Batches([trial.batch_of.batch(trial.model)] * 3)
        training = loop.TrainingLoop(
            run.loop, accelerator, losses, 1, trial.adapter, batches, optimizer, Namespace(step=lambda: None), names,
            mock.MagicMock(), beside, beside, None, length, state.Position(), Record(), Namespace(number=0), beside,
        )  # fmt: skip
        with waits:
            training.run()
    assert reads.told == ["queued 1", "queued 2", "read 1", "queued 3", "read 2", "read 3"]
    assert training.position.step == 3
    assert steps[0] <= {"deft_batch.py: _bases"}  # before the first, nothing is known of a basis
    assert steps[1:] == [set(), set()]


def test_the_watch_notices_what_waits():
    waits = Waits()
    with pretending.card(), Ledger(None), waits:
        on_card = torch.ones(3, device=CARD)
        transfer.sent(torch.ones(3), CARD)
        on_card.to("cpu", non_blocking=True)
        on_card[1:] = 2.0
        assert waits.places == set()
        for ask in (
            lambda: on_card.sum().item(), lambda: bool((on_card > 0).all()), lambda: torch.ones(3).to(CARD),
            lambda: on_card.cpu(), lambda: on_card[[0, 1]],
            lambda: torch.tensor(2.0, device=CARD),
        ):  # fmt: skip
            here = [Namespace(filename=f"{ROOT}/a.py", name="b")]
            with mock.patch.object(traceback, "extract_stack", return_value=here):
                ask()
            assert waits.places == {"a.py: b"}
            waits.places.clear()


def test_averaged_gradients_lie_in_memory_as_their_parameters():
    """As fused optimizers ask for: P has the strides of a matrix that is transposed."""
    model = Flux()
    parameters = list(network(model).parameters())
    assert len({one.stride()[-1] == 1 for one in parameters if one.dim() == 2}) == 2
    expected = []
    for number, parameter in enumerate(parameters):
        gradient = torch.randn_like(parameter)
        expected.append(gradient if number else torch.zeros_like(gradient))
        parameter.grad = {0: None, 1: gradient.contiguous()}.get(number, gradient)
    accelerator = Namespace(reduce=lambda tensor, reduction: tensor * 2)
    loop.TrainingLoop._average_gradients(Namespace(accelerator=accelerator), parameters)
    for parameter, gradient in zip(parameters, expected, strict=True):
        assert parameter.grad.stride() == parameter.stride()
        assert torch.equal(parameter.grad, 2 * gradient)


# --- what is read late ------------------------------------------------------------------------------------------------

BAD_LOSSES, BAD_GRADIENTS = {3, 4}, {7}  # steps


@pytest.fixture
def disturbed(monkeypatch):
    """Some losses and gradients are not finite."""
    loss_of, update = Losses.__call__, loop.TrainingLoop._update

    def losses(self, batch, randoms, *rest):
        found = loss_of(self, batch, randoms, *rest)
        return found * torch.nan if randoms.step + 1 in BAD_LOSSES else found

    def with_bad_gradients(self):
        if self.position.step + 1 in BAD_GRADIENTS:
            self.trained[0].grad[0] = torch.inf
        return update(self)

    monkeypatch.setattr(Losses, "__call__", losses)
    monkeypatch.setattr(loop.TrainingLoop, "_update", with_bad_gradients)


def all_at_once(monkeypatch) -> None:
    """Numbers are read as soon as a step is queued."""
    made = loop.TrainingLoop.__post_init__
    monkeypatch.setattr(loop.TrainingLoop, "__post_init__", lambda self: (made(self), setattr(self, "late", False)))


@pytest.fixture
def exact():
    """Each run's numbers are the other's, also on a GPU, whose fused attention adds up in any order."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    with sdpa_kernel(SDPBackend.MATH):
        yield
    torch.use_deterministic_algorithms(False)


def curves(folder: Path) -> Any:
    return json.loads((folder / "record.json").read_text())["curves"]


def test_what_is_read_late_is_what_is_read_at_once(run, tmp_path, monkeypatch, disturbed, exact, caplog):
    """Files, states, logs and warnings, also of steps that are left out."""
    common = {"optimizer_args": ["fused=True"], "max_train_steps": 12, "save_every_n_steps": 4, "save_state": True,
              "lr_scheduler": "cosine", "learning_rate": 1e-3, "train_batch_size": 2}  # fmt: skip
    found = {}
    for name in ("late", "at once", "not fused"):
        if name == "at once":
            all_at_once(monkeypatch)
        out, logs = tmp_path / name / "out", tmp_path / name / "logs"
        arguments = {} if name == "not fused" else {"optimizer_args": common["optimizer_args"]}
        caplog.clear()
        kinds = common | {"optimizer_args": None} | arguments
        assert run(output_dir=out, logging_dir=logs, save_state_on_train_end=True, **kinds) == 0
        told = [line for line in caplog.messages if "non-finite" in line]
        then = json.loads((out / "cat-step00000008-state" / state.FILE).read_text())
        steps = [(one.step, one.value) for one in logged(logs).Scalars("loss/current")]
        found[name] = (
            told,
            then["recent"],
            then["step"],
            curves(out / "cat-state"),
            steps,
            load_file(out / "cat.safetensors"),
        )
    late, at_once, not_fused = found.values()
    assert late[0] == [
        "step 3: non-finite loss nan, left out (1 in a row)",
        "step 4: non-finite loss nan, left out (2 in a row)",
        "step 7: non-finite gradient inf, left out (1 in a row)",
    ]
    assert len(late[1]) == 8 - len(BAD_LOSSES)
    assert late[1] == [value for step, value in zip(*curves_of(late[3]), strict=True) if step <= 8]
    assert [step for step, _ in late[4]] == list(range(1, 13))
    assert not_fused[0] == late[0]
    assert not_fused[1] == pytest.approx(late[1], rel=1e-4)
    for one, other in zip(late[:4], at_once[:4], strict=True):
        assert one == other
    assert str(late[4]) == str(at_once[4])  # NaN is not itself
    assert all(torch.equal(late[5][key], at_once[5][key]) for key in at_once[5])


def curves_of(found: Any) -> tuple[list[int], list[float]]:
    return found["loss/current"]["steps"], found["loss/current"]["values"]


def test_too_many_in_a_row_end_a_training_whose_numbers_are_read_late(run, capsys, disturbed):
    assert run(optimizer_args=["fused=True"], max_train_steps=12, max_nan_steps=2, train_batch_size=1) == 1
    told = capsys.readouterr().err.strip().splitlines()[-1]
    assert "stopped at step 4: non-finite loss nan 2 times in a row" in told


# --- steps that are left out ------------------------------------------------------------------------------------------

KINDS = {
    "AdamW": {"fused": True, "amsgrad": True},
    "Adam": {"fused": True},
    "Adagrad": {"fused": True},
    "SGD": {"fused": True, "momentum": 0.9},
    "SGDNesterov": {},
    "Lion": {},
}


@pytest.mark.parametrize("name", KINDS)
def test_a_step_that_is_left_out_leaves_nothing_behind(name, monkeypatch):
    """Weights and the optimizer's state, bit for bit, be it the first step or a later one; others are taken as ever."""
    if name == "Lion":
        pytest.importorskip("lion_pytorch")
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)  # on a CPU, where Adagrad has a fused kernel too
    options = OptimizerOptions(name, optimizer_args=KINDS[name], learning_rate=1e-2)
    assert optimizers.leaves_out(optimizers.on_trial(options)) == (name in ("AdamW", "Adam", "Adagrad"))
    trained = []
    for bad in ((), (0, 2, 3)):
        torch.manual_seed(1)
        parameter = nn.Parameter(torch.randn(5, 4))
        optimizer = optimizers.optimizer_of(options, [{"params": [parameter], "lr": 1e-2}])
        for number in range(6 + len(bad)):
            if number in bad:
                parameter.grad = torch.full_like(parameter, torch.nan)
            else:
                number -= sum(number > one for one in bad)
                parameter.grad = torch.randn(5, 4, generator=torch.Generator().manual_seed(number))
            optimizers.step(optimizer, parameter.grad.isfinite().all())
        trained.append([parameter, *tree_leaves(optimizer.state_dict()["state"])])
    assert all(torch.equal(*map(torch.as_tensor, pair)) for pair in zip(*trained, strict=True))


# --- the next batch ---------------------------------------------------------------------------------------------------


class Watched(Dataset):
    """Turns' places as captions.

    :param gone: from this place on
    """

    def __init__(self, gone: int = 10**9):
        self.gone, self.read, self.threads = gone, threading.Semaphore(0), set()
        self.places: list[int] = []

    def __getitem__(self, turn):
        self.threads.add(threading.current_thread())
        self.places.append(turn.place)
        self.read.release()
        if turn.place >= self.gone:
            raise Gone(f"{turn.place}")
        return Example(torch.zeros(1), None, str(turn.place), torch.zeros(6))


def test_one_batch_is_read_while_another_is_used():
    examples = Watched()
    epoch = Loader(plan_with([(1, [(0, 6)])]), examples, 1).epoch(1)
    for number in range(6):
        assert next(epoch).captions == [str(number)]
        for _ in range(1 + (number == 0) - (number == 5)):
            assert examples.read.acquire(timeout=10)  # without another batch being asked for
        assert examples.places == list(range(min(number + 2, 6)))
    assert threading.current_thread() not in examples.threads
    assert next(epoch, None) is None
    (thread,) = examples.threads
    assert not thread.is_alive()


def test_what_is_gone_ends_the_epoch_where_its_turn_is():
    loader = Loader(plan_with([(1, [(0, 6)])]), Watched(gone=3), 1)
    epoch = loader.epoch(1)
    assert [next(epoch).captions for _ in range(3)] == [["0"], ["1"], ["2"]]
    with pytest.raises(Gone, match="3"):
        next(epoch)
    ended = loader.epoch(1)
    assert [next(ended).captions for _ in range(3)] == [["0"], ["1"], ["2"]]
    ended.close()  # of a training that ends there, which nothing is wrong with


# --- what stays on the card -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "stays"), [(2**21, True), (2**20, False)])
def test_what_is_small_beside_a_card_stays_there(size, stays):
    kept = Memory()
    with (
        pretending.card(),
        mock.patch("torch.cuda.get_device_properties", return_value=Namespace(total_memory=100 * size)),
    ):
        for i in range(4):
            kept.write(f"{i}", {"latents": torch.zeros(4, 128, 128), "mask": torch.zeros(1, 128, 128)})
        kept.place(CARD)
        assert {one.device for i in range(4) for one in kept.read(f"{i}").values()} == {
            CARD if stays else torch.device("cpu")
        }
        mask = kept.read("0")["mask"]
        assert stacked([None, mask], (128, 128)).device == mask.device
    kept.place(torch.device("cpu"))


# --- the norms of --scale_weight_norms --------------------------------------------------------------------------------


class Values(TorchDispatchMode):
    """Counts how often a value is asked for."""

    number = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.number += func is aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("form", [{}, {"gate": "true"}, {"removal": "1"}, {"basis": "relu", "removal": "0.5"}], ids=str)
def test_deltas_are_limited_by_their_norms(model, form):
    network: DeftNetwork = network_of(model, **{"removal": "0"} | form)
    with torch.no_grad():
        for i, module in enumerate(network.all_modules):
            module.R.normal_(std=0.01 * (1 + i % 7))
    deltas = [module.lora_factors() for module in network.all_modules]
    before = [up.double() @ down.double() for up, down in deltas]
    wanted = torch.stack([one.norm() for one in before])
    limit = float(wanted.median())
    with Values() as values:
        norms = network.limit_norms(limit)
    assert norms.double().allclose(wanted, rtol=1e-5)
    assert values.number == 0 or form.get("removal")
    for module, delta, norm in zip(network.all_modules, before, wanted, strict=True):
        up, down = module.lora_factors()
        change = up.double() @ down.double() - delta * min(1.0, limit / float(norm))
        assert change.norm() <= 2e-5 * norm
    scaled, mean, largest = network.apply_max_norm_regularization(limit, torch.device("cpu"))
    assert scaled <= len(norms) // 2
    assert mean <= largest <= limit * 1.00001
    network.remove()


# --- pictures that are too large --------------------------------------------------------------------------------------


def test_a_picture_that_does_not_fit_is_put_together_of_tiles(model, monkeypatch):
    with Image.open(next(PHOTOS.rglob("*.jpg"))) as photo:
        pixels = in_tensor(np.asarray(photo.convert("RGB").resize((320, 256))))
    small = model.encode_image(pixels[None], [torch.Generator().manual_seed(1)])
    monkeypatch.setattr("library.models.family.TILE", 24)
    whole = model.decode(small)
    decode, sizes = model.vae.decoder.forward, []

    def short_of_memory(z, *rest):
        sizes.append(max(z.shape[-2:]))
        if sizes[-1] > 24:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return decode(z, *rest)

    monkeypatch.setattr(model.vae.decoder, "forward", short_of_memory)
    tiled = model.decode(small)
    assert sizes[0] == max(small.shape[-2:]) > 24
    assert len(sizes) > 4
    assert tiled.size == whole.size
    errors = [float((in_tensor(np.asarray(image)) - pixels).square().mean()) for image in (whole, tiled)]
    assert errors[1] < 1.1 * errors[0]  # as near to what was encoded
    assert not model.vae.use_tiling
    monkeypatch.setattr("library.models.family.TILE", 64)
    with pytest.raises(torch.OutOfMemoryError):
        model.decode(small)
