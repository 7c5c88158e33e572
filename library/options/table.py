"""Every option once: those of sd-scripts' train_network.py, sdxl_ and flux_train_network.py (48d368fa, v0.11.1); ours.

A row is an option's name, type, default and help, the field of the files' metadata that keeps it, and, where it is not
honoured, why. The command line and the TOML reader are made of these rows; `rooms` takes their values apart.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

Check = tuple[Callable[[Any], bool], str]  # whether a value is good, and what it must be

AT_LEAST_1: Check = (lambda value: value >= 1, "at least 1")
AT_LEAST_0: Check = (lambda value: 0 <= value < math.inf, "a number of at least 0")
ABOVE_0: Check = (lambda value: 0 < value < math.inf, "a number above 0")
FINITE: Check = (lambda value: math.isfinite(value), "a finite number")
TIMESTEP: Check = (lambda value: 0 <= value <= 999, "from 0 to 999")
PAST_TIMESTEP: Check = (lambda value: 1 <= value <= 1000, "from 1 to 1000")
MODE_SCALE: Check = (lambda value: -1 <= value <= 1.75, "from -1 to 1.75")  # arXiv 2403.03206, section 3.1
SEED: Check = (lambda value: 0 <= value < 2**32, f"from 0 to {2**32 - 1}")


@dataclass(frozen=True)
class Option:
    """A row of the table.

    :param kind: bool for a switch, otherwise what makes a value of a string
    :param help: for `--help`, one line; where the option is not honoured, why, and what to do instead
    :param many: whether it takes several values
    :param check: of each value
    :param metadata: the name of the field, `ss_...`
    :param status: "" where it is honoured; "always" where it asks for what is done anyway; "refused" or "to come"
    """

    name: str
    kind: Any
    default: Any = None
    help: str = ""
    choices: Sequence[str | int] = ()
    many: bool = False
    check: Check | None = None
    metadata: str | None = None
    metavar: str | None = None
    status: str = ""
    group: str = ""


def steps_or_share(text: str) -> int | float:
    """An int for steps, a float for a share of all steps, which is below 1 or in %.

    :raises argparse.ArgumentTypeError: for anything else
    """
    try:
        if text.endswith("%"):
            return float(text[:-1]) / 100
        number = float(text)
        return int(text) if number >= 1 else number or 0
    except ValueError:
        told = f"'{text}' must be a whole number of steps, or a share of them as 0.1 or 10%"
        raise argparse.ArgumentTypeError(told) from None


def _group(title: str, *options: Option) -> list[Option]:
    return [replace(option, group=title) for option in options]


# sd-scripts' defaults of what is not honoured: in a configuration they ask for nothing, and nor does 0
_ASK_FOR_NOTHING = {
    "prior_loss_weight": 1,
    "dataset_repeats": 1, "min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64,
    "caption_separator": ",", "token_warmup_min": 1, "dynamo_backend": "inductor", "zero_stage": 2,
}  # fmt: skip


def asks_for_nothing(name: str, text: str) -> bool:
    """Whether an option that is not honoured has a value that changes nothing in sd-scripts either."""
    neutral = _ASK_FOR_NOTHING.get(name)
    try:
        return float(text) in (0, neutral)
    except ValueError:
        return text in ("", neutral)


def _not_honoured(status: str, kind: Any, reason: str, *names: str, many: bool = False) -> list[Option]:
    """Options alike: switches, or such that take a value, of any kind."""
    return [Option(name, kind, False if kind is bool else None, reason, many=many, status=status) for name in names]


def _always(reason: str, *switches: str) -> list[Option]:
    return _not_honoured("always", bool, reason, *switches)


def _refused(reason: str, *names: str, switch: bool = False, many: bool = False) -> list[Option]:
    return _not_honoured("refused", bool if switch else str, reason, *names, many=many)


def _to_come(reason: str, *names: str, switch: bool = False, many: bool = False) -> list[Option]:
    return _not_honoured("to come", bool if switch else str, reason, *names, many=many)


IN_SD_SCRIPTS = "not here yet; sd-scripts has it, with --network_module networks.deft"
_DATA = "data sets in sd-scripts' form are not read here yet"
_MEMORY = "small cards and speed are to come; sd-scripts has it, with --network_module networks.deft"
_DEEPSPEED = "DeepSpeed is not used here; several GPUs train by accelerate launch"
_HUB = "nothing is sent to or fetched from a hub here; upload the file yourself"

# fields of Stability AI's ModelSpec that are the author's to fill in
MODEL_SPEC = {
    "title": "the model's name (--output_name)", "author": "who made it", "description": "what it is",
    "license": "its licence", "tags": "words to find it by, separated by commas", "usage_hint": "how to use it",
    "thumbnail": "a picture's file, or a data URL", "merged_from": "models that it is made of",
    "trigger_phrase": "what calls the concept", "preprocessor": "what its input needs",
    "is_negative_embedding": "whether it is one",
}  # fmt: skip
LEVELS = ("DEBUG", "INFO", "WARNING", "ERROR", "CRITICAL")
TRACKERS = ("tensorboard", "wandb", "trackio", "all")
SCHEDULERS = (
    "constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt",
    "cosine_with_min_lr", "warmup_stable_decay", "piecewise_constant", "adafactor",
)  # fmt: skip
SAMPLERS = (
    "ddim", "pndm", "lms", "euler", "euler_a", "heun", "dpm_2", "dpm_2_a", "dpmsolver", "dpmsolver++", "dpmsingle",
    "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a",
)  # fmt: skip

OPTIONS: list[Option] = [
    *_group(
        "model",
        Option("pretrained_model_name_or_path", str, metavar="PATH", help="a Diffusers folder or a .safetensors file"),
        Option("tokenizer", str, metavar="DIR", help="folder with the CLIP tokenizer, for single files"),
        Option("tokenizer_cache_dir", str, metavar="DIR", help="folder that holds openai_clip-vit-large-patch14/"),
        Option("xformers", bool, False, "memory-efficient attention by xformers, where it is installed"),
        *_always("torch's scaled dot product attention is used anyway", "sdpa", "mem_eff_attn"),
        *_always("the VAE computes in float32 anyway", "no_half_vae"),
        Option("v2", bool, False, "the model is of Stable Diffusion 2.x; it is recognised anyway"),
        Option("v_parameterization", bool, False, "it predicts velocity, which a single file of 2.x does not say"),
        Option(
            "zero_terminal_snr",
            bool,
            False,
            "nothing but noise at the last timestep; for models that predict velocity",
            metadata="ss_zero_terminal_snr",
        ),
        Option(
            "clip_skip",
            int,
            None,
            "SD 1.x, 2.x: the text encoder's layer, counted from the last",
            check=AT_LEAST_1,
            metadata="ss_clip_skip",
        ),
        Option(
            "max_token_length",
            int,
            None,
            "tokens of a caption that are read (75 where nothing is given)",
            (75, 150, 225),
            metadata="ss_max_token_length",
        ),
        Option("vae", str, metavar="PATH", help="another VAE: a .safetensors file or a folder"),
        Option("clip_l", str, metavar="FILE", help="FLUX: CLIP-L, a .safetensors file or its folder"),
        Option("t5xxl", str, metavar="FILE", help="FLUX: T5-XXL, a .safetensors file or its folder"),
        Option("ae", str, metavar="FILE", help="FLUX: the VAE, a .safetensors file or its folder"),
        Option(
            "t5xxl_max_token_length",
            int,
            None,
            "FLUX: tokens that T5 reads (512 for dev and 256 for schnell where none is given)",
            check=AT_LEAST_1,
        ),
        Option("apply_t5_attn_mask", bool, False, "FLUX: what fills a caption up is not attended to"),
        Option(
            "guidance_scale", float, 3.5, "FLUX dev: the guidance that it is told while it is trained", check=FINITE
        ),
        Option("model_type", str, "flux", "of FLUX's transformers, the one that is trained here", ("flux",)),
        *_refused("a FLUX ControlNet is trained by sd-scripts' own script", "controlnet_model_name_or_path"),
        *_refused("sd-scripts has given it up too, for --blocks_to_swap", "split_mode", switch=True),
        *_refused("inpainting models are trained by sd-scripts, with networks.deft", "train_inpainting", switch=True),
    ),
    *_group(
        "data",
        Option("train_data_dir", str, metavar="DIR", help="folder of folders named REPEATS_NAME, e.g. 10_sks cat"),
        Option("caption_extension", str, ".txt", "captions beside the images"),
        Option(
            "transparent_background",
            str,
            "white",
            metavar="COLOUR",
            help="behind transparent pictures, a name or #RRGGBB",
        ),
        Option("resolution", str, "512", "WIDTH,HEIGHT or one number for both"),
        Option(
            "train_batch_size",
            int,
            1,
            "images a step and device",
            check=AT_LEAST_1,
            metadata="ss_batch_size_per_device",
        ),
        Option("cache_text_encoder_outputs", bool, False, "encode texts once, then free the text encoders"),
        Option("text_encoder_batch_size", int, None, "captions at once where they are encoded once", check=AT_LEAST_1),
        *_always("latents are cached in memory anyway", "cache_latents"),
        *_always(
            "pictures are read once, before the training",
            "persistent_data_loader_workers",
            "skip_cache_check",
            "cache_info",
        ),
        *_not_honoured(
            "always", str, "pictures are read once, before the training", "max_data_loader_n_workers", "vae_batch_size"
        ),
        *_to_come(
            _DATA,
            "dataset_config",
            "reg_data_dir",
            "prior_loss_weight",
            "in_json",
            "dataset_class",
            "dataset_repeats",
            "min_bucket_reso",
            "max_bucket_reso",
            "bucket_reso_steps",
            "resize_interpolation",
            "caption_separator",
            "keep_tokens",
            "keep_tokens_separator",
            "secondary_separator",
            "caption_prefix",
            "caption_suffix",
            "token_warmup_min",
            "token_warmup_step",
            "caption_dropout_rate",
            "caption_dropout_every_n_epochs",
            "caption_tag_dropout_rate",
            "face_crop_aug_range",
            "conditioning_data_dir",
        ),
        *_to_come(
            _DATA,
            "debug_dataset",
            "enable_bucket",
            "bucket_no_upscale",
            "shuffle_caption",
            "enable_wildcard",
            "weighted_captions",
            "color_aug",
            "flip_aug",
            "random_crop",
            "masked_loss",
            "alpha_mask",
            "cache_latents_to_disk",
            "cache_text_encoder_outputs_to_disk",
            "skip_image_resolution",
            switch=True,
        ),
        *_refused("it is written --caption_extension", "caption_extention"),
    ),
    *_group(
        "network",
        Option(
            "network_module", str, "networks.deft", "what is trained", ("networks.deft",), metadata="ss_network_module"
        ),
        Option("network_dim", int, None, "rank (4 where nothing is given)"),
        Option("network_alpha", float, 1.0, "scale is alpha / dim"),
        Option("network_args", str, (), "see docs/options.md", many=True, metavar="KEY=VALUE"),
        Option("network_dropout", float, None, "probability of dropping each of the rank's values"),
        Option("network_weights", str, metavar="FILE", help="LoRA or DEFT file to start from"),
        Option("dim_from_weights", bool, False, "take ranks and options from --network_weights"),
        Option("network_train_unet_only", bool, False, "leave the text encoder alone"),
        Option("network_train_text_encoder_only", bool, False, "leave the U-Net alone"),
        Option("base_weights", str, (), "adapter files to merge into the model first", many=True, metavar="FILE"),
        Option(
            "base_weights_multiplier", float, (), "their strengths (1 where none is given)", many=True, check=FINITE
        ),
        Option(
            "scale_weight_norms",
            float,
            None,
            "largest norm of a layer's delta",
            check=AT_LEAST_0,
            metadata="ss_scale_weight_norms",
        ),
    ),
    *_group(
        "training",
        Option("optimizer_type", str, "", "sd-scripts' names, or MODULE.CLASS (AdamW where none is given)"),
        Option("optimizer_args", str, (), "its further arguments", many=True, metavar="KEY=VALUE"),
        Option("use_8bit_adam", bool, False, "--optimizer_type AdamW8bit"),
        Option("use_lion_optimizer", bool, False, "--optimizer_type Lion"),
        Option(
            "learning_rate",
            float,
            1e-4,
            "of what has no rate of its own",
            check=AT_LEAST_0,
            metadata="ss_learning_rate",
        ),
        Option("unet_lr", float, None, "the U-Net's own rate", check=AT_LEAST_0, metadata="ss_unet_lr"),
        Option(
            "text_encoder_lr",
            float,
            (),
            "the text encoders' own rate, or one for each",
            many=True,
            check=AT_LEAST_0,
            metadata="ss_text_encoder_lr",
        ),
        Option("lr_scheduler", str, "constant", "how the rate changes", SCHEDULERS, metadata="ss_lr_scheduler"),
        Option("lr_scheduler_type", str, None, "a class instead, of torch.optim.lr_scheduler or MODULE.CLASS"),
        Option("lr_scheduler_args", str, (), "further arguments of the schedule", many=True, metavar="KEY=VALUE"),
        Option(
            "lr_warmup_steps",
            steps_or_share,
            0,
            "steps of rising rate, or a share of all steps (0.1 or 10%%)",
            check=AT_LEAST_0,
            metadata="ss_lr_warmup_steps",
        ),
        Option("lr_decay_steps", steps_or_share, 0, "steps of falling rate, or their share", check=AT_LEAST_0),
        Option("lr_scheduler_num_cycles", int, 1, "how often the cosine restarts", check=AT_LEAST_0),
        Option("lr_scheduler_power", float, 1.0, "of polynomial", check=FINITE),
        Option("lr_scheduler_timescale", int, None, "of inverse_sqrt (the warmup's steps)", check=AT_LEAST_1),
        Option("lr_scheduler_min_lr_ratio", float, None, "the least rate, as a share of the rate", check=AT_LEAST_0),
        Option("max_train_steps", int, 1600, "how long", check=AT_LEAST_1),
        Option("max_train_epochs", int, None, "overrides --max_train_steps", check=AT_LEAST_1),
        Option(
            "gradient_accumulation_steps",
            int,
            1,
            "batches a step",
            check=AT_LEAST_1,
            metadata="ss_gradient_accumulation_steps",
        ),
        Option(
            "gradient_checkpointing",
            bool,
            False,
            "less memory, a third more time",
            metadata="ss_gradient_checkpointing",
        ),
        Option(
            "max_grad_norm", float, 1.0, "gradient clipping, 0 is off", check=AT_LEAST_0, metadata="ss_max_grad_norm"
        ),
        Option("max_nan_steps", int, 10, "stop after this many non-finite losses in a row", check=AT_LEAST_1),
        Option(
            "mixed_precision",
            str,
            "no",
            "what the model computes in",
            ("no", "fp16", "bf16"),
            metadata="ss_mixed_precision",
        ),
        Option("seed", int, None, "of everything random (a new one each run where none is given)", check=SEED),
        *_refused("sd-scripts steps so only where it trains a whole model", "fused_backward_pass", switch=True),
    ),
    *_group(
        "objective",
        Option(
            "min_snr_gamma",
            float,
            None,
            "weight timesteps by min(SNR, this) / SNR; 5 is usual, 0 is off",
            check=AT_LEAST_0,
            metadata="ss_min_snr_gamma",
        ),
        Option(
            "debiased_estimation_loss",
            bool,
            False,
            "weight timesteps by 1 / sqrt(SNR)",
            metadata="ss_debiased_estimation",
        ),
        Option("scale_v_pred_loss_like_noise_pred", bool, False, "velocity: weight timesteps as for noise"),
        Option("v_pred_like_loss", float, None, "noise: add this share of the velocity's loss", check=AT_LEAST_0),
        Option(
            "noise_offset",
            float,
            None,
            "shift each channel's noise by a random number of this size; 0.1 is usual",
            check=AT_LEAST_0,
            metadata="ss_noise_offset",
        ),
        Option(
            "noise_offset_random_strength",
            bool,
            False,
            "a random size up to --noise_offset for each picture",
            metadata="ss_noise_offset_random_strength",
        ),
        Option(
            "adaptive_noise_scale",
            float,
            None,
            "add this times the channel's mean to --noise_offset",
            check=FINITE,
            metadata="ss_adaptive_noise_scale",
        ),
        Option(
            "multires_noise_iterations",
            int,
            None,
            "add coarser noise so many times; 6 to 10 is usual",
            check=AT_LEAST_0,
            metadata="ss_multires_noise_iterations",
        ),
        Option(
            "multires_noise_discount",
            float,
            0.3,
            "each time this much weaker",
            check=AT_LEAST_0,
            metadata="ss_multires_noise_discount",
        ),
        Option(
            "ip_noise_gamma",
            float,
            None,
            "show the model this much more noise than is asked for; 0.1 is usual",
            check=AT_LEAST_0,
            metadata="ss_ip_noise_gamma",
        ),
        Option(
            "ip_noise_gamma_random_strength",
            bool,
            False,
            "a random size up to --ip_noise_gamma for each picture",
            metadata="ss_ip_noise_gamma_random_strength",
        ),
        Option("min_timestep", int, 0, "lowest timestep that is drawn", check=TIMESTEP),
        Option("max_timestep", int, 1000, "timesteps are drawn below this one", check=PAST_TIMESTEP),
        Option(
            "loss_type",
            str,
            "l2",
            "what an error costs",
            ("l1", "l2", "huber", "smooth_l1"),
            metadata="ss_loss_type",
        ),
        Option(
            "huber_schedule",
            str,
            "snr",
            "how huber_c depends on the timestep",
            ("constant", "exponential", "snr"),
            metadata="ss_huber_schedule",
        ),
        Option(
            "huber_c",
            float,
            0.1,
            "error above which the cost grows linearly",
            check=ABOVE_0,
            metadata="ss_huber_c",
        ),
        Option("huber_scale", float, 1.0, "factor of huber_c", check=ABOVE_0, metadata="ss_huber_scale"),
        Option(
            "timestep_sampling",
            str,
            "sigma",
            "FLUX: how timesteps are drawn",
            ("sigma", "uniform", "sigmoid", "shift", "flux_shift"),
            metadata="ss_timestep_sampling",
        ),
        Option(
            "sigmoid_scale",
            float,
            1.0,
            "FLUX: spread of sigmoid, shift and flux_shift",
            check=ABOVE_0,
            metadata="ss_sigmoid_scale",
        ),
        Option(
            "discrete_flow_shift",
            float,
            3.0,
            "FLUX: above 1, sigma and shift draw more noise",
            check=ABOVE_0,
            metadata="ss_discrete_flow_shift",
        ),
        Option(
            "model_prediction_type",
            str,
            "sigma_scaled",
            "FLUX: what becomes of the answer; raw is what it was made for",
            ("raw", "additive", "sigma_scaled"),
            metadata="ss_model_prediction_type",
        ),
        Option(
            "weighting_scheme",
            str,
            "uniform",
            "FLUX: density of sigma's timesteps, or sigma_scaled's weights",
            ("sigma_sqrt", "logit_normal", "mode", "cosmap", "none", "uniform"),
            metadata="ss_weighting_scheme",
        ),
        Option("logit_mean", float, 0.0, "FLUX: of logit_normal", check=FINITE, metadata="ss_logit_mean"),
        Option("logit_std", float, 1.0, "FLUX: of logit_normal", check=AT_LEAST_0, metadata="ss_logit_std"),
        Option("mode_scale", float, 1.29, "FLUX: of mode", check=MODE_SCALE, metadata="ss_mode_scale"),
    ),
    *_group(
        "saving",
        Option("output_dir", str, metavar="DIR", help="where everything is written"),
        Option("output_name", str, "last", "name of the adapter file", metadata="ss_output_name"),
        Option("save_precision", str, "fp16", "of the adapter file", ("float", "fp16", "bf16")),
        Option("save_every_n_epochs", int, None, "also after every so many epochs", check=AT_LEAST_1),
        Option("save_every_n_steps", int, None, "also after every so many steps", check=AT_LEAST_1),
        Option("save_n_epoch_ratio", int, None, "save so many times, instead of every n epochs", check=AT_LEAST_1),
        Option("save_last_n_epochs", int, None, "keep the last so many of each epoch's files", check=AT_LEAST_1),
        Option("save_last_n_steps", int, None, "keep the files of the last so many steps", check=AT_LEAST_0),
        Option("save_state", bool, False, "with each file, what --resume goes on from"),
        Option("save_state_on_train_end", bool, False, "only with the last file"),
        Option("save_last_n_epochs_state", int, None, "as --save_last_n_epochs, of states", check=AT_LEAST_1),
        Option("save_last_n_steps_state", int, None, "as --save_last_n_steps, of states", check=AT_LEAST_0),
        Option("resume", str, metavar="DIR", help="a state: go on where it was saved, as if nothing had happened"),
        *_refused(
            "--resume goes on where its state was saved, in the middle of an epoch too", "initial_epoch", "initial_step"
        ),
        *_always("--resume goes on where its state was saved", "skip_until_initial_step"),
        Option("no_metadata", bool, False, "keep the training's settings out of the file"),
        Option("training_comment", str, None, "goes into the file's metadata", metadata="ss_training_comment"),
        Option("save_model_as", str, "safetensors", "the one format that is written", ("safetensors",)),
        *[
            Option(f"metadata_{name}", str, None, f"{what}, in the file's metadata", metadata=f"modelspec.{name}")
            for name, what in MODEL_SPEC.items()
        ],
        *_refused(
            _HUB,
            "huggingface_repo_id",
            "huggingface_repo_type",
            "huggingface_path_in_repo",
            "huggingface_token",
            "huggingface_repo_visibility",
        ),
        *_refused(_HUB, "save_state_to_huggingface", "resume_from_huggingface", "async_upload", switch=True),
    ),
    *_group(
        "sample images",
        Option("sample_prompts", str, metavar="FILE", help="text, JSON or TOML, as in sd-scripts"),
        Option("sample_every_n_steps", int, None, "draw after every so many steps", check=AT_LEAST_1),
        Option("sample_every_n_epochs", int, None, "draw after every so many epochs", check=AT_LEAST_1),
        Option("sample_at_first", bool, False, "also before the first step"),
        Option("sample_sampler", str, None, "how samples are drawn (ddim where nothing is given)", SAMPLERS),
    ),
    *_group(
        "logs",
        Option("logging_dir", str, metavar="DIR", help="logs of loss and rates, in a folder for each run"),
        Option("log_with", str, None, "what writes them (tensorboard with --logging_dir)", TRACKERS),
        Option("log_prefix", str, None, "before the time in the name of the run's folder"),
        Option("log_tracker_name", str, None, "the project's name (network_train)"),
        Option("log_tracker_config", str, metavar="FILE", help="TOML with a tracker's own arguments, in its section"),
        Option("log_config", bool, False, "also log the training's settings"),
        Option("wandb_run_name", str, None, "the run's name"),
        Option("wandb_api_key", str, None, "to log in with"),
        Option("console_log_level", str, "INFO", "the least that is told", LEVELS),
        Option("console_log_file", str, metavar="FILE", help="messages go there, not to the terminal"),
        *_always("messages are plain lines anyway", "console_log_simple"),
        *_refused("a drawing of sd-scripts' own; the options of timesteps mean what they mean there", "show_timesteps"),
    ),
    *_group(
        "validation",
        Option(
            "validation_split",
            float,
            0.0,
            "share of the pictures to measure the loss on, instead of training on them",
            check=(lambda value: 0 <= value < 1, "from 0 to below 1"),
            metadata="ss_validation_split",
        ),
        Option("validation_seed", int, None, "chooses them (--seed)", check=SEED, metadata="ss_validation_seed"),
        Option("validate_every_n_steps", int, None, "also after every so many steps", check=AT_LEAST_1),
        Option("validate_every_n_epochs", int, None, "instead of after every epoch", check=AT_LEAST_1),
        Option(
            "max_validation_steps",
            int,
            None,
            "batches of a validation at most",
            check=AT_LEAST_1,
            metadata="ss_max_validation_steps",
        ),
    ),
    *_group(
        "speed and memory",
        Option("full_bf16", bool, False, "the model in bf16, with --mixed_precision bf16; the adapter stays float32"),
        Option("full_fp16", bool, False, "the model in fp16, with --mixed_precision fp16; the adapter stays float32"),
        Option("ddp_timeout", int, None, "minutes that processes wait for each other", check=AT_LEAST_1),
        *_always("one process keeps one copy of the model", "lowram", "highvram"),
        Option("fp8_base", bool, False, "keep the denoiser in 8 bits", metadata="ss_fp8_base"),
        Option("fp8_base_unet", bool, False, "the same here", metadata="ss_fp8_base_unet"),
        Option("cuda_allow_tf32", bool, False, "matrix products in TF32, of float32 on GPUs"),
        Option("cuda_cudnn_benchmark", bool, False, "let cuDNN try which of its convolutions is fastest"),
        *_refused("accelerate chooses it; hide others by the environment's CUDA_VISIBLE_DEVICES", "device"),
        *_to_come(_MEMORY, "cpu_offload_checkpointing", "torch_compile", "compile", switch=True),
        *_to_come(_MEMORY, "blocks_to_swap", "dynamo_backend"),
        *_always(
            "the adapter's gradients alone go between processes, all in one piece",
            "ddp_gradient_as_bucket_view",
            "ddp_static_graph",
        ),
        *_refused(
            _DEEPSPEED,
            "zero_stage",
            "offload_optimizer_device",
            "offload_optimizer_nvme_path",
            "offload_param_device",
            "offload_param_nvme_path",
        ),
        *_refused(
            _DEEPSPEED,
            "deepspeed",
            "zero3_init_flag",
            "zero3_save_16bit_model",
            "fp16_master_weights_and_gradients",
            switch=True,
        ),
    ),
    *_group(
        "configuration",
        Option("config_file", str, metavar="FILE", help="TOML file with any of these options, in any sections"),
        Option("output_config", bool, False, "write all options that are given into --config_file, and end"),
    ),
]
