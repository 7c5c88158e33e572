"""What stands before the first step: devices, the network, optimizer, data."""

from __future__ import annotations

import argparse
import hashlib
import importlib
import logging
import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, set_seed
from diffusers.optimization import get_scheduler
from torch.utils.data import DataLoader

from library import keep
from library.data.folders import TrainImage, find_images
from library.data.latents import CachedLatents
from library.prompts import Prompt
from library.sd import StableDiffusion
from networks import deft_io
from networks.deft import DeftNetwork
from networks.deft_config import DeftError, parse_options, reason_of, user_options

logger = logging.getLogger(__name__)

WEIGHT_DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def log_from_main_process() -> None:
    """Messages to the terminal, those of other processes only where something has failed."""
    logging.basicConfig(format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    main = int(os.environ.get("RANK", "0")) == 0
    logging.getLogger().setLevel(logging.INFO if main else logging.ERROR)
    for chatty in ("httpx", "PIL", "diffusers", "transformers", "accelerate"):
        logging.getLogger(chatty).setLevel(logging.ERROR)


def check(args: argparse.Namespace) -> list[TrainImage]:
    """Everything that can be known to be wrong before a model is loaded; returns the images.

    :raises DeftError: for network options, adapter files, data, rates and folders
    """
    network_args = dict(argument.split("=", 1) for argument in args.network_args)
    sizes = {} if args.dim_from_weights else {"dim": args.network_dim, "alpha": args.network_alpha}
    keep_file = parse_options(user_options(network_args) | sizes | _dropout(args)).keep
    if keep_file is not None:
        _prompts_to_keep(keep_file, args) if deft_io.are_prompts(keep_file) else deft_io.read_kept(keep_file)
    for file in filter(None, [args.network_weights, *args.base_weights]):
        deft_io.read_adapter(file)
    halves = {
        "unet": not args.network_train_text_encoder_only,
        "text_encoder": not args.network_train_unet_only,
    }
    rates = {half: getattr(args, f"{half}_lr") for half, trained in halves.items() if trained}
    if not any(args.learning_rate if rate is None else rate for rate in rates.values()):
        raise DeftError("nothing to train: every learning rate is 0 (--learning_rate, --unet_lr, --text_encoder_lr)")
    for name in ("output_dir", "logging_dir"):
        _check_writable(name, getattr(args, name))
    return find_images(args.train_data_dir, args.caption_extension)


def _check_writable(option: str, folder: str | None) -> None:
    if folder is None:
        return
    path = Path(folder).resolve()
    existing = next(p for p in (path, *path.parents) if p.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise DeftError(f"--{option} {folder}: {existing} is not a folder that can be written to")


def _dropout(args: argparse.Namespace) -> dict[str, float]:
    return {} if args.network_dropout is None else {"neuron_dropout": args.network_dropout}


def prepare_accelerator(args: argparse.Namespace) -> Accelerator:
    """Devices, precision and trackers.

    :raises DeftError: when the device cannot train in the precision that is asked for
    """
    if args.mixed_precision == "fp16" and not (torch.cuda.is_available() or torch.backends.mps.is_available()):
        raise DeftError("--mixed_precision=fp16 needs a GPU; use bf16 or no")
    accelerator = Accelerator(
        mixed_precision=args.mixed_precision,
        gradient_accumulation_steps=args.gradient_accumulation_steps,
        log_with="tensorboard" if args.logging_dir else None,
        project_dir=args.logging_dir,
    )
    return accelerator


def seed_everything(args: argparse.Namespace) -> int:
    """Seeds every process alike, so that all start from the same adapter; returns the seed."""
    seeds = [random.randrange(2**32) if args.seed is None else args.seed]
    broadcast_object_list(seeds)
    set_seed(seeds[0])
    return seeds[0]


def cache_latents(
    args: argparse.Namespace, images: list[TrainImage], model: StableDiffusion, accelerator: Accelerator
) -> CachedLatents:
    """Encodes all images once and puts the VAE aside.

    :raises DeftError: when no image can be read, or for a resolution that the model cannot have
    """
    step = model.pixels_per_latent
    if any(side % step for side in args.resolution):
        raise DeftError(f"--resolution {args.resolution[0]},{args.resolution[1]}: both must be multiples of {step}")
    model.vae.to(accelerator.device)
    data = CachedLatents(images, args.resolution, model.encode_image, args.transparent_background)
    model.vae.to("cpu")
    logger.info(f"{len(data.images)} images, {len(data)} with repeats, latents cached")
    return data


def tell_what_is_cut(model: StableDiffusion, captions: Mapping[str, str]) -> None:
    """One line where texts are longer than the text encoder reads.

    :param captions: what a user knows a text by -> the text
    """
    rests = {name: rest for name, text in captions.items() if (rest := model.text_beyond(text))}
    if rests:
        name, rest = next(iter(rests.items()))
        rest = rest if len(rest) <= 60 else f"... {rest[-60:]}"  # a trigger word stands last as often as first
        logger.warning(
            f"{len(rests)} of {len(captions)} captions and prompts are longer than the text encoder's {model.tokens} "
            f"tokens, what is behind is not read: '{rest}' in {name} for one"
        )


def _prompts_to_keep(keep_file: str, args: argparse.Namespace) -> list[Prompt]:
    return keep.read_prompts(keep_file, args.resolution, "--network_args keep")


def find_directions(args: argparse.Namespace, model: StableDiffusion, accelerator: Accelerator, keep_file: str) -> Path:
    """The file of `library.keep` for a prompts file, made once a base model and --output_dir.

    :raises DeftError: when it cannot be made or written
    """
    prompts = _prompts_to_keep(keep_file, args)
    parts = (model.text_encoder, model.unet)
    weights = ((name, p) for part in parts for name, p in part.named_parameters() if p.dim() > 1)
    made_of = f"{deft_io.base_fingerprint(weights)} {prompts} {keep.DIRECTIONS}"
    file = Path(args.output_dir) / f"keep-{hashlib.sha256(made_of.encode()).hexdigest()[:12]}.safetensors"
    with accelerator.main_process_first():
        if file.is_file():
            logger.info(f"keep={keep_file}: {file} is of this base model and these prompts")
            return file
        logger.info(f"keep={keep_file}: drawing {len(prompts)} pictures with the base model, once, to make {file}")
        model.pipeline.to(accelerator.device)
        with accelerator.autocast():
            keep.write(keep.directions_to_keep(model.pipeline, prompts, keep.DIRECTIONS), file)
        model.pipeline.to("cpu")
    return file


def build_network(args: argparse.Namespace, model: StableDiffusion, accelerator: Accelerator) -> DeftNetwork:
    """Merges `--base_weights`, creates the network, applies and loads it, as sd-scripts' train_network.py does.

    :raises DeftError: for wrong options or files
    """
    module = importlib.import_module(args.network_module)
    encoder, unet = model.text_encoder, model.unet
    for i, file in enumerate(args.base_weights):
        strength = args.base_weights_multiplier[i] if i < len(args.base_weights_multiplier) else 1.0
        merged, tensors = module.create_network_from_weights(strength, file, None, encoder, unet, for_inference=True)
        merged.merge_to(encoder, unet, tensors)
    options: dict[str, Any] = dict(argument.split("=", 1) for argument in args.network_args)
    options |= _dropout(args)
    if deft_io.are_prompts(options.get("keep", "")):
        options["keep"] = str(find_directions(args, model, accelerator, options["keep"]))
    if args.dim_from_weights:
        network, _ = module.create_network_from_weights(1.0, args.network_weights, None, encoder, unet, **options)
    else:
        network = module.create_network(1.0, args.network_dim, args.network_alpha, None, encoder, unet, **options)
    network.prepare_network(args)
    network.apply_to(encoder, unet, not args.network_train_unet_only, not args.network_train_text_encoder_only)
    if args.network_weights:
        logger.info(str(network.load_weights(args.network_weights)))
    return network


def place_model(args: argparse.Namespace, model: StableDiffusion, accelerator: Accelerator) -> None:
    """The frozen model in the training's precision, on the device, with the memory options.

    :raises DeftError: when xformers is asked for and missing
    """
    dtype = WEIGHT_DTYPES[args.mixed_precision]
    model.unet.to(accelerator.device, dtype)
    model.text_encoder.to(accelerator.device, dtype)
    if args.xformers:
        try:
            model.unet.enable_xformers_memory_efficient_attention()
        except (ImportError, ValueError) as error:
            raise DeftError(f"--xformers: {reason_of(error)}; leave the option out") from None
    if args.gradient_checkpointing:
        model.unet.enable_gradient_checkpointing()
        model.unet.train()
        model.text_encoder.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.text_encoder.train()


def build_optimizer(
    args: argparse.Namespace, network: DeftNetwork, steps: int, accelerator: Accelerator
) -> tuple[Any, Any, list[str]]:
    """AdamW, its learning rate schedule (both prepared), and the names of its parameter groups."""
    groups, names = network.prepare_optimizer_params_with_multiple_te_lrs(
        args.text_encoder_lr, args.unet_lr, args.learning_rate
    )
    optimizer = accelerator.prepare(torch.optim.AdamW(groups))
    schedule = get_scheduler(
        args.lr_scheduler,
        optimizer,
        num_warmup_steps=args.lr_warmup_steps * accelerator.num_processes,
        num_training_steps=steps * accelerator.num_processes,
    )
    return optimizer, accelerator.prepare(schedule), names


def build_loader(args: argparse.Namespace, data: CachedLatents, accelerator: Accelerator, seed: int) -> DataLoader:
    """Shuffled batches of (latents, captions), shared out among the processes, which draw different noise from here."""
    set_seed(seed, device_specific=True)
    generator = torch.Generator()
    generator.manual_seed(seed)
    loader: DataLoader = DataLoader(data, batch_size=args.train_batch_size, shuffle=True, generator=generator)
    return accelerator.prepare(loader)
