"""Training of `personalization.py`: the trainer's loss, AdamW and schedule, on a GPU side by side."""

from __future__ import annotations

import contextlib
import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from diffusers import UNet2DConditionModel
from diffusers.training_utils import compute_snr
from personalization_adapters import Adapter, adapter_of
from torch import Tensor, nn

from library import sd
from library.world import concepts, draw
from library.world.backward import backward_of
from library.world.scenes import BACKGROUNDS

WARM_UP = 10
GAMMA = 5.0
CLIP = 1.0


# --- what is trained on ----------------------------------------------------------------------------------------------


@dataclass
class DataSet:
    """All that the steps see, drawn beforehand: the same for every adapter. The first dimension is the steps'."""

    noisy: Tensor  # (steps, b, c, h, w)
    timesteps: Tensor  # (steps, b)
    target: Tensor  # (steps, b, c, h, w)
    weights: Tensor  # (steps, b)
    text: Tensor  # (b, tokens, width)
    seed: int


def training_pictures(concept: int, word: str) -> tuple[Tensor, list[str]]:
    """Three to six pictures of a creature on different backgrounds (b, 3, 64, 64), and their captions."""
    rng = random.Random(f"personalization {concept}")
    backgrounds = rng.sample(BACKGROUNDS, rng.randint(3, 6))
    pixels = draw.render([concepts.portrait(concepts.creature(concept), rng, name) for name in backgrounds])
    return pixels, [f"{word} on a {name} background" for name in backgrounds]


@torch.no_grad()
def data_set(model: sd.StableDiffusion, concept: int, word: str, seed: int, steps: int) -> DataSet:
    """A concept's pictures, noised for every step from the seed."""
    pixels, captions = training_pictures(concept, word)
    device = model.unet.device
    latents, text = model.pipeline.vae.encode(pixels.to(device)).latent_dist.mean, model.encode_text(captions)
    latents = (latents * model.vae.config.scaling_factor).cpu()
    generator, scheduler = torch.Generator().manual_seed(1000 * concept + seed), model.noise_scheduler()
    number = scheduler.config.num_train_timesteps
    noise = torch.randn(steps, *latents.shape, generator=generator)
    timesteps = torch.randint(0, number, (steps, len(latents)), generator=generator)
    every = latents.expand(steps, -1, -1, -1, -1).flatten(0, 1)
    noisy = scheduler.add_noise(every, noise.flatten(0, 1), timesteps.flatten()).view_as(noise)
    ratio = compute_snr(scheduler, timesteps.flatten()).view_as(timesteps)
    noisy, timesteps, noise = noisy.to(device), timesteps.to(device), noise.to(device)
    return DataSet(noisy, timesteps, noise, (ratio.clamp(max=GAMMA) / ratio).to(device), text, seed)


class Loss(nn.Module):
    """`library.noise.diffusion_loss` with min-SNR's weights, on noise that is given.

    :param extra: what holds parameters beside the U-Net
    """

    def __init__(self, unet: UNet2DConditionModel, text: Tensor, extra: nn.Module | None, begin: Callable[[], None]):
        super().__init__()
        self.unet, self.extra, self.text, self.begin = unet, extra, text, begin

    def forward(self, noisy: Tensor, timesteps: Tensor, target: Tensor, weights: Tensor) -> Tensor:
        self.begin()
        prediction = self.unet(noisy, timesteps, self.text).sample
        return ((prediction - target).square().flatten(1).mean(1) * weights).mean()


# --- training --------------------------------------------------------------------------------------------------------


@dataclass
class Outcome:
    """A trained adapter: what it adds to the weights, and what there is to tell."""

    deltas: dict[str, Tensor]
    parameters: int
    loss: float
    notes: list[str] = field(default_factory=list)
    example: tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None = None  # inputs, and the trained model's prediction

    @property
    def finite(self) -> bool:
        """Whether the training has held."""
        return math.isfinite(self.loss) and all(bool(d.isfinite().all()) for d in self.deltas.values())


