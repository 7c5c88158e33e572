"""Adapter files of a run: their names, their metadata, and which one is good."""

from __future__ import annotations

import argparse
import hashlib
import json
import logging
import time
from pathlib import Path

import torch
from accelerate import Accelerator

from library.data.latents import CachedLatents
from library.sd import StableDiffusion
from networks.deft import DeftNetwork
from networks.deft_config import DeftError
from networks.deft_progress import Bar

logger = logging.getLogger(__name__)

SAVE_DTYPES = {"float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
_ALWAYS = ("ss_v2", "ss_base_model_version", "ss_network_module", "ss_network_dim", "ss_network_alpha")


class TrainingStopped(RuntimeError):
    """The training cannot go on, or its result cannot be written; what was saved before is untouched."""


class Checkpoints:
    """Saves a network under sd-scripts' file names, and knows the last file that was saved whole.

    Only the main process writes; every process may call.

    :param metadata: of `training_metadata`
    """

    def __init__(
        self, args: argparse.Namespace, network: DeftNetwork, metadata: dict[str, str], accelerator: Accelerator
    ):
        self.folder, self.name = Path(args.output_dir), args.output_name
        self.dtype, self.network, self.metadata = SAVE_DTYPES[args.save_precision], network, metadata
        self.accelerator = accelerator
        self.last_good: Path | None = None

    def _save(self, suffix: str, step: int, epoch: int) -> Path:
        path = self.folder / f"{self.name}{suffix}.safetensors"
        if self.accelerator.is_main_process:
            progress = {"ss_steps": step, "ss_epoch": epoch, "ss_training_finished_at": time.time()}
            metadata = self.metadata | {key: str(value) for key, value in progress.items()}
            self.network.save_weights(str(path), self.dtype, metadata)
            logger.info(f"saved {path}")
        self.last_good = path
        return path

    def save_during_training(self, suffix: str, step: int, epoch: int) -> None:
        """Writes `<output_name><suffix>.safetensors`; a failure is only reported: the disk may have room again."""
        try:
            self._save(suffix, step, epoch)
        except DeftError as error:
            logger.error(f"step {step}: {error}")

    def save_final(self, step: int, epoch: int) -> Path:
        """Writes `<output_name>.safetensors`.

        :raises TrainingStopped: when it cannot be written or the network is not finite
        """
        try:
            return self._save("", step, epoch)
        except DeftError as error:
            raise TrainingStopped(f"{error}. Last good save: {self.last_good or 'none'}") from error


def training_metadata(
    args: argparse.Namespace,
    model: StableDiffusion,
    network: DeftNetwork,
    data: CachedLatents,
    steps: int,
    epochs: int,
    seed: int,
) -> dict[str, str]:
    """`ss_*` and `modelspec.*` fields as sd-scripts' train_network.py (commit 48d368fa) names them."""
    width, height = args.resolution
    version = "v2" if model.is_v2 else "v1"
    prediction = model.noise_scheduler().config.prediction_type
    single_file = model.path.is_file()
    architecture = "stable-diffusion-v1"
    if model.is_v2:
        architecture = "stable-diffusion-v2-768-v" if prediction == "v_prediction" else "stable-diffusion-v2-512"
    fields: dict[str, object] = {
        "ss_training_started_at": time.time(),
        "ss_output_name": args.output_name,
        "ss_learning_rate": args.learning_rate,
        "ss_text_encoder_lr": args.text_encoder_lr,
        "ss_unet_lr": args.unet_lr,
        "ss_num_train_images": len(data),
        "ss_num_epochs": epochs,
        "ss_max_train_steps": steps,
        "ss_batch_size_per_device": args.train_batch_size,
        "ss_gradient_accumulation_steps": args.gradient_accumulation_steps,
        "ss_gradient_checkpointing": args.gradient_checkpointing,
        "ss_lr_scheduler": args.lr_scheduler,
        "ss_lr_warmup_steps": args.lr_warmup_steps,
        "ss_optimizer": "torch.optim.adamw.AdamW",
        "ss_max_grad_norm": args.max_grad_norm,
        "ss_min_snr_gamma": args.min_snr_gamma,
        "ss_mixed_precision": args.mixed_precision,
        "ss_scale_weight_norms": args.scale_weight_norms,
        "ss_seed": seed,
        "ss_resolution": f"({width}, {height})",
        "ss_training_comment": args.training_comment,
        "ss_dataset_dirs": json.dumps(data.folder_counts()),
        "ss_tag_frequency": json.dumps(data.tag_frequency()),
        "ss_network_module": args.network_module,
        "ss_network_dim": network.config.dim,
        "ss_network_alpha": network.config.alpha,
        "ss_network_args": json.dumps(dict(a.split("=", 1) for a in args.network_args)),
        "ss_v2": model.is_v2,
        "ss_base_model_version": f"sd_{version}",
        "ss_sd_model_name": model.name,
    }
    if single_file and not args.no_metadata:
        fields["ss_new_sd_model_hash"] = _sha256(model.path)
    if args.no_metadata:
        fields = {key: fields[key] for key in (*_ALWAYS, "ss_network_args")}
    fields |= {
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{architecture}/lora",
        "modelspec.implementation": "diffusers",
        "modelspec.title": args.output_name,
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
        "modelspec.prediction_type": "v" if prediction == "v_prediction" else "epsilon",
    }
    return {key: str(value) for key, value in fields.items()}


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file, Bar(path.stat().st_size, f"hashing {path.name}", "B", unit_scale=True) as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.add(len(block))
    return digest.hexdigest()
