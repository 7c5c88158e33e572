"""A training's phases on a card that is not there: what each takes of its memory, and how long."""

from __future__ import annotations

import contextlib
import gc
import json
import logging
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, cast
from unittest import mock

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library import keep
from library.data import plan
from library.data.batches import Batch
from library.data.plan import Dataset, Picture
from library.estimate import pretending
from library.estimate.ledger import WORKSPACE, Ledger, Rates, Work
from library.estimate.pretending import CARD
from library.models.family import TILE, Family, Text
from library.models.loading import load
from library.options.rooms import OptimizerOptions, Run
from library.training import metadata
from library.training.adapter import DeftAdapter
from library.training.given import Given
from library.training.losses import Losses
from library.training.objective import objective_of
from library.training.optimizers import on_trial, optimizer_of
from library.training.prepare import WEIGHT_DTYPES
from library.training.randoms import Randoms
from library.training.saves import SAVE_DTYPES
from library.training.state import Length
from library.training.texts import Texts
from networks import deft, deft_factors, deft_io, deft_math, deft_save
from networks.deft import DeftNetwork
from networks.deft_module import DeftModule
from networks.deft_progress import Bar

LATENTS, TEXTS, TRAINING, SAMPLES = "caching latents", "caching texts", "training", "samples"
PHASES = (LATENTS, TEXTS, TRAINING, SAMPLES)
Peak = tuple[int, dict[str, int]]  # bytes, and what for
_DRAWN = 1  # steps of a sample that are looked at: the later ones are as this


@dataclass(frozen=True)
class Phase:
    """:param peak: bytes of the card at most, as torch's allocator counts them
    :param least: the same where the card has no more: pictures are put together of tiles then
    :param parts: that by what it is for, largest first
    :param work: of a step; of a batch, a text or a picture
    :param times: how often that is done
    """

    name: str
    peak: int
    least: int
    parts: dict[str, int]
    work: Work
    times: int


@dataclass(frozen=True)
class Estimate:
    """:param modules: of the adapter
    :param parameters: of it that are trained
    :param file: bytes of its tensors as they are saved
    :param state: bytes that a state holds
    :param host: bytes of the model as it is read, all of which goes through the host's memory
    :param latents: bytes that are cached of pictures
    :param texts: of captions and prompts
    """

    phases: tuple[Phase, ...]
    modules: int
    parameters: int
    file: int
    state: int
    host: int
    latents: int
    texts: int

    @property
    def deciding(self) -> Phase:
        """The phase that needs most."""
        return max(self.phases, key=lambda phase: phase.least)


class _Process:
    """What the training's rooms ask of an Accelerator."""

    device, num_processes, process_index, is_main_process, scaler = CARD, 1, 0, True, None

    def __init__(self, mixed_precision: str):
        self.mixed_precision = mixed_precision

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        if self.mixed_precision == "no":
            return contextlib.nullcontext()
        return torch.autocast("cuda", WEIGHT_DTYPES[self.mixed_precision])


def empty_model(run: Run) -> Family:
    """The training's, without values.

    :raises DeftError: as `library.models.loading.load`
    """
    return load(
        replace(run.model, xformers=False, torch_compile=None), WEIGHT_DTYPES[run.process.mixed_precision], empty=True
    )


def estimate(
    run: Run, given: Given, model: Family, rates: Rates | None, length: Length, drawings: int = 1,
    asked: Collection[str] = PHASES,
) -> Estimate:  # fmt: skip
    """:param model: of `empty_model`, which is used up
    :param length: of the whole training
    :param drawings: how often all samples are drawn
    :param asked: phases that are wanted; what they build upon is gone through too
    :raises Exception: of many kinds, where something cannot be done without values
    """
    with _silence(), Bar(len(asked), "estimating memory", "phases") as bar:
        ledger = Ledger(rates)
        with _no_bars():
            trial = _Trial(run, given, model, ledger, length)
        phases = []
        with pretending.card(), ledger, _little_to_collect():
            for name, times in zip(PHASES, trial.times(length.steps, drawings), strict=True):
                if times and (name in asked or name != LATENTS):
                    ledger.start()
                    with _no_bars():
                        short = trial.passes[name]()
                    phases.append(_phase(name, ledger, short or (ledger.peak, ledger.at_peak), times))
                if name in asked:
                    bar.add(1)
                if name == PHASES[max(map(PHASES.index, asked))]:
                    break
            ledger.forget()  # what is on the card goes behind it
    found = tuple(phase for phase in phases if phase.name in asked)
    return Estimate(
        found, trial.modules, trial.parameters, trial.file, trial.state, trial.host, trial.latents_kept,
        trial.texts_kept,
    )  # fmt: skip


