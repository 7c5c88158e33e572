"""What each room of the trainer is given: its own few values, typed, and nothing else.

A field has the name of its option, unless a comment says which.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

PRESERVED = "diff_output_preservation"  # the one custom attribute that means something


@dataclass(frozen=True)
class ModelOptions:
    """What model, and how it is held while it is trained on."""

    pretrained_model_name_or_path: str
    tokenizer: str | None = None
    tokenizer_cache_dir: str | None = None
    xformers: bool = False
    gradient_checkpointing: bool = False
    fp8_base: bool = False  # or --fp8_base_unet
    quantize_base: str | None = None  # "int8", "fp8", "nf4"
    blocks_to_swap: int = 0
    cpu_offload_checkpointing: bool = False
    torch_compile: str | None = None  # a backend, --dynamo_backend
    v2: bool = False
    v_parameterization: bool = False
    zero_terminal_snr: bool = False
    clip_skip: int | None = None
    max_token_length: int | None = None
    weighted_captions: bool = False
    vae: str | None = None
    clip_l: str | None = None
    t5xxl: str | None = None
    ae: str | None = None
    t5xxl_max_token_length: int | None = None  # None: 512 for dev, 256 for schnell
    apply_t5_attn_mask: bool = False
    guidance_scale: float = 3.5


@dataclass(frozen=True)
class CaptionOptions:
    """What becomes of a subset's captions; names, defaults and meaning are sd-scripts'."""

    caption_separator: str = ","
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str | None = None
    secondary_separator: str | None = None
    enable_wildcard: bool = False
    caption_prefix: str | None = None
    caption_suffix: str | None = None
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    condition_dropout_prob: float | None = None  # see `library.data.captions.condition_dropout`
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_step: float = 0  # below 1: a share of all steps

    @property
    def changing(self) -> list[str]:
        """Its options that make another caption in every step, which cannot be encoded once."""
        names = ("shuffle_caption", "enable_wildcard", "token_warmup_step", "caption_dropout_rate",
                 "caption_dropout_every_n_epochs", "caption_tag_dropout_rate")  # fmt: skip
        return [name for name in names if getattr(self, name)]


@dataclass(frozen=True)
class AugmentOptions:
    """What is changed at random in a subset's pictures."""

    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None  # None with buckets, which know no faces

    @property
    def varies(self) -> bool:
        """Whether pixels may be others in every epoch, beyond being mirrored."""
        return self.random_crop or self.color_aug or self.face_crop_aug_range is not None


@dataclass(frozen=True)
class SubsetOptions:
    """A folder of pictures with captions beside them, a metadata file or instructions, and what is done with them."""

    image_dir: str | None
    metadata_file: str | None = None  # kohya's JSON with captions, tags and paths; --in_json
    train_jsonl: str | None = None  # instructions, their input pictures, and the pictures that are wanted
    image_path: str | None = None  # what its paths are relative to; None: its own folder
    num_repeats: int = 1
    class_tokens: str | None = None  # the caption of those that have none
    is_reg: bool = False
    caption_extension: str = ".caption"  # with its dot
    conditioning_data_dir: str | None = None  # masks
    alpha_mask: bool = False
    custom_attributes: Mapping[str, Any] = field(default_factory=dict)
    resize_interpolation: str | None = None
    validation_split: float = 0.0
    validation_seed: int | None = None
    captions: CaptionOptions = CaptionOptions()
    augment: AugmentOptions = AugmentOptions()

    @property
    def name(self) -> str:
        """Of its folder or file, as sd-scripts names it."""
        return self.place.name

    @property
    def place(self) -> Path:
        """Its folder or file."""
        return Path(self.metadata_file or self.train_jsonl or self.image_dir or "")

    @property
    def preserved(self) -> bool:
        """Whether its pictures are to be answered as without the adapter."""
        return bool(self.custom_attributes.get(PRESERVED))


