"""Trains a DEFT adapter on a folder of images and saves it as a LoRA: `accelerate launch train_network_deft.py`."""

from __future__ import annotations

import argparse
import logging
import math
import sys
from pathlib import Path

import library

if Path(library.__path__[0]).resolve() != Path(__file__).resolve().parent / "library":
    print(f"error: found another project's library/ at {library.__path__[0]}; take it off PYTHONPATH", file=sys.stderr)
    sys.exit(2)

from library import options, sd, setup
from library.checkpoints import Checkpoints, TrainingStopped, training_metadata
from library.loop import TrainingLoop
from library.prompts import read_prompts
from networks.deft_config import DeftError

logger = logging.getLogger(__name__)


def train(args: argparse.Namespace) -> Path:
    """One training run; returns the file of the finished adapter.

    :raises DeftError: for mistakes in options, data or files, before the first step
    :raises TrainingStopped: when the training cannot go on, or its result cannot be written
    """
    setup.log_from_main_process()
    images = setup.check(args)
    accelerator = setup.prepare_accelerator(args)
    seed = setup.seed_everything(args)
    prompts = read_prompts(args.sample_prompts, args.resolution) if args.sample_prompts else []
    model = sd.load(args.pretrained_model_name_or_path, args.tokenizer, args.tokenizer_cache_dir)
    texts = {str(image.path): image.caption for image in images}
    setup.tell_what_is_cut(model, texts | {f"{args.sample_prompts}": p.text for p in prompts})
    data = setup.cache_latents(args, images, model, accelerator)
    network = setup.build_network(args, model, accelerator)
    setup.place_model(args, model, accelerator)
    network.to(accelerator.device)

    loader = setup.build_loader(args, data, accelerator, seed)
    steps_per_epoch = math.ceil(len(loader) / args.gradient_accumulation_steps)
    steps = args.max_train_epochs * steps_per_epoch if args.max_train_epochs else args.max_train_steps
    epochs = math.ceil(steps / steps_per_epoch)
    optimizer, schedule, group_names = setup.build_optimizer(args, network, steps, accelerator)
    metadata = training_metadata(args, model, network, data, steps, epochs, seed)
    checkpoints = Checkpoints(args, network, metadata, accelerator)
    if args.logging_dir:
        accelerator.init_trackers(args.output_name)

    parameters = sum(p.numel() for p in network.parameters() if p.requires_grad)
    logger.info(f"training {parameters:,} parameters for {steps} steps in {epochs} epochs")
    TrainingLoop(
        args,
        accelerator,
        model,
        network,
        loader,
        optimizer,
        schedule,
        group_names,
        model.noise_scheduler(),
        checkpoints,
        prompts,
        steps,
        epochs,
    ).run()
    accelerator.end_training()
    return checkpoints.save_final(steps, epochs)


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, 2 for a mistake of the user's, 1 for a training that could not go on."""
    try:
        train(options.parse(sys.argv[1:] if argv is None else argv))
        return 0
    except DeftError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except TrainingStopped as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