def _phase(name: str, ledger: Ledger, short: Peak, times: int) -> Phase:
    """:param short: the peak where memory is short"""
    least, parts = short
    shown = {**{what: size for what, size in parts.items() if size > 0}, "cuBLAS": WORKSPACE}
    in_order = dict(sorted(shown.items(), key=lambda one: -one[1]))
    return Phase(name, ledger.peak + WORKSPACE, least + WORKSPACE, in_order, ledger.work, times)


class _Trial:
    """One pass of each phase, with the training's own rooms."""

    def __init__(self, run: Run, given: Given, model: Family, ledger: Ledger, length: Length):
        self.run, self.given, self.model, self.ledger = run, given, model, ledger
        self.process = cast(Accelerator, _Process(run.process.mixed_precision))
        self.caches, self.dtype = run.data.caches, WEIGHT_DTYPES[run.process.mixed_precision]
        self.objective, self.texts = objective_of(run.objective, model), Texts(model, self.process)
        self.adapter = _adapter(run, given, model, self.process)
        modules = self.adapter.module.all_modules
        self.modules = len(modules)
        with mock.patch.object(metadata, "sha256_of", return_value="0" * 64):  # of the model's file, which takes long
            self.fields = metadata.of_training(run, model, self.adapter, given.plan, length, 0)
        self.file = _saved(self.adapter, run, self.fields)
        self.parameters = self.state = self.texts_kept = 0
        parts = [part for part in model.pipeline.components.values() if isinstance(part, nn.Module)]
        self.host = sum(_bytes(one) for part in parts for one in part.parameters())
        shown = [
            (one.fit.bucket, 1 + one.subset.augment.flip_aug) for one in plan.pictures(given.plan) if not one.varies
        ]
        shown += [(one.crop.size, 1) for picture in plan.pictures(given.plan) for one in picture.inputs]
        self.latents_kept = sum(4 * number * math.prod(_latents_of(model, *size)) for size, number in shown)
        self.batch_of = _largest(given.plan)
        for prompt in given.samples:
            model.sampler(prompt.sampler or run.samples.sample_sampler)
        self.passes: dict[str, Callable[[], Peak | None]] = {
            LATENTS: self.latents,
            TEXTS: self.encode,
            TRAINING: self.step,
            SAMPLES: self.draw,
        }
        self.kept: Text = {}

    def times(self, steps: int, drawings: int) -> tuple[int, int, int, int]:
        """How often each pass is gone through in the training."""
        pictures = list(plan.pictures(self.given.plan))
        cached = sum(1 + one.subset.augment.flip_aug for one in pictures if not one.varies)
        inputs = len({(one.path, one.crop) for picture in pictures for one in picture.inputs})
        texts = len(set(self.given.texts_encoded(self.run.preservation)))
        loop = self.run.loop
        return (
            math.ceil((cached + inputs) / self.caches.vae_batch_size),
            math.ceil(texts / self._texts_at_once) if self.caches.cache_text_encoder_outputs else 0,
            steps * loop.gradient_accumulation_steps,
            len(self.given.samples) * drawings,
        )

    @property
    def _texts_at_once(self) -> int:
        return self.caches.text_encoder_batch_size or 1

    def latents(self) -> None:
        """A batch of the largest pictures."""
        dataset = self.batch_of.dataset
        vae, (width, height) = self.model.vae, self.batch_of.pictures[0].fit.bucket
        self._fill(vae, "VAE", CARD)
        number = min(self.caches.vae_batch_size, len(dataset.pictures))
        generators = [torch.Generator().manual_seed(i) for i in range(number)]
        self.model.encode_image(torch.zeros(number, 3, height, width), generators)
        if not any(one.varies for one in self.given.plan):
            vae.to("cpu")

    def encode(self) -> None:
        """A batch of texts; the encoders are gone behind it, and what they have made is there."""
        for encoder in self.model.text_encoders:
            self._fill(encoder, "text encoders", CARD)
        texts = self.batch_of.captions[:1] * self._texts_at_once
        with torch.no_grad(), self.process.autocast():
            self.kept = {name: value[:1].cpu() for name, value in self.model.encode_text(texts).items()}
        number = len(set(self.given.texts_encoded(self.run.preservation)))
        self.texts_kept = number * sum(map(_bytes, self.kept.values()))
        self.model.free_text_encoders()

    def step(self) -> None:
        """A step with the optimizer's state in place."""
        model, adapter, ledger, run = self.model, self.adapter, self.ledger, self.run
        if model.options.quantize_base:  # a byte a number, widened while a layer's turn is, as --fp8_base has it
            model.options = replace(model.options, fp8_base=True, quantize_base=None)
        encoders = [] if self.caches.cache_text_encoder_outputs else model.text_encoders
        for encoder in encoders:
            self._fill(encoder, "text encoders", torch.device("cpu"))
        self._fill(model.denoiser, _DENOISER, torch.device("cpu"))
        if any(one.varies for one in self.given.plan):  # encoded in every step
            self._fill(model.vae, "VAE", CARD)
        model.place(CARD, self.dtype, encoders=bool(encoders))
        ledger.claim(_DENOISER, _tensors(model.denoiser))
        ledger.claim("text encoders", [one for encoder in encoders for one in _tensors(encoder)])
        network = adapter.module
        pretending.filled(network, torch.device("cpu"))
        network.to(CARD)
        ledger.claim("adapter", _tensors(network))
        groups, _ = adapter.groups(run.optimizer)
        trained = list(adapter.parameters())
        self.parameters = sum(one.numel() for one in trained)
        for parameter in trained:
            parameter.register_post_accumulate_grad_hook(lambda one: ledger.claim("gradients", _given([one.grad])))
        self.state = sum(map(_bytes, _tensors(network)))
        self.state += self._optimized(groups, trained)
        losses = Losses(model, adapter, self._texts(), self.objective, run.preservation, self.process)
        batch = self.batch_of.batch(model)
        adapter.start_epoch()
        network.on_step_start(model.text_encoders, model.denoiser)
        losses(batch, Randoms(0, 0, range(len(batch)))).mean().backward()
        for parameter in trained:
            parameter.grad = None

    def _optimized(self, groups: list[dict[str, Any]], trained: list[nn.Parameter]) -> int:
        """Bytes of the optimizer's state, which stays: that of its own first step, or where its kernels read memory, as
        those of 8 bits, as many bytes."""
        options = self.run.optimizer
        for parameter in trained:
            parameter.grad = torch.empty_like(parameter)
        if "8bit" in options.optimizer_type.lower():
            size = int(sum(one.numel() for one in trained) * _bytes_a_number(options))
            self.kept_state = [torch.empty(size, dtype=torch.uint8, device=CARD)]
        else:
            optimizer = optimizer_of(options, groups)
            optimizer.step()
            leaves = [leaf for state in optimizer.state.values() for leaf in torch.utils._pytree.tree_leaves(state)]
            self.kept_state = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for parameter in trained:
            parameter.grad = None
        self.ledger.claim("optimizer state", self.kept_state)
        return sum(map(_bytes, self.kept_state))

    def draw(self) -> Peak:
        """The largest sample, in fewer steps.

        :returns: the peak where memory is short
        """
        model, process = self.model, self.process
        prompt = max(self.given.samples, key=lambda one: one.width * one.height)
        steps = min(_DRAWN, prompt.steps)
        network = self.adapter.module
        network.eval()
        self._fill(model.vae, "VAE", CARD)
        model.vae.to(CARD)
        self.ledger.claim("VAE", _tensors(model.vae))
        inputs = [torch.zeros(*self._latents_of(prompt.width, prompt.height), device=CARD) for _ in prompt.inputs]
        finished = mock.patch.object(model.pipeline.image_processor, "postprocess", _not_shown)
        with torch.no_grad(), process.autocast(), finished:
            texts = self._texts()
            text, negative = texts([prompt.text], [inputs]), texts([prompt.negative])
            once, self.ledger.work = self.ledger.work, Work()
            # by the family's own sampler: others compute their steps with numpy, and keep some latents at most
            latents = model.drawn(replace(prompt, steps=steps), text, negative, None, None, inputs)
            once.add(self.ledger.work, prompt.steps / steps)
            self.ledger.work = once
            short = self._decoded_in_tiles(latents)
            model.decode(latents)
            return short

    def _decoded_in_tiles(self, latents: Tensor) -> Peak:
        """The peak by now, or that of one tile; what decoding it takes is not counted."""
        ledger = self.ledger
        drawn, work = (ledger.peak, ledger.at_peak), ledger.work
        ledger.start()
        self.model.decode(latents[..., :TILE, :TILE])
        tile = ledger.peak, ledger.at_peak
        (ledger.peak, ledger.at_peak), ledger.work = drawn, work
        return max(drawn, tile, key=lambda one: one[0])

    def _latents_of(self, width: int, height: int) -> tuple[int, int, int]:
        return _latents_of(self.model, width, height)

    def _texts(self) -> Any:
        """The training's, or what stands for texts that are kept."""
        if not self.kept:
            return self.texts

        def repeated(captions: Sequence[str], inputs: Sequence[Sequence[Tensor]] = ()) -> Text:
            return {name: torch.cat([value] * len(captions)).to(CARD) for name, value in self.kept.items()}

        return repeated

    def _fill(self, module: nn.Module, what: str, device: torch.device) -> None:
        if next(module.parameters()).is_meta:
            pretending.filled(module, device)
            self.ledger.claim(what, _tensors(module))


