"""What a file says of its training, in the fields of sd-scripts' train_network.py (commit 48d368fa)."""

from __future__ import annotations

import hashlib
import logging
import time
from pathlib import Path

from library.data import captions, described
from library.data.plan import Plan, pictures
from library.models.family import Family
from library.options.rooms import Run
from library.training import optimizers, schedules, sharing
from library.training.adapter import Adapter
from library.training.objective import FLOW_ONLY
from library.training.state import Length
from networks.deft_pictures import COVER, THUMBNAIL
from networks.deft_progress import Bar

logger = logging.getLogger(__name__)

_ALWAYS = (
    "ss_v2",
    "ss_base_model_version",
    "ss_network_module",
    "ss_network_dim",
    "ss_network_alpha",
    "ss_network_args",
)


def of_training(run: Run, model: Family, adapter: Adapter, plan: Plan, length: Length, seed: int) -> dict[str, str]:
    """The fields that are known before the first step; with --no_metadata, those alone that clients need, and what the
    author says: nothing is taken from captions and samples.

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
    if (run.objective.min_timestep, run.objective.max_timestep) != (0, 1000):
        fields["modelspec.timestep_range"] = f"{run.objective.min_timestep},{run.objective.max_timestep}"
    if THUMBNAIL in fields:
        fields |= sharing.thumbnail_fields(str(fields[THUMBNAIL]))
    if run.saves.no_metadata:
        kept = (*_ALWAYS, COVER)
        return {key: str(value) for key, value in fields.items() if key in kept or key.startswith("modelspec.")}
    if sharing.TRIGGER not in fields:
        fields |= _trigger(plan, run.preservation.trigger_word)
    if model.path.is_file():
        fields["ss_new_sd_model_hash"] = sha256_of(model.path)
    return {key: str(value) for key, value in fields.items()}


def _trigger(plan: Plan, trigger_word: str | None) -> dict[str, str]:
    found, source = sharing.trigger_of(plan, trigger_word)
    if not found:
        return {}
    logger.info(f"trigger: '{found}', from {source}; --metadata_trigger_phrase says another")
    return {sharing.TRIGGER: found}


def _dropped(model: Family, plan: Plan) -> dict[str, str]:
    """The share of conditions that is left out, where nothing was asked for, too; several where subsets differ."""
    shares = {captions.condition_dropout(one.subset.captions, model.takes_pictures) for one in pictures(plan)}
    return {"ss_condition_dropout_prob": ", ".join(map(str, sorted(shares)))} if model.takes_pictures else {}


def sha256_of(path: Path) -> str:
    """Of a file's content, by which Civitai and Automatic1111 know a checkpoint."""
    digest = hashlib.sha256()
    with open(path, "rb") as file, Bar(path.stat().st_size, f"hashing {path.name}", "B", unit_scale=True) as bar:
        while block := file.read(1 << 20):
            digest.update(block)
            bar.add(len(block))
    return digest.hexdigest()
