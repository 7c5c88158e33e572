"""Noise, timesteps, target and loss of a training step."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from torch import Tensor


def diffusion_loss(
    predict: Callable[[Tensor, Tensor], Tensor],
    latents: Tensor,
    scheduler: DDPMScheduler,
    min_snr_gamma: float | None = None,
) -> Tensor:
    """Mean squared error of the prediction for random noise at random timesteps; a float32 scalar.

    :param predict: (noisy latents, timesteps (b,)) to a prediction in the latents' shape
    :param latents: (b, c, h, w), where the noise is drawn too
    :param scheduler: the noise schedule; its `prediction_type` decides between noise and velocity as the target
    :param min_snr_gamma: weights timesteps as in Hang et al., arXiv 2303.09556, section 3.4; None for equal weights
    """
    noise = torch.randn_like(latents)
    steps = scheduler.config.num_train_timesteps
    timesteps = torch.randint(0, steps, (latents.shape[0],), device=latents.device)
    noisy_latents = scheduler.add_noise(latents, noise, timesteps)
    velocity = scheduler.config.prediction_type == "v_prediction"
    target = scheduler.get_velocity(latents, noise, timesteps) if velocity else noise
    prediction = predict(noisy_latents, timesteps).float()
    if min_snr_gamma is None:
        return F.mse_loss(prediction, target.float())
    ratio = compute_snr(scheduler, timesteps)
    weights = ratio.clamp(max=min_snr_gamma) / (ratio + 1 if velocity else ratio)
    return (F.mse_loss(prediction, target.float(), reduction="none").flatten(1).mean(1) * weights).mean()