_DENOISER = "denoiser"


@dataclass(frozen=True)
class _Largest:
    """The batch that takes most."""

    dataset: Dataset
    pictures: tuple[Picture, ...]

    @property
    def captions(self) -> list[str]:
        """The longest first."""
        found = [one.caption for one in self.dataset.pictures if one.alike == self.pictures[0].alike]
        return (sorted(found, key=len, reverse=True) * len(self.pictures))[: len(self.pictures)]

    def batch(self, model: Family) -> Batch:
        """As the loader makes it."""
        b, (width, height) = len(self.pictures), self.pictures[0].fit.bucket
        varies = self.dataset.varies
        masked = any(one.mask is not None or one.subset.alpha_mask for one in self.pictures)
        shape = _latents_of(model, width, height)
        inputs = [
            tuple(torch.zeros(*_latents_of(model, *one.crop.size)) for one in picture.inputs)
            for picture in self.pictures
        ]
        return Batch(
            latents=None if varies else torch.zeros(b, *shape),
            pixels=torch.zeros(b, 3, height, width) if varies else None,
            captions=self.captions,
            sizes=torch.zeros(b, 6),
            masks=torch.ones(b, 1, *shape[1:]) if masked else None,
            preserved=tuple(i for i, one in enumerate(self.pictures) if one.subset.preserved),
            inputs=tuple(inputs) if any(inputs) and model.takes_pictures else (),
        )


