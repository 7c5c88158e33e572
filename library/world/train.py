"""Makes the small model and its judge: `python -m library.world.train --help`."""

from __future__ import annotations

import argparse
import json
import logging
import shutil
import sys
import time
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
    for stage in STAGES:
        if stage in args.stages:
            start = time.time()
            {"vae": make_vae, "judge": make_judge, "model": make_model, "measure": make_figures}[stage](args)
            times[stage] = round(time.time() - start)
            record.write_text(json.dumps(times) + "\n", encoding="utf-8")
            logging.info(f"{stage} done in {times[stage]} s")
    return 0


def make_vae(args: argparse.Namespace) -> None:
    """work/vae"""
    train_vae.train(args.vae_steps, 8, args.device, args.seed).save_pretrained(args.work / "vae")


def make_judge(args: argparse.Namespace) -> None:
    """work/judge.safetensors"""
    net = train_judge.train(args.judge_steps, 64, args.device, args.seed)
    save_file({name: tensor.cpu() for name, tensor in net.state_dict().items()}, args.work / "judge.safetensors")


def make_model(args: argparse.Namespace) -> None:
    """work/model, in float16."""
    torch.manual_seed(args.seed)
    tokenizer = train_model.build_tokenizer(args.work / "tokenizer")
    text_encoder = train_model.build_text_encoder(tokenizer).to(args.device)
    unet = UNet2DConditionModel(**train_model.UNET)
    checkpoint = args.work / "unet.pt"
    if not checkpoint.is_file():
        train_model.train_text_encoder(text_encoder, tokenizer, args.text_steps, 128, args.device, args.seed)
    vae = AutoencoderKL.from_pretrained(args.work / "vae").to(args.device).eval()
    vae.register_to_config(_name_or_path="")
    pictures = train_model.make_pictures(vae, tokenizer, args.pictures, args.device, args.seed)
    empty = train_model.tokens(tokenizer, [""])[0].to(args.device)
    unet, text_encoder = train_model.train_unet(
        unet, text_encoder, pictures, empty, args.unet_steps, args.batch_size, args.device, args.seed,
        checkpoint,
    )  # fmt: skip
    train_model.pipeline(vae, text_encoder, tokenizer, unet).to(torch.float16).save_pretrained(args.work / "model")
    _name_as_before(args.work / "model" / "text_encoder" / "model.safetensors")
    shutil.rmtree(args.work / "model" / "tokenizer")  # tokenizer.json, with the training's padding in it
    train_model.build_tokenizer(args.work / "model" / "tokenizer")


def _name_as_before(weights: Path) -> None:
    """Gives a text encoder's weights the prefix that transformers 5 dropped; it reads both, older ones only this."""
    tensors = {f"text_model.{name.removeprefix('text_model.')}": value for name, value in load_file(weights).items()}
    save_file(tensors, weights, metadata={"format": "pt"})


def make_figures(args: argparse.Namespace) -> None:
    """work/figures.json: the judge on renders, and the model by the judge. work/samples.png, to look at."""
    net = judge.load(args.work / "judge.safetensors").to(args.device)
    figures = {
        "judge": train_judge.accuracy(net, 1000, args.device, args.seed),
        "model": measure.figures(args.work / "model", net, args.device),
        "device": torch.cuda.get_device_name() if args.device.type == "cuda" else "cpu",
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
    }
    (args.work / "figures.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    logging.info(json.dumps(figures, indent=1))
    prompts = [prompt for prompt in SAMPLES for _ in range(6)]
    pixels = measure.draw(measure.load(args.work / "model", args.device), prompts, range(len(prompts)))
    sampling.grid(prompts, {"": [draw.to_image(picture) for picture in pixels]}).save(args.work / "samples.png")


if __name__ == "__main__":
    sys.exit(main())
