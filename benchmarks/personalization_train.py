"""Training of `personalization.py`: the trainer's loss, AdamW and schedule, on a GPU side by side."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from diffusers import UNet2DConditionModel
from personalization_adapters import Adapter, adapter_of
from torch import Tensor, nn

from library.models.sd import StableDiffusion
from library.options.rooms import ObjectiveOptions
from library.training.objective import Diffusion
from library.world import concepts, draw
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
def data_set(model: StableDiffusion, concept: int, word: str, seed: int, steps: int) -> DataSet:
    """A concept's pictures, noised for every step from the seed."""
    pixels, captions = training_pictures(concept, word)
    device = next(model.denoiser.parameters()).device
    latents, text = model.pipeline.vae.encode(pixels.to(device)).latent_dist.mean, model.encode_text(captions)["hidden"]
    latents = (latents * model.vae.config.scaling_factor).cpu()
    generator = torch.Generator().manual_seed(1000 * concept + seed)
    objective = Diffusion(ObjectiveOptions(min_snr_gamma=GAMMA), model.noise_scheduler())
    noise = torch.randn(steps, *latents.shape, generator=generator)
    timesteps = torch.randint(0, objective.steps, (steps, len(latents)), generator=generator)
    every = latents.expand(steps, -1, -1, -1, -1).flatten(0, 1)
    noised = objective.at(every, noise.flatten(0, 1), timesteps.flatten())
    parts = (noised.noisy, noised.timesteps, noised.target, noised.weights)
    noisy, timesteps, target, weights = (part.unflatten(0, (steps, -1)).to(device) for part in parts)
    return DataSet(noisy, timesteps, target, weights, text, seed)


class Loss(nn.Module):
    """The mean of `Diffusion.loss` over pictures, of what `data_set` has noised.

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
    example: tuple[tuple[Tensor, Tensor, Tensor], Tensor] | None = None  # inputs, and the trained model's prediction

    @property
    def finite(self) -> bool:
        """Whether the training has held."""
        return math.isfinite(self.loss) and all(bool(d.isfinite().all()) for d in self.deltas.values())


class Lane:
    """One training, which can be started anew: from another seed, at another rate, on as many pictures.

    On a GPU a step is recorded once as a CUDA graph and replayed: the model would wait for the launches of its kernels.
    So rates, data and the step's number are tensors that the recorded step reads.

    :param adapter: on a U-Net of its own
    :param data: its shapes stay; without parameters nothing is trained
    """

    def __init__(self, adapter: Adapter, data: DataSet):
        self.adapter, self.data = adapter, data
        steps, device = len(data.noisy), data.noisy.device
        self.on_gpu = device.type == "cuda"
        self.loss = Loss(adapter.unet, data.text, adapter.extra, adapter.begin)
        self.at = torch.zeros(1, dtype=torch.long, device=device)  # the step's number
        self.losses = torch.zeros(steps, device=device)
        self.factors = torch.tensor([_factor(i, steps) for i in range(steps)], device=device)
        self.rates = [torch.tensor(float(group["lr"]), device=device) for group in adapter.groups]
        if adapter.groups:
            groups = [{"params": g["params"], "lr": r.clone()} for g, r in zip(adapter.groups, self.rates, strict=True)]
            self.optimizer = torch.optim.AdamW(groups, fused=True, capturable=self.on_gpu)
        self.stream = torch.cuda.Stream() if self.on_gpu else None
        self.graph: torch.cuda.CUDAGraph | None = None

    def restart(self, fresh: Adapter, data: DataSet) -> None:
        """Takes over an untrained adapter's state and rates, and other data of the same shapes."""
        pairs = list(zip(_state(self.adapter), _state(fresh), strict=True))
        with torch.no_grad():
            torch._foreach_copy_([mine for mine, _ in pairs], [theirs for _, theirs in pairs])
            for mine, theirs in zip(_tensors(self.data), _tensors(data), strict=True):
                mine.copy_(theirs)
        for rate, group in zip(self.rates, fresh.groups, strict=True):
            rate.fill_(float(group["lr"]))
        self.begin()

    def begin(self) -> None:
        """Before the first step."""
        self.adapter.unet.train()
        if self.adapter.extra is not None:
            self.adapter.extra.train()
        self.at.zero_()
        if self.adapter.groups:
            for state in self.optimizer.state.values():
                for value in state.values():
                    value.zero_()

    def step(self) -> None:
        """Gradients, clipping, AdamW; the next one of `begin`."""
        if not self.adapter.groups:
            return
        if self.graph is None:
            self._step()
            return
        with torch.cuda.stream(self.stream):
            self.graph.replay()

    def _step(self) -> None:
        self.optimizer.zero_grad()
        value = self.loss(*(tensor.index_select(0, self.at)[0] for tensor in _tensors(self.data)[:4]))
        value.backward()
        torch.nn.utils.clip_grad_norm_(self.adapter.parameters, CLIP)
        for rate, group in zip(self.rates, self.optimizer.param_groups, strict=True):
            group["lr"].copy_(rate * self.factors.index_select(0, self.at)[0])
        self.optimizer.step()
        self.losses.index_copy_(0, self.at, value.detach()[None])
        self.at += 1

    def record(self, warm_up: int) -> None:
        """Makes steps replays, on a GPU.

        :param warm_up: plain steps before, in which libraries set themselves up; they change the adapter
        :raises RuntimeError: for what cannot be recorded, such as a step that waits for the GPU
        """
        if self.stream is None or not self.adapter.groups:
            return
        self.stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(self.stream):
            for _ in range(warm_up):
                self._step()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=self.stream):
            self._step()
        torch.cuda.synchronize()
        self.graph = graph

    def check(self, fresh: Adapter, steps: int = 3) -> None:
        """Compares recorded steps with plain ones.

        :raises RuntimeError: when they move the adapter elsewhere
        """
        if self.graph is None:
            return
        graph, moved, losses = self.graph, [], []
        for self.graph in (None, graph):
            self.restart(fresh, self.data)
            torch.cuda.synchronize()
            before = [p.detach().clone() for p in self.adapter.parameters]
            for _ in range(steps):
                self.step()
            torch.cuda.synchronize()
            moved.append([p.detach() - was for p, was in zip(self.adapter.parameters, before, strict=True)])
            losses.append(self.losses[:steps].clone())
        size, off = float(_square(moved[0])), float(_square(torch._foreach_sub(*moved)))
        # Adam's first steps have every entry's sign, also where a gradient is mere rounding
        if not off <= 0.25 * size or not torch.allclose(*losses, rtol=0.01):
            raise RuntimeError(f"recorded steps are others: {off:.1e} of {size:.1e}, losses {losses}")


