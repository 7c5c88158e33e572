"""What a model is asked in a step: noise, timesteps, target, and what an error costs. Meaning and formulas are those of
sd-scripts' train_network.py and flux_train_network.py (commit 48d368fa)."""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler, FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import (
    compute_density_for_timestep_sampling,
    compute_loss_weighting_for_sd3,
    compute_snr,
)
from torch import Tensor

from library.models.family import Family
from library.options.rooms import ObjectiveOptions
from library.training.randoms import Purpose, Randoms
from library.transfer import sent
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)

# options that one objective alone has
DIFFUSION_ONLY = (
    "min_snr_gamma", "scale_v_pred_loss_like_noise_pred", "v_pred_like_loss", "debiased_estimation_loss",
    "noise_offset", "noise_offset_random_strength", "adaptive_noise_scale", "multires_noise_iterations",
    "multires_noise_discount", "min_timestep", "max_timestep",
)  # fmt: skip
FLOW_ONLY = (
    "timestep_sampling", "sigmoid_scale", "discrete_flow_shift", "model_prediction_type", "weighting_scheme",
    "logit_mean", "logit_std", "mode_scale",
)  # fmt: skip

_OF_THE_FAMILY = ("timestep_sampling", "model_prediction_type")  # where they are not given
_LARGEST_SNR = 1000.0  # in weights that divide by it; sd-scripts' bound


@dataclass(frozen=True)
class Noised:
    """A batch as the model sees it, and what is wanted of the answer. All on the latents' device, in float32.

    :param noisy: (b, c, h, w)
    :param timesteps: (b,) from 0 to 1000; int64 for diffusion
    :param target: (b, c, h, w)
    :param weights: (b,) of the pictures' losses
    :param thresholds: (b,) where a Huber loss goes over from square to linear; None for other losses
    """

    noisy: Tensor
    timesteps: Tensor
    target: Tensor
    weights: Tensor
    thresholds: Tensor | None

    def of(self, which: Tensor) -> Noised:
        """Some of the pictures, whose numbers (n,) are on the latents' device."""
        chosen: dict[str, Any] = {one.name: getattr(self, one.name) for one in fields(self)}
        chosen = {name: None if value is None else value[which] for name, value in chosen.items()}
        return Noised(**chosen)


class Objective(ABC):
    """The training's question and its marks; `draw` before the model is called, `loss` behind it.

    :param options: with all that a family decides, see `objective_of`
    :param steps: how many timesteps there are
    """

    def __init__(self, options: ObjectiveOptions, steps: int):
        self.options, self.steps = options, steps

    @property
    @abstractmethod
    def bounds(self) -> tuple[int, int]:
        """Of the timesteps that are trained at."""

    def draw(self, randoms: Randoms, latents: Tensor, timesteps: Tensor | None = None) -> Noised:
        """Latents (b, c, h, w) with random noise.

        :param randoms: of this batch's pictures
        :param timesteps: (b,) for a validation; None to draw them
        """
        noise = self._noise(randoms, latents)
        timesteps = self._timesteps(randoms, latents) if timesteps is None else timesteps
        return self.at(latents, noise, sent(timesteps, latents.device), self._perturbed(randoms, noise))

    @abstractmethod
    def at(self, latents: Tensor, noise: Tensor, timesteps: Tensor, noise_in: Tensor | None = None) -> Noised:
        """Latents with this noise at these timesteps.

        :param latents: (b, c, h, w)
        :param noise: (b, c, h, w), which the target has
        :param timesteps: (b,) from 0 to 1000
        :param noise_in: (b, c, h, w), which the model sees; None for `noise`
        """

    def loss(self, noised: Noised, prediction: Tensor, masks: Tensor | None = None) -> Tensor:
        """(b,), float32; its mean is the training's loss.

        :param prediction: (b, c, h, w), the model's answer
        :param masks: (b, 1, h, w), factors of what each place costs
        """
        error = self.answer(noised, prediction.float()) - noised.target
        cost = self._cost(error, noised.thresholds)
        return noised.weights * (cost if masks is None else cost * masks).flatten(1).mean(1)

    @abstractmethod
    def _timesteps(self, randoms: Randoms, latents: Tensor) -> Tensor: ...

    def _noise(self, randoms: Randoms, latents: Tensor) -> Tensor:
        return sent(randoms.normal(Purpose.NOISE, latents.shape[1:]), latents.device)

    def _perturbed(self, randoms: Randoms, noise: Tensor) -> Tensor | None:
        """Input perturbation, arXiv 2301.11706: the model sees other noise than it is asked for."""
        gamma = self.options.ip_noise_gamma
        if gamma is None:
            return None
        more = sent(randoms.normal(Purpose.PERTURBATION, noise.shape[1:]), noise.device)
        if self.options.ip_noise_gamma_random_strength:
            more = more * sent(_each(randoms.uniform(Purpose.PERTURBATION_STRENGTH)), noise.device)
        return noise + gamma * more

    def answer(self, noised: Noised, prediction: Tensor) -> Tensor:
        """The prediction as it is compared with the target, both (b, c, h, w) in float32."""
        return prediction

    def _cost(self, error: Tensor, thresholds: Tensor | None) -> Tensor:
        """Of every value of an error (b, c, h, w)."""
        if thresholds is None:
            return error.abs() if self.options.loss_type == "l1" else error.square()
        c = _each(thresholds)
        # 2 (sqrt(e^2 + c^2) - c), written so that small errors do not vanish beside c
        cost = 2 * error.square() / ((error.square() + c.square()).sqrt() + c)
        return c * cost if self.options.loss_type == "huber" else cost

    def _thresholds(self, timesteps: Tensor) -> Tensor | None:
        """(b,), of a Huber loss: always huber_c, or from 1 at timestep 0 down to huber_c."""
        options = self.options
        if options.loss_type not in ("huber", "smooth_l1"):
            return None
        share = timesteps / self.steps if options.huber_schedule == "exponential" else torch.ones_like(timesteps)
        return options.huber_scale * torch.exp(math.log(options.huber_c) * share.float())


