"""What each room of the trainer is given: its own few values, typed, and nothing else.

A field has the name of its option, unless a comment says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ModelOptions:
    """What model, and how it is held while it is trained on."""

    pretrained_model_name_or_path: str
    tokenizer: str | None = None
    tokenizer_cache_dir: str | None = None
    xformers: bool = False
    gradient_checkpointing: bool = False
    v2: bool = False
    v_parameterization: bool = False
    zero_terminal_snr: bool = False
    clip_skip: int | None = None
    max_token_length: int | None = None
    vae: str | None = None


@dataclass(frozen=True)
class DataOptions:
    """Which pictures, and what becomes of them."""

    train_data_dir: str
    caption_extension: str  # with its dot
    transparent_background: tuple[int, int, int]
    resolution: tuple[int, int]  # width and height
    train_batch_size: int


@dataclass(frozen=True)
class NetworkOptions:
    """The adapter, and what of the model it adapts."""

    network_dim: int | None
    network_alpha: float
    network_args: Mapping[str, Any]  # and `neuron_dropout`, where --network_dropout is given
    network_weights: str | None
    dim_from_weights: bool
    network_train_unet_only: bool
    network_train_text_encoder_only: bool
    base_weights: tuple[tuple[str, float], ...]  # files and their strengths, --base_weights_multiplier
    scale_weight_norms: float | None


@dataclass(frozen=True)
class OptimizerOptions:
    """What moves the adapter, and how fast."""

    learning_rate: float
    unet_lr: float | None
    text_encoder_lr: float | None
    lr_scheduler: str
    lr_warmup_steps: int


@dataclass(frozen=True)
class LoopOptions:
    """How long, and what a step is."""

    max_train_steps: int
    max_train_epochs: int | None
    gradient_accumulation_steps: int
    max_grad_norm: float
    max_nan_steps: int
    mixed_precision: str
    seed: int | None
    save_every_n_epochs: int | None
    save_every_n_steps: int | None
    sample_every_n_epochs: int | None
    sample_every_n_steps: int | None
    sample_at_first: bool


@dataclass(frozen=True)
class ObjectiveOptions:
    """Noise, timesteps, target and loss. None is off; the defaults are sd-scripts'."""

    min_snr_gamma: float | None = None
    scale_v_pred_loss_like_noise_pred: bool = False
    v_pred_like_loss: float | None = None
    debiased_estimation_loss: bool = False
    noise_offset: float | None = None
    noise_offset_random_strength: bool = False
    adaptive_noise_scale: float | None = None
    multires_noise_iterations: int | None = None
    multires_noise_discount: float = 0.3
    ip_noise_gamma: float | None = None
    ip_noise_gamma_random_strength: bool = False
    min_timestep: int = 0
    max_timestep: int = 1000  # itself left out, unless it is min_timestep
    loss_type: str = "l2"
    huber_schedule: str = "snr"
    huber_c: float = 0.1
    huber_scale: float = 1.0
    timestep_sampling: str = "sigma"
    sigmoid_scale: float = 1.0
    discrete_flow_shift: float = 3.0
    model_prediction_type: str = "sigma_scaled"
    weighting_scheme: str = "uniform"
    logit_mean: float = 0.0
    logit_std: float = 1.0
    mode_scale: float = 1.29


@dataclass(frozen=True)
class OutputOptions:
    """Where files go, and what is in them."""

    output_dir: str
    output_name: str
    save_precision: str
    no_metadata: bool
    sample_prompts: str | None
    sample_sampler: str | None
    logging_dir: str | None


@dataclass(frozen=True)
class Run:
    """A parsed command line.

    :param recorded: fields of the files' metadata, `ss_...`, with the values of their options
    """

    model: ModelOptions
    data: DataOptions
    network: NetworkOptions
    optimizer: OptimizerOptions
    loop: LoopOptions
    objective: ObjectiveOptions
    output: OutputOptions
    recorded: Mapping[str, Any]
