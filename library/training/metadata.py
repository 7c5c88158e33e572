"""What a file says of its training, in the fields of sd-scripts' train_network.py (commit 48d368fa)."""

from __future__ import annotations

import base64
import hashlib
import mimetypes
import time
from pathlib import Path

from library.data import captions, described
from library.data.plan import Plan, pictures
from library.models.family import Family
from library.options.rooms import Run
from library.training import optimizers, schedules
from library.training.adapter import Adapter
from library.training.objective import FLOW_ONLY
from library.training.state import Length
from networks.deft_config import DeftError, reason_of
from networks.deft_progress import Bar

_ALWAYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)


def of_training(run: Run, model: Family, adapter: Adapter, plan: Plan, length: Length, seed: int) -> dict[str, str]:
    """The fields that are known before the first step; with --no_metadata, those alone that clients need.

    :param run: its objective with what the model's family decides
    :raises DeftError: when the thumbnail cannot be read
    """
    width, height = run.data.datasets[0].buckets.resolution
    of_flow = {f"ss_{name}": getattr(run.objective, name) for name in FLOW_ONLY}
    decided = {*of_flow, *(() if model.takes_pictures else ("ss_max_input_image_size", "ss_condition_dropout_prob"))}
    fields: dict[str, object] = {
        "modelspec.title": run.saves.output_name,
        "modelspec.implementation": "diffusers",
        **{name: value for name, value in run.recorded.items() if name not in decided},
        **(of_flow if model.objective == "flow" else {}),
        **model.names(),
        "ss_training_started_at": time.time(),
        **described.fields(plan, run.data.dataset_config is None),
        "ss_num_epochs": length.epochs,
        "ss_max_train_steps": length.steps,
        "ss_optimizer": optimizers.described(run.optimizer),
        "ss_lr_scheduler": schedules.named(run.optimizer),
        "ss_seed": seed,
        **adapter.fields(),
        **_dropped(model, plan),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.resolution": f"{width}x{height}",
        "modelspec.date": time.strftime("%Y-%m-%dT%H:%M:%S"),
    }
    if "modelspec.thumbnail" in fields:
        fields["modelspec.thumbnail"] = _data_url(str(fields["modelspec.thumbnail"]))
    if run.saves.no_metadata:
        fields = {key: value for key, value in fields.items() if key in _ALWAYS or key.startswith("modelspec.")}
    elif model.path.is_file():
        fields["ss_new_sd_model_hash"] = sha256_of(model.path)
    return {key: str(value) for key, value in fields.items()}


def _dropped(model: Family, plan: Plan) -> dict[str, str]:
    """The share of conditions that is left out, where nothing was asked for, too; several where subsets differ."""
    shares = {captions.condition_dropout(one.subset.captions, model.takes_pictures) for one in pictures(plan)}
    return {"ss_condition_dropout_prob": ", ".join(map(str, sorted(shares)))} if model.takes_pictures else {}


def _data_url(picture: str) -> str:
    """Of a picture's file, as ModelSpec has thumbnails; a data URL as it is."""
    if picture.startswith("data:"):
        return picture
    try:
        content = base64.b64encode(Path(picture).read_bytes()).decode()
    except OSError as error:
        raise DeftError(f"--metadata_thumbnail {picture}: {reason_of(error)}") from None
    return f"data:{mimetypes.guess_type(picture)[0] or 'image/jpeg'};base64,{content}"


def sha256_of(path: Path) -> str:
    """Of a file's content, by which Civitai and Automatic1111 know a checkpoint."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, Bar(path.stat().st_size, f"hashing {path.name}", "B", unit_scale=True) as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.add(len(block))
    return digest.hexdigest()