class Diffusion(Objective):
    """Stable Diffusion's: the noise, or the velocity, of latents on a noise schedule.

    :param scheduler: its `prediction_type` decides what is asked for
    :raises DeftError: for weights that are not meant for what the model predicts
    """

    def __init__(self, options: ObjectiveOptions, scheduler: DDPMScheduler):
        super().__init__(options, scheduler.config.num_train_timesteps)
        self.scheduler = scheduler
        # weights come from the schedule before its end is moved to SNR 0, as sd-scripts' do: none is 0 or infinite
        self.weighing = DDPMScheduler.from_config(scheduler.config, rescale_betas_zero_snr=False)
        self.velocity = scheduler.config.prediction_type == "v_prediction"
        if options.scale_v_pred_loss_like_noise_pred and not self.velocity:
            raise DeftError(
                "--scale_v_pred_loss_like_noise_pred: this model predicts noise, not velocity; leave it out"
            )
        if options.v_pred_like_loss is not None and self.velocity:
            raise DeftError("--v_pred_like_loss: this model predicts velocity anyway; leave it out")

    @property
    def bounds(self) -> tuple[int, int]:
        """See `Objective`."""
        return self.options.min_timestep, min(self.options.max_timestep, self.steps)

    def at(self, latents: Tensor, noise: Tensor, timesteps: Tensor, noise_in: Tensor | None = None) -> Noised:
        """See `Objective`."""
        latents, noise = latents.float(), noise.float()
        noisy = self.scheduler.add_noise(latents, noise if noise_in is None else noise_in.float(), timesteps)
        target = self.scheduler.get_velocity(latents, noise, timesteps) if self.velocity else noise
        return Noised(noisy, timesteps, target, self._weights(timesteps), self._thresholds(timesteps))

    def _noise(self, randoms: Randoms, latents: Tensor) -> Tensor:
        options, noise = self.options, super()._noise(randoms, latents)
        if options.noise_offset is not None:
            strength: Tensor | float = options.noise_offset
            if options.noise_offset_random_strength:
                strength = strength * sent(_each(randoms.uniform(Purpose.OFFSET_STRENGTH)), noise.device)
            if options.adaptive_noise_scale is not None:
                means = latents.float().mean((2, 3), keepdim=True).abs()
                strength = (strength + options.adaptive_noise_scale * means).clamp(min=0)
            noise = noise + strength * sent(randoms.normal(Purpose.OFFSET, (noise.shape[1], 1, 1)), noise.device)
        if options.multires_noise_iterations is not None:
            ratios = 2 + 2 * randoms.uniform(Purpose.MULTIRES_RATIOS, (options.multires_noise_iterations,))
            pictures = zip(randoms.each(), noise, ratios.tolist(), strict=True)
            noise = torch.stack([self._in_many_sizes(*picture) for picture in pictures])
        return noise

    def _in_many_sizes(self, randoms: Randoms, noise: Tensor, ratios: list[float]) -> Tensor:
        """One picture's noise (c, h, w) and ever coarser noise on top, at a standard deviation of 1."""
        c, h, w = noise.shape
        sizes = []
        for i, ratio in enumerate(ratios):
            sizes.append((max(1, int(h / ratio**i)), max(1, int(w / ratio**i))))
            if 1 in sizes[-1]:
                break
        drawn = sent(randoms.normal(Purpose.MULTIRES, (sum(c * m * n for m, n in sizes),)), noise.device)
        for i, (size, part) in enumerate(zip(sizes, drawn.split([c * m * n for m, n in sizes], 1), strict=True)):
            coarse = F.interpolate(part.view(1, c, *size), (h, w), mode="bilinear")[0]
            noise = noise + self.options.multires_noise_discount**i * coarse
        return noise / noise.std()

    def _timesteps(self, randoms: Randoms, latents: Tensor) -> Tensor:
        low, high = self.bounds
        return randoms.integers(Purpose.TIMESTEPS, low, max(high, low + 1))  # both alike: always that one

    def _weights(self, timesteps: Tensor) -> Tensor:
        """min-SNR: arXiv 2303.09556, section 3.4; debiased: arXiv 2310.08442."""
        options = self.options
        asked = options.min_snr_gamma, options.v_pred_like_loss
        plain = not (options.scale_v_pred_loss_like_noise_pred or options.debiased_estimation_loss)
        if plain and all(one is None for one in asked):
            return torch.ones_like(timesteps, dtype=torch.float32)
        # as `add_noise` does with its own: `compute_snr` would move them in every step
        self.weighing.alphas_cumprod = self.weighing.alphas_cumprod.to(timesteps.device)
        snr = compute_snr(self.weighing, timesteps)
        limited = snr.clamp(max=_LARGEST_SNR)
        like_noise = limited / (limited + 1)
        weights = torch.ones_like(snr)
        if options.min_snr_gamma is not None:
            weights = weights * snr.clamp(max=options.min_snr_gamma) / (snr + 1 if self.velocity else snr)
        if options.scale_v_pred_loss_like_noise_pred:
            weights = weights * like_noise
        if options.v_pred_like_loss is not None:
            weights = weights * (1 + options.v_pred_like_loss / like_noise)
        if options.debiased_estimation_loss:
            weights = weights * (1 / (limited + 1) if self.velocity else limited.rsqrt())
        return weights

    def _thresholds(self, timesteps: Tensor) -> Tensor | None:
        thresholds = super()._thresholds(timesteps)
        if thresholds is None or self.options.huber_schedule != "snr":
            return thresholds
        alphas = self.scheduler.alphas_cumprod.to(timesteps.device)[timesteps].float()
        sigmas = ((1 - alphas) / alphas).sqrt()  # infinite at SNR 0, where the threshold is huber_c
        return (1 - self.options.huber_c) / (1 + sigmas).square() + self.options.huber_c


