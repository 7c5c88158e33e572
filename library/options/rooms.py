"""What each room of the trainer is given: its own few values, typed, and nothing else.

A field has the name of its option, unless a comment says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class ModelOptions:
    """What model, and how it is held while it is trained on."""

    pretrained_model_name_or_path: str
    tokenizer: str | None = None
    tokenizer_cache_dir: str | None = None
    xformers: bool = False
    gradient_checkpointing: bool = False
    fp8_base: bool = False  # or --fp8_base_unet
    v2: bool = False
    v_parameterization: bool = False
    zero_terminal_snr: bool = False
    clip_skip: int | None = None
    max_token_length: int | None = None
    vae: str | None = None
    clip_l: str | None = None
    t5xxl: str | None = None
    ae: str | None = None
    t5xxl_max_token_length: int | None = None  # None: 512 for dev, 256 for schnell
    apply_t5_attn_mask: bool = False
    guidance_scale: float = 3.5


@dataclass(frozen=True)
class DataOptions:
    """Which pictures, and what becomes of them."""

    train_data_dir: str
    caption_extension: str  # with its dot
    transparent_background: tuple[int, int, int]
    resolution: tuple[int, int]  # width and height
    train_batch_size: int
    cache_text_encoder_outputs: bool
    text_encoder_batch_size: int | None


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

    optimizer_type: str = "AdamW"  # or what --use_8bit_adam and --use_lion_optimizer stand for
    optimizer_args: Mapping[str, Any] = field(default_factory=dict)
    learning_rate: float = 1e-4
    unet_lr: float | None = None
    text_encoder_lr: tuple[float, ...] = ()  # one for all encoders, or one for each
    lr_scheduler: str = "constant"
    lr_scheduler_type: str | None = None
    lr_scheduler_args: Mapping[str, Any] = field(default_factory=dict)
    lr_warmup_steps: int | float = 0  # a float is a share of all steps
    lr_decay_steps: int | float = 0  # likewise
    lr_scheduler_num_cycles: int = 1
    lr_scheduler_power: float = 1.0
    lr_scheduler_timescale: int | None = None
    lr_scheduler_min_lr_ratio: float | None = None


@dataclass(frozen=True)
class LoopOptions:
    """How long, and what a step is."""

    max_train_steps: int
    max_train_epochs: int | None
    gradient_accumulation_steps: int
    max_grad_norm: float
    max_nan_steps: int
    sample_every_n_epochs: int | None
    sample_every_n_steps: int | None
    sample_at_first: bool
    validate_every_n_epochs: int | None
    validate_every_n_steps: int | None


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
class ProcessOptions:
    """What accelerate sets up."""

    mixed_precision: str
    gradient_accumulation_steps: int
    ddp_timeout: int | None  # minutes
    cuda_allow_tf32: bool
    cuda_cudnn_benchmark: bool
    seed: int | None


@dataclass(frozen=True)
class SaveOptions:
    """Which files are written when and where, how many stay, and what a training goes on from."""

    output_dir: str
    output_name: str
    save_precision: str
    no_metadata: bool
    save_every_n_epochs: int | None
    save_every_n_steps: int | None
    save_n_epoch_ratio: int | None
    save_last_n_epochs: int | None
    save_last_n_steps: int | None
    save_state: bool
    save_state_on_train_end: bool
    save_last_n_epochs_state: int | None
    save_last_n_steps_state: int | None
    resume: str | None


@dataclass(frozen=True)
class SampleOptions:
    """What is drawn during the training; `LoopOptions` says when."""

    sample_prompts: str | None
    sample_sampler: str | None


@dataclass(frozen=True)
class ValidationOptions:
    """What is kept apart to be measured on; `LoopOptions` says when."""

    validation_split: float
    validation_seed: int | None
    max_validation_steps: int | None


@dataclass(frozen=True)
class LogOptions:
    """What is told of the training, and to whom."""

    logging_dir: str | None
    log_with: str | None
    log_prefix: str | None
    log_tracker_name: str | None
    log_tracker_config: str | None
    log_config: bool
    wandb_run_name: str | None
    wandb_api_key: str | None
    console_log_level: str
    console_log_file: str | None


@dataclass(frozen=True)
class Run:
    """A parsed command line.

    :param recorded: fields of the files' metadata, `ss_...`, with the values of their options
    """

    model: ModelOptions
    data: DataOptions
    network: NetworkOptions
    optimizer: OptimizerOptions
    process: ProcessOptions
    loop: LoopOptions
    objective: ObjectiveOptions
    saves: SaveOptions
    samples: SampleOptions
    validation: ValidationOptions
    logs: LogOptions
    recorded: Mapping[str, Any]