def gradients_of(loss: Loss, example: tuple[Tensor, ...], parameters: list[nn.Parameter]) -> tuple[Callable, str]:
    """`backward_of`, on a GPU checked against plain steps with other weights than those recorded, else plain steps."""

    def plain(*inputs: Tensor) -> Tensor:
        loss.zero_grad()
        value = loss(*inputs)
        value.backward()
        return value.detach()

    if example[0].device.type != "cuda":
        return plain, ""
    kept = [p.detach().clone() for p in parameters]
    try:
        graph = backward_of(loss, example)
        recorded = [p.grad for p in parameters]
        with torch.no_grad():
            for p in parameters:
                p.add_(torch.randn_like(p) * (float(p.std()) if p.numel() > 1 and bool(p.any()) else 0.01), alpha=0.01)
        graph(*example)
        found = [None if p.grad is None else p.grad.clone() for p in parameters]
        plain(*example)
        expected = [p.grad for p in parameters]
        missing = sum(a is None and b is not None for a, b in zip(found, expected, strict=True))
        pairs = [(a, b) for a, b in zip(found, expected, strict=True) if a is not None and b is not None]
        off = math.fsum(float((a - b).square().sum()) for a, b in pairs)
        size = math.fsum(float(b.square().sum()) for _, b in pairs)
        right = missing == 0 and off <= 1e-4 * size
        note = "" if right else f"eager: the graph's gradients are off ({off:.1e} of {size:.1e}, {missing} missing)"
    except (RuntimeError, TypeError, AssertionError) as error:
        note = f"eager: no CUDA graph ({str(error).splitlines()[0][:120] if str(error) else type(error).__name__})"
        torch.cuda.synchronize()
    finally:
        with torch.no_grad():
            for p, before in zip(parameters, kept, strict=True):
                p.copy_(before)
    if note:
        return plain, note
    for p, gradient in zip(parameters, recorded, strict=True):
        p.grad = gradient
    return graph, ""


@dataclass
class Lane:
    """One training. `step` leaves gradients; what is None is not trained."""

    adapter: Adapter
    data: DataSet
    note: str = ""
    step: Callable[..., Tensor] | None = None
    optimizer: torch.optim.Optimizer | None = None
    schedule: torch.optim.lr_scheduler.LRScheduler | None = None
    stream: torch.cuda.Stream | None = None
    losses: list[Tensor] = field(default_factory=list)

    def train_step(self, i: int) -> None:
        """Gradients, clipping, AdamW."""
        assert self.step is not None
        assert self.optimizer is not None
        assert self.schedule is not None
        with torch.cuda.stream(self.stream) if self.stream is not None else contextlib.nullcontext():
            self.losses.append(self.step(*(t[i] for t in _inputs(self.data))).clone())
            torch.nn.utils.clip_grad_norm_(self.adapter.parameters, CLIP)
            self.optimizer.step()
            self.schedule.step()


def lane_of(label: str, size: int, rate: float, base: UNet2DConditionModel, data: DataSet) -> Lane:
    """An adapter on a U-Net of its own, ready to be trained. The seed of the data is the adapter's too."""
    build, _ = adapter_of(label)
    on_gpu, steps = base.device.type == "cuda", len(data.noisy)
    torch.manual_seed(data.seed)
    adapter = build(copy.deepcopy(base), size, rate)
    if not adapter.groups:
        return Lane(adapter, data)
    adapter.unet.train()
    loss = Loss(adapter.unet, data.text, adapter.extra, adapter.begin)
    step, note = gradients_of(loss, tuple(t[0] for t in _inputs(data)), adapter.parameters)
    optimizer = torch.optim.AdamW(adapter.groups, fused=on_gpu)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(_factor, steps=steps))
    return Lane(adapter, data, note, step, optimizer, schedule, torch.cuda.Stream() if on_gpu else None)


def train(label: str, size: int, rate: float, base: UNet2DConditionModel, sets: Sequence[DataSet]) -> list[Outcome]:
    """One adapter on each of these data sets, side by side on a GPU."""
    lanes = [lane_of(label, size, rate, base, data) for data in sets]
    if base.device.type == "cuda":
        torch.cuda.synchronize()  # the lanes' streams do not wait for what was set up on another
    for i in range(len(sets[0].noisy)):
        for lane in lanes:
            if lane.step is not None:
                lane.train_step(i)
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return [_outcome(lane.adapter, lane.data, lane.losses, lane.note) for lane in lanes]


def _inputs(data: DataSet) -> tuple[Tensor, ...]:
    return data.noisy, data.timesteps, data.target, data.weights


def _factor(step: int, steps: int) -> float:
    """diffusers' "cosine" with warm-up."""
    warm_up = min(WARM_UP, steps // 2)
    if step < warm_up:
        return step / max(1, warm_up)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))))


@torch.no_grad()
def _outcome(adapter: Adapter, data: DataSet, losses: list[Tensor], note: str) -> Outcome:
    adapter.unet.eval()
    if adapter.extra is not None:
        adapter.extra.eval()
    inputs = (data.noisy[0], data.timesteps[0], data.text)
    adapter.begin()
    example = (inputs, adapter.unet(*inputs).sample)
    loss = float(torch.stack(losses[-50:]).mean()) if losses else 0.0
    failed = not math.isfinite(loss) or any(not bool(p.isfinite().all()) for p in adapter.parameters)
    deltas = {} if failed else adapter.deltas()
    loss = math.nan if failed else loss
    return Outcome(deltas, adapter.number, loss, notes=[note] if note else [], example=example)