class Flow(Objective):
    """FLUX's: the way from latents to noise, which are mixed by sigma, from 0 to 1. Timesteps are 1000 sigma.

    :raises DeftError: for a Huber schedule that needs a noise schedule
    """

    def __init__(self, options: ObjectiveOptions):
        super().__init__(options, 1000)
        if options.loss_type in ("huber", "smooth_l1") and options.huber_schedule == "snr":
            raise DeftError(
                f"--loss_type={options.loss_type}: for this model, --huber_schedule must be constant or exponential"
            )
        shift = options.discrete_flow_shift
        self.schedule = FlowMatchEulerDiscreteScheduler(self.steps, shift=shift)
        linear = options.timestep_sampling == "shift"
        self.shifting = FlowMatchEulerDiscreteScheduler(time_shift_type="linear" if linear else "exponential")

    @property
    def bounds(self) -> tuple[int, int]:
        """See `Objective`."""
        return 0, self.steps

    def at(self, latents: Tensor, noise: Tensor, timesteps: Tensor, noise_in: Tensor | None = None) -> Noised:
        """See `Objective`."""
        latents, noise, timesteps = latents.float(), noise.float(), timesteps.float()
        sigmas = timesteps / self.steps
        noisy = (1 - _each(sigmas)) * latents + _each(sigmas) * (noise if noise_in is None else noise_in.float())
        weights = torch.ones_like(sigmas)
        if self.options.model_prediction_type == "sigma_scaled":
            weights = compute_loss_weighting_for_sd3(self.options.weighting_scheme, sigmas)
        return Noised(noisy, timesteps, noise - latents, weights, self._thresholds(timesteps))

    def _timesteps(self, randoms: Randoms, latents: Tensor) -> Tensor:
        options, sampling = self.options, self.options.timestep_sampling
        if sampling == "sigma":
            return self._of_the_schedule(randoms)
        if sampling == "uniform":
            return self.steps * randoms.uniform(Purpose.TIMESTEPS)
        sigmas = torch.sigmoid(options.sigmoid_scale * randoms.normal(Purpose.TIMESTEPS))
        if sampling == "shift":
            sigmas = self.shifting.time_shift(options.discrete_flow_shift, 1.0, sigmas)
        elif sampling == "flux_shift":
            from diffusers.pipelines.flux.pipeline_flux import calculate_shift  # brings the whole pipeline

            tokens = (latents.shape[2] // 2) * (latents.shape[3] // 2)
            sigmas = self.shifting.time_shift(calculate_shift(tokens), 1.0, sigmas)
        return self.steps * sigmas

    def _of_the_schedule(self, randoms: Randoms) -> Tensor:
        """Timesteps of the shifted schedule, as often as `weighting_scheme` says."""
        options = self.options
        places = [
            compute_density_for_timestep_sampling(
                options.weighting_scheme,
                1,
                options.logit_mean,
                options.logit_std,
                options.mode_scale,
                generator=generator,
            )
            for generator in randoms.generators(Purpose.TIMESTEPS)
        ]
        index = (torch.cat(places) * self.steps).long()
        return self.schedule.timesteps[index.clamp(0, self.steps - 1)]

    def answer(self, noised: Noised, prediction: Tensor) -> Tensor:
        kind = self.options.model_prediction_type
        if kind == "additive":
            return noised.noisy + prediction
        if kind == "sigma_scaled":
            return noised.noisy - _each(noised.timesteps / self.steps) * prediction
        return prediction


def objective_of(given: ObjectiveOptions, model: Family) -> Objective:
    """The objective of a model's family; options without effect are told, a line for each reason.

    :raises DeftError: for options that this model cannot be trained with
    """
    flow = model.objective == "flow"
    own = {name: getattr(model, name) for name in _OF_THE_FAMILY}
    options = replace(given, **{name: value for name, value in own.items() if getattr(given, name) is None})
    objective = Flow(options) if flow else Diffusion(options, model.noise_scheduler())  # type: ignore[attr-defined]
    for line in without_effect(options, flow):
        logger.warning(line)
    if flow and options.model_prediction_type == "sigma_scaled":
        logger.warning(
            "--model_prediction_type=sigma_scaled, sd-scripts' default, trains towards another answer than the model "
            "was made for; give raw unless that is meant"
        )
    return objective


def without_effect(options: ObjectiveOptions, flow: bool) -> Iterator[str]:
    """A line for each reason why options that are given change nothing; sd-scripts' defaults, which the GUI writes for
    every model, are not called given."""
    sampling, scheme = options.timestep_sampling, options.weighting_scheme
    reasons = (
        (not flow, FLOW_ONLY, "this model is none of flow matching"),
        (flow, DIFFUSION_ONLY, "this model is trained by flow matching"),
        (options.loss_type in ("l1", "l2"), ("huber_schedule", "huber_c", "huber_scale"),
         f"--loss_type is {options.loss_type}"),
        (options.huber_schedule == "snr", ("huber_scale",), "--huber_schedule is snr"),
        (options.noise_offset is None, ("noise_offset_random_strength",), "--noise_offset is not given"),
        (options.multires_noise_iterations is None, ("multires_noise_discount",),
         "--multires_noise_iterations is not given"),
        (options.ip_noise_gamma is None, ("ip_noise_gamma_random_strength",), "--ip_noise_gamma is not given"),
        (sampling in ("sigma", "uniform"), ("sigmoid_scale",), f"--timestep_sampling is {sampling}"),
        (sampling not in ("sigma", "shift"), ("discrete_flow_shift",), f"--timestep_sampling is {sampling}"),
        (sampling != "sigma" and scheme in ("logit_normal", "mode"),
         ("weighting_scheme", "logit_mean", "logit_std", "mode_scale"), f"--timestep_sampling is {sampling}"),
        (options.model_prediction_type != "sigma_scaled" and scheme in ("sigma_sqrt", "cosmap"),
         ("weighting_scheme",), f"--model_prediction_type is {options.model_prediction_type}"),
        (scheme != "logit_normal", ("logit_mean", "logit_std"), f"--weighting_scheme is {scheme}"),
        (scheme != "mode", ("mode_scale",), f"--weighting_scheme is {scheme}"),
    )  # fmt: skip
    usual = {field.name: field.default for field in fields(options)}
    usual |= {name: getattr(Family, name) for name in _OF_THE_FAMILY}
    given = {name for name, value in usual.items() if getattr(options, name) != value}
    for applies, names, why in reasons:
        unused = [f"--{name}" for name in names if name in given]
        if applies and unused:
            given -= set(names)
            yield f"{', '.join(unused)}: without effect, since {why}"


def _each(values: Tensor) -> Tensor:
    """(b,) as factors of (b, c, h, w)."""
    return values.view(-1, 1, 1, 1)