@dataclass(frozen=True)
class BucketOptions:
    """Which sizes pictures are brought to, in pixels."""

    resolution: tuple[int, int]  # width and height
    enable_bucket: bool = False
    min_bucket_reso: int = 256
    max_bucket_reso: int = 1024
    bucket_reso_steps: int = 64
    bucket_no_upscale: bool = False
    skip_image_resolution: tuple[int, int] | None = None  # pictures of no more pixels are left out


@dataclass(frozen=True)
class DatasetOptions:
    """Subsets whose pictures share buckets and batches."""

    subsets: tuple[SubsetOptions, ...]
    buckets: BucketOptions
    batch_size: int = 1
    network_multiplier: float = 1.0


@dataclass(frozen=True)
class CacheOptions:
    """What is computed once, and where it is kept."""

    cache_dir: str | None = None  # None: the user's own folder for caches
    cache_latents_to_disk: bool = False
    cache_text_encoder_outputs: bool = False
    cache_text_encoder_outputs_to_disk: bool = False
    vae_batch_size: int = 1
    text_encoder_batch_size: int | None = None
    skip_cache_check: bool = False

    @property
    def folder(self) -> Path | None:
        """`cache_dir` as a path."""
        return None if self.cache_dir is None else Path(self.cache_dir)


@dataclass(frozen=True)
class DataOptions:
    """Which pictures, and what becomes of them."""

    datasets: tuple[DatasetOptions, ...]
    dataset_config: str | None = None  # that says what they are
    train_data_dir: str | None = None  # whose folders are subsets, where it is so
    reg_data_dir: str | None = None  # likewise
    transparent_background: tuple[int, int, int] = (255, 255, 255)
    max_input_image_size: int = 1024  # pixels of the longest side of an input picture
    masked_loss: bool = False
    debug_dataset: bool = False
    caches: CacheOptions = CacheOptions()


@dataclass(frozen=True)
class PreservationOptions:
    """What holds the model to what it could do, beside the adapter's own `keep`."""

    prior_loss_weight: float = 1.0  # of regularisation pictures
    diff_output_preservation_class: str | None = None  # the prompt's words in place of --trigger_word
    trigger_word: str | None = None
    diff_output_preservation_multiplier: float = 1.0

    def of_class(self, caption: str) -> str | None:
        """The caption with the class's words in place of the trigger's; None without trigger or class."""
        trigger, words = self.trigger_word, self.diff_output_preservation_class
        if words is None or not trigger or trigger not in caption:
            return None
        return caption.replace(trigger, words)


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
    timestep_sampling: str | None = None  # None: the family's
    sigmoid_scale: float = 1.0
    discrete_flow_shift: float = 3.0
    model_prediction_type: str | None = None  # None: the family's
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
    dry_run: bool = False


@dataclass(frozen=True)
class SaveOptions:
    """Which files are written when and where, how many stay, and what a training goes on from."""

    output_dir: str
    output_name: str
    save_precision: str
    no_metadata: bool
    verify_saves: bool
    sidecars: bool
    model_card: bool
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
class MeterOptions:
    """When drift and what is learnt are measured, and what comes of it."""

    meter_every_n_steps: int | None  # None: as often as costs little; 0: never
    stop_at_drift: float | None


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
class ReportOptions:
    """Whether there is a page of the training, and what it says of the options.

    :param settings: that differ from their defaults, without secrets
    :param arguments: as they were typed, without secrets
    """

    no_report: bool = False
    settings: Mapping[str, Any] = field(default_factory=dict, compare=False)
    arguments: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Run:
    """A parsed command line.

    :param recorded: fields of the files' metadata, `ss_...`, with the values of their options
    """

    model: ModelOptions
    data: DataOptions
    preservation: PreservationOptions
    network: NetworkOptions
    optimizer: OptimizerOptions
    process: ProcessOptions
    loop: LoopOptions
    objective: ObjectiveOptions
    saves: SaveOptions
    samples: SampleOptions
    validation: ValidationOptions
    meters: MeterOptions
    logs: LogOptions
    report: ReportOptions
    recorded: Mapping[str, Any]
