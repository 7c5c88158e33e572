"""One training, by the project's own trainer in this process."""

from __future__ import annotations

import gc
import json
import shutil
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

import train_network_deft
from benchmarks.paper import adapters
from benchmarks.paper.labels import network_args
from benchmarks.paper.plan import Subject
from benchmarks.paper.records import Record
from benchmarks.paper.settings import Settings, Training, name_of_file
from library.models import loading
from library.options.parse import parse
from library.options.rooms import Run
from library.training.adapter import Adapter, AdapterOf
from library.training.saves import TrainingStopped
from networks.deft_config import DeftError
from networks.deft_io import write_whole

# what --config may say and the benchmark decides: name -> value
_SAVES: dict[str, Any] = dict.fromkeys(("save_every_n_epochs", "save_every_n_steps", "save_n_epoch_ratio")) | {
    "save_state": False, "save_state_on_train_end": False, "no_metadata": False,
}  # fmt: skip
_LOOP: dict[str, Any] = dict.fromkeys(("max_train_epochs", "sample_every_n_epochs", "sample_every_n_steps")) | {
    "sample_at_first": False
}


def file_of(settings: Settings, training: Training) -> Path:
    """Where its finished adapter is."""
    return settings.output / "adapters" / f"{training.name}.safetensors"


def data_of(settings: Settings, subject: Subject) -> Path:
    """What a subject is trained on: kohya's metadata, or JSONL where captions refer to further pictures."""
    suffix = ".jsonl" if any(row.inputs for row in subject.rows) else ".json"
    return settings.output / "data" / f"{name_of_file(subject.name)}{suffix}"


def write_data(settings: Settings, subject: Subject) -> None:
    """Writes `data_of`.

    :raises DeftError: for a picture that would stand there twice, or a full disk
    """
    file, rows = data_of(settings, subject), subject.rows
    paths = [str(row.picture.resolve()) for row in rows]
    if file.suffix == ".jsonl":
        lines = [
            {"instruction": row.caption, "input_images": [str(one.resolve()) for one in row.inputs],
             "output_image": path}
            for row, path in zip(rows, paths, strict=True)
        ]  # fmt: skip
        content = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    else:
        if len(set(paths)) < len(paths):
            raise DeftError(f"{subject.name}: a picture is there twice, with captions of its own")
        content = json.dumps({path: {"caption": row.caption} for path, row in zip(paths, rows, strict=True)}, indent=1)
    write_whole(file, content.encode())


def run_of(settings: Settings, options: Sequence[str] = ()) -> Run:
    """The trainer's options, with `options` before all that --config says.

    :raises DeftError: for a --config that the trainer does not take
    """
    options = options or ["--train_data_dir", str(settings.data)]
    argv = ["--pretrained_model_name_or_path", str(settings.model),
            "--output_dir", str(settings.output / "adapters"), "--resolution", str(settings.size),
            "--cache_dir", str(settings.output / "cache"), "--save_precision", "float",
            "--console_log_level", "WARNING", *options]  # fmt: skip
    if settings.config is not None:
        argv += ["--config_file", str(settings.config)]
    if settings.precision is not None:
        argv += ["--mixed_precision", settings.precision]
    run = parse(argv)
    run = replace(run, data=replace(run.data, train_data_dir=run.data.train_data_dir or None))  # in place of --config's
    return replace(run, saves=replace(run.saves, **_SAVES), loop=replace(run.loop, **_LOOP))


def _options(settings: Settings, training: Training) -> list[str]:
    """What differs between trainings; each is of the denoiser alone, on batches of one."""
    method, file = training.method, data_of(settings, training.subject)
    args = dict(adapters.LAYERS) | dict(network_args(method.adapter) or {})
    rate, rank = f"{method.rate:g}", str(method.rank)
    found = ["--output_name", training.name, "--max_train_steps", str(method.steps), "--seed", str(training.seed),
             "--learning_rate", rate, "--unet_lr", rate, "--lr_scheduler", "constant", "--lr_warmup_steps", "0",
             "--train_batch_size", "1", "--gradient_accumulation_steps", "1", "--meter_every_n_steps", "0",
             "--no_report", "--network_dim", rank, "--network_alpha", rank, "--network_train_unet_only",
             "--network_args", *(f"{key}={value}" for key, value in args.items())]  # fmt: skip
    if file.suffix == ".jsonl":
        found += ["--train_data_dir", "", "--train_jsonl", str(file), "--image_path", str(settings.data)]
    else:
        found += ["--train_data_dir", str(settings.data), "--in_json", str(file)]
    if not loading.outline_of(run_of(settings).model).takes_pictures:  # whose texts go through what is trained
        found.append("--cache_text_encoder_outputs")
    if states := _states(settings, training):
        found += ["--resume", str(states[-1])]
    return found


def _states(settings: Settings, training: Training) -> list[Path]:
    """That a training which was asked to end has left, the last one last."""
    return sorted(file_of(settings, training).parent.glob(f"{training.name}-step*-state"))


def train(settings: Settings, training: Training) -> Record:
    """Trains, or goes on where a signal has ended it; what to record of it. Its file is there then, unless "failed"
    says why it is not.

    :raises DeftError: for options, files, a model or a machine that it cannot be done with
    :raises TrainingStopped: when it could not go on for another reason than numbers that are not finite
    :raises Interrupted: when a signal has ended it, after saving
    """
    run = run_of(settings, _options(settings, training))
    made: list[Adapter] = []
    start, file = time.perf_counter(), file_of(settings, training)
    try:
        train_network_deft.train(run, _kept_in(made, adapters.adapter_of(training.method.adapter)))
        failed = ""
    except TrainingStopped as error:
        if "finite" not in str(error):  # a full disk, pictures that are gone: not the adapter's failure
            raise
        failed = str(error)
    except torch.OutOfMemoryError:
        raise DeftError(
            f"{training.key}: the GPU has too little memory; --precision bf16, a smaller --size, or "
            f"gradient_checkpointing = true in --config"
        ) from None
    seconds = time.perf_counter() - start
    parameters = sum(p.numel() for p in made[0].parameters())
    made.clear()
    tidy_up()
    for state in _states(settings, training):
        shutil.rmtree(state, ignore_errors=True)
        state.with_name(f"{state.name.removesuffix('-state')}.safetensors").unlink(missing_ok=True)
    found = {"key": training.key, "method": training.method.key, "subject": training.subject.name,
             "seed": training.seed, "parameters": parameters, "seconds": round(seconds, 3)}  # fmt: skip
    return found | ({"failed": failed} if failed else {"file": file.name, "bytes": file.stat().st_size})


def tidy_up() -> None:
    """Gives the GPU's memory back that nothing needs any more."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _kept_in(made: list[Adapter], build: AdapterOf) -> AdapterOf:
    """The same, of which what it makes is also found in `made`."""

    def built(*given: object) -> Adapter:
        made.append(build(*given))  # type: ignore[arg-type]
        return made[-1]

    return built


def check(settings: Settings, subjects: Iterable[Subject]) -> None:
    """Finds out whether the trainer takes the model, the options and the adapters, without reading weights.

    :raises DeftError: where it does not, or the model reads no pictures, and subjects refer to them
    """
    outline = loading.outline_of(run_of(settings).model)
    referring = (s for s in subjects if any(row.inputs for row in s.rows) or any(asked.inputs for asked in s.asked))
    if not outline.takes_pictures and (one := next(referring, None)):
        raise DeftError(
            f"--model {settings.model}: {one.name} refers to pictures, which it does not read; OmniGen does"
        )
    for label in settings.adapters:
        if network_args(label) is None:
            adapters.config_of(label)
