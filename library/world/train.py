"""Makes the small model and its judge: `python -m library.world.train --help`."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import diffusers
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from safetensors.torch import load_file, save_file

from library import sampling
from library.world import draw, judge, measure, train_judge, train_model, train_vae

STAGES = ("vae", "judge", "model", "measure")
SAMPLES = (
    "a red circle",
    "a small yellow star on a blue background",
    "a large striped green heart on a white background",
    "a sketch of a purple cross on a grey background",
    "a blue moon left of an orange ring on a black background",
    "a pink square above a spotted yellow triangle on green",
    "two white hearts on a black background",
    "three red stars on a yellow background",
)


def main(argv: list[str] | None = None) -> int:
    """Runs the stages asked for; each leaves its result in the work folder, where the next finds it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "stages", nargs="*", default=STAGES, metavar="STAGE", help=f"{', '.join(STAGES)} (default: all)"
    )
    parser.add_argument("--work", type=Path, default=Path("output/world"), help="folder of the results")
    parser.add_argument(
        "--device", type=torch.device, default=torch.device("cuda" if torch.cuda.is_available() else "cpu")
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--vae_steps", type=int, default=5500)
    parser.add_argument("--judge_steps", type=int, default=1600)
    parser.add_argument("--text_steps", type=int, default=500)
    parser.add_argument("--unet_steps", type=int, default=40_000)
    parser.add_argument("--batch_size", type=int, default=256, help="of the U-Net")
    parser.add_argument("--pictures", type=int, default=150_000, help="in the training set of the U-Net")
    args = parser.parse_args(argv)
    if unknown := set(args.stages) - set(STAGES):
        parser.error(f"unknown stage {', '.join(sorted(unknown))}; known: {', '.join(STAGES)}")
    args.work.mkdir(parents=True, exist_ok=True)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    record = args.work / "times.json"
    times = json.loads(record.read_text(encoding="utf-8")) if record.is_file() else {}
    work, device, seed = args.work, args.device, args.seed
    stages: dict[str, Callable[[], None]] = {
        "vae": lambda: make_vae(work, device, seed, args.vae_steps),
        "judge": lambda: make_judge(work, device, seed, args.judge_steps),
        "model": lambda: make_model(
            work, device, seed, args.text_steps, args.unet_steps, args.batch_size, args.pictures
        ),
        "measure": lambda: make_figures(work, device, seed),
    }
    for stage in STAGES:
        if stage in args.stages:
            start = time.time()
            stages[stage]()
            times[stage] = round(time.time() - start)
            record.write_text(json.dumps(times) + "\n", encoding="utf-8")
            logging.info(f"{stage} done in {times[stage]} s")
    return 0


def make_vae(work: Path, device: torch.device, seed: int, steps: int) -> None:
    """work/vae"""
    train_vae.train(steps, 8, device, seed).save_pretrained(work / "vae")


def make_judge(work: Path, device: torch.device, seed: int, steps: int) -> None:
    """work/judge.safetensors"""
    net = train_judge.train(steps, 64, device, seed)
    save_file({name: tensor.cpu() for name, tensor in net.state_dict().items()}, work / "judge.safetensors")


def make_model(
    work: Path, device: torch.device, seed: int, text_steps: int, unet_steps: int, batch_size: int, number: int
) -> None:
    """work/model, in float16.

    :param batch_size: of the U-Net
    :param number: of pictures that it is trained on
    """
    torch.manual_seed(seed)
    tokenizer = train_model.build_tokenizer(work / "tokenizer")
    text_encoder = train_model.build_text_encoder(tokenizer)
    torch.nn.Module.to(text_encoder, device)  # transformers hides its signature
    unet = UNet2DConditionModel(**train_model.UNET)
    checkpoint = work / "unet.pt"
    if not checkpoint.is_file():
        train_model.train_text_encoder(text_encoder, tokenizer, text_steps, 128, device, seed)
    vae = AutoencoderKL.from_pretrained(work / "vae").to(device).eval()
    vae.register_to_config(_name_or_path="")
    pictures = train_model.make_pictures(vae, tokenizer, number, device, seed)
    empty = train_model.tokens(tokenizer, [""])[0].to(device)
    unet, text_encoder = train_model.train_unet(
        unet, text_encoder, pictures, empty, unet_steps, batch_size, device, seed,
        checkpoint,
    )  # fmt: skip
    train_model.pipeline(vae, text_encoder, tokenizer, unet).to(torch.float16).save_pretrained(work / "model")
    _name_as_before(work / "model" / "text_encoder" / "model.safetensors")
    shutil.rmtree(work / "model" / "tokenizer")  # tokenizer.json, with the training's padding in it
    train_model.build_tokenizer(work / "model" / "tokenizer")


def _name_as_before(weights: Path) -> None:
    """Gives a text encoder's weights the prefix that transformers 5 dropped; it reads both, older ones only this."""
    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def make_figures(work: Path, device: torch.device, seed: int) -> None:
    """work/figures.json: the judge on renders, and the model by the judge. work/samples.png, to look at."""
    net = judge.load(work / "judge.safetensors").to(device)
    figures = {
        "judge": train_judge.accuracy(net, 1000, device, seed),
        "model": measure.figures(work / "model", net, device),
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    (work / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    logging.info(json.dumps(figures, indent=1))
    prompts = [prompt for prompt in SAMPLES for _ in range(6)]
    pixels = measure.draw(measure.load(work / "model", device), prompts, range(len(prompts)))
    sampling.grid(prompts, {"": [draw.to_image(picture) for picture in pixels]}).save(work / "samples.png")


if __name__ == "__main__":
    sys.exit(main())
