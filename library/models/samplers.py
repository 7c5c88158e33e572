"""The samplers of sd-scripts' --sample_sampler (commit 48d368fa, train_util.get_my_scheduler), by diffusers."""

from __future__ import annotations

import inspect
import logging
from collections.abc import Mapping
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler

from networks.deft_config import DeftError, nearest, reason_of

logger = logging.getLogger(__name__)

DEFAULT = "ddim"

# name -> diffusers' class, and what it is made with; names with k_ in front are the same
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),  # as Stable Diffusion has it; else 4 steps are the fewest
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}

_SMALLEST_ALPHA = 2.0**-24  # for SNR 0 in samplers that divide by it; diffusers' own value for Euler


def check(name: str | None, option: str) -> None:
    """Before a model is loaded. Raises as `sampler`."""
    sampler(name, DDPMScheduler().config, option)


def tell_euler_alone(name: str | None, model: str) -> None:
    """Of a model that is drawn by Euler's steps whatever is asked for, as sd-scripts draws those of flow matching.

    :param model: in words
    """
    if name not in (None, "euler", "k_euler"):
        logger.warning(f"--sample_sampler={name}: {model} is drawn by euler alone")


def sampler(name: str | None, config: Mapping[str, Any], option: str = "--sample_sampler") -> Any:
    """A scheduler of diffusers'.

    :param name: None for the default
    :param config: of the training's noise schedule
    :param option: that names it, for errors
    :raises DeftError: for an unknown name, or one whose packages are missing
    """
    known = name or DEFAULT
    kind, options = SAMPLERS.get(known.removeprefix("k_"), ("", {}))
    if not kind:
        raise DeftError(f"{option} {name}: no such sampler{nearest(known, SAMPLERS)}")
    made_by = getattr(diffusers, kind)
    if config.get("rescale_betas_zero_snr"):
        options = options | {"timestep_spacing": "trailing"}  # to begin where there is nothing but noise
        if "rescale_betas_zero_snr" not in inspect.signature(made_by.__init__).parameters:
            options |= {"trained_betas": _nearly_zero_snr(config)}
    try:
        return made_by.from_config(config, **options)
    except ImportError as error:  # LMS needs scipy
        raise DeftError(f"{option} {name}: {reason_of(error)}") from None


def _nearly_zero_snr(config: Mapping[str, Any]) -> list[float]:
    """The schedule's betas, its last SNR nearly 0."""
    alphas = DDPMScheduler.from_config(config).alphas_cumprod.double()
    alphas[-1] = _SMALLEST_ALPHA
    return (1 - alphas / torch.cat([alphas.new_ones(1), alphas[:-1]])).tolist()