def _largest(pictures: plan.Plan) -> _Largest:
    """Of all data sets: memory goes by the pixels of a batch."""
    found = []
    for dataset in pictures:
        for alike, number in dataset.alike().items():
            group = [one for one in dataset.pictures if one.alike == alike]
            b = min(number, dataset.options.batch_size)
            pixels = b * (alike[0] * alike[1] + alike[2])
            found.append((pixels, _Largest(dataset, tuple((group * b)[:b]))))
    return max(found, key=lambda one: one[0])[1]


def _latents_of(model: Family, width: int, height: int) -> tuple[int, int, int]:
    step = model.pixels_per_latent
    return model.vae.config.latent_channels, height // step, width // step


def _adapter(run: Run, given: Given, model: Family, process: Accelerator) -> DeftAdapter:
    """The training's, on the meta device."""
    network_args = dict(run.network.network_args)
    if network_args.get("init") in ("svd", "minor"):  # which look at weights
        network_args["init"] = "identity"
    if given.to_keep:
        network_args.pop("keep")
    options = replace(run.network, network_args=network_args)
    without_values = replace(given, base=[], to_keep=[])
    with (
        torch.device("meta"),
        mock.patch.object(deft_math, "positive_qr", lambda A: (A, A)),
        mock.patch.object(DeftModule, "left_and_eraser", lambda module: (module.P, module.P)),
        mock.patch.object(DeftNetwork, "load_adapter", return_value=None),
    ):
        adapter = DeftAdapter(options, without_values, model, process, Path())
        for module in adapter.module.all_modules if given.to_keep else ():
            n = module.target.shape[1]
            module.kept = torch.empty(n, min(keep.DIRECTIONS, max(1, n // 4)))
    return adapter


def _saved(adapter: DeftAdapter, run: Run, fields: Mapping[str, str]) -> int:
    """Bytes of the adapter's file."""
    sizes = []

    def written(tensors: Mapping[str, Tensor], file: str, metadata: Mapping[str, str]) -> None:
        header = {
            name: {"dtype": "F16", "shape": list(one.shape), "data_offsets": [10**8] * 2}
            for name, one in tensors.items()
        }
        data = sum(one.numel() * one.element_size() for one in tensors.values())
        sizes.append(8 + len(json.dumps(header | {"__metadata__": dict(metadata)}, separators=(",", ":"))) + data)

    with (
        mock.patch.object(deft_save, "check_finite", return_value=None),
        mock.patch.object(deft_save, "warn_of_nothing_learnt", return_value=None),
        mock.patch.object(deft_save, "hash_of_base", return_value={}),
        mock.patch.object(DeftModule, "lora_factors", _factors),
        mock.patch.object(DeftModule, "left_and_eraser", lambda module: (module.P, module.P)),
        mock.patch.object(deft_factors, "balancing_exponent", return_value=0),
        mock.patch.object(deft_io, "_for_file", lambda tensor, dtype: tensor.to(dtype)),
        torch.device("meta"),
        mock.patch.object(deft_io, "write_hashed", written),
        torch.no_grad(),
    ):
        adapter.save(Path(), SAVE_DTYPES[run.saves.save_precision], fields)
    return sizes[0]


def _factors(module: DeftModule) -> tuple[Tensor, Tensor]:
    """`lora_factors` without what it computes."""
    m, n = module.target.shape[:2]
    return torch.empty(m, module.rank), torch.empty(module.rank, n)


def _bytes_a_number(options: OptimizerOptions) -> float:
    """That an optimizer of 8 bits keeps for each number it trains, as a small one of the same class says: a byte for
    each of its averages, and for blocks of 256 a factor in float32 (bitsandbytes)."""
    with torch._subclasses.fake_tensor.unset_fake_temporarily():
        state = on_trial(options).state
    leaves = [value for one in state.values() for value in torch.utils._pytree.tree_leaves(one)]
    return sum(1 + 4 / 256 for value in leaves if isinstance(value, Tensor) and value.numel() == 4)


def _not_shown(image: Tensor, output_type: str = "pil", **_: Any) -> Any:
    """Of an image processor of diffusers': without a picture of what has no values."""
    return image if output_type == "latent" else [None]


def _given(tensors: Iterable[Tensor | None]) -> list[Tensor]:
    return [one for one in tensors if one is not None]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    yield from module.parameters()
    yield from module.buffers()


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """What a training would say, it says itself."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def _little_to_collect() -> Iterator[None]:
    """Python's garbage collector passes over what is there already, which saves a quarter of the time."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextlib.contextmanager
def _no_bars() -> Iterator[None]:
    """One bar is enough."""
    with mock.patch.object(Bar, "add"), mock.patch.object(deft, "progress", lambda items, *_: items):
        yield