class Group:
    """Trainings of one adapter side by side, one a concept; for one rate and seed after the other."""

    def __init__(self, label: str, size: int, base: UNet2DConditionModel):
        self.label, self.size, self.base = label, size, base
        self.lanes: list[Lane] = []

    def _fresh(self, rate: float, seed: int) -> Adapter:
        torch.manual_seed(seed)
        return adapter_of(self.label)[0](copy.deepcopy(self.base), self.size, rate)

    def train(self, rate: float, sets: Sequence[DataSet]) -> list[Outcome]:
        """One adapter on each of these data sets, of one seed, which is the adapters' too.

        Call it with data sets of the same concepts again, or begin another group.
        """
        fresh = self._fresh(rate, sets[0].seed)
        if not self.lanes:
            for i, data in enumerate(sets):
                lane = Lane(self._fresh(rate, data.seed), data)
                lane.record(warm_up=1 if i else 3)
                if i == 0:
                    lane.check(fresh)
                self.lanes.append(lane)
        for lane, data in zip(self.lanes, sets, strict=True):
            lane.restart(fresh, data)
        _synchronise(self.base)  # the lanes' streams do not wait for what was set up on another
        for _ in range(len(sets[0].noisy)):
            for lane in self.lanes:
                lane.step()
        _synchronise(self.base)
        return [_outcome(lane) for lane in self.lanes]


def train(label: str, size: int, rate: float, base: UNet2DConditionModel, sets: Sequence[DataSet]) -> list[Outcome]:
    """One adapter on each of these data sets, side by side."""
    return Group(label, size, base).train(rate, sets)


def _square(tensors: Sequence[Tensor]) -> Tensor:
    return torch.stack(torch._foreach_norm(tensors)).square().sum()


def _synchronise(unet: UNet2DConditionModel) -> None:
    if unet.device.type == "cuda":
        torch.cuda.synchronize()


def _state(adapter: Adapter) -> list[Tensor]:
    """All of the adapted model's tensors that the optimizer or an initial state may set."""
    parts = [adapter.unet, *([adapter.extra] if adapter.extra is not None else [])]
    return [tensor for part in parts for tensor in (*part.parameters(), *part.buffers())]


def _tensors(data: DataSet) -> tuple[Tensor, ...]:
    return data.noisy, data.timesteps, data.target, data.weights, data.text


def _factor(step: int, steps: int) -> float:
    """diffusers' "cosine" with warm-up."""
    warm_up = min(WARM_UP, steps // 2)
    if step < warm_up:
        return step / max(1, warm_up)
    return max(0.0, 0.5 * (1 + math.cos(math.pi * (step - warm_up) / max(1, steps - warm_up))))


@torch.no_grad()
def _outcome(lane: Lane) -> Outcome:
    adapter, data = lane.adapter, lane.data
    adapter.unet.eval()
    if adapter.extra is not None:
        adapter.extra.eval()
    inputs = (data.noisy[0], data.timesteps[0], data.text)
    adapter.begin()
    example = (inputs, adapter.unet(*inputs).sample)
    loss = float(lane.losses[-50:].mean())
    norms = torch._foreach_norm([p.detach() for p in adapter.parameters]) if adapter.groups else [lane.losses[-1]]
    failed = not math.isfinite(loss) or not bool(torch.stack(list(norms)).isfinite().all())
    deltas = {} if failed else adapter.deltas()
    loss = math.nan if failed else loss
    return Outcome(deltas, adapter.number, loss, example)
