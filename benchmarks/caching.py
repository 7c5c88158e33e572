"""From pictures to cached latents: ours beside sd-scripts' own caching, on a VAE so small that the pictures decide.

    python benchmarks/caching.py --sd_scripts DIR --python PYTHON --folder /tmp/caching

Makes photographs of 3 and 12 megapixels, JPEG and PNG, and a VAE of a few channels. Each case is then cached by ours
and by theirs in turns, each in a process of its own that times the caching alone: neither imports, nor the data set,
whose files' headers have been read by then. Ours is `read_pictures` into an empty folder or into memory, with the
hashes of files and weights; theirs is `new_cache_latents` of a data set group, beside the pictures or into memory.
Theirs has Python's garbage collected after each batch, which takes the longer the more is imported: how long is
measured apart, and rates are given with it and without. In the case "cold" the pictures are not in the system's memory
before. Latents are compared. One thread of torch each, unless --threads says otherwise: several wait for each other
where other programs run. Writes benchmarks/results/caching.json.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "caching.json"
SUBSET, KINDS, RESOLUTION = "1_sks thing", 30, 512
MEGAPIXELS = {"jpg": (12.0, 3.0), "png": (3.0, 1.5)}  # of which a half each
ASPECTS = (1.5, 4 / 3, 1.0, 3 / 4, 2 / 3, 16 / 9)  # width by height
WAYS = ("ours", "theirs")


class Case(NamedTuple):
    """:param batch: --vae_batch_size"""

    on_disk: bool
    batch: int
    cold: bool = False

    @property
    def name(self) -> str:
        return f"{'disk' if self.on_disk else 'memory'}, batch {self.batch}{', cold' * self.cold}"


CASES = (Case(True, 1), Case(True, 4), Case(False, 1), Case(False, 4), Case(True, 1, cold=True))


def make_pictures(folder: Path, number: int) -> None:
    """Gradients, edges and noise, so that decoding takes what a photograph's takes; no two files are equal."""
    import numpy as np
    from PIL import Image

    subset = folder / SUBSET
    if subset.is_dir() and len(list(subset.glob("*.txt"))) == number:
        return
    shutil.rmtree(subset, ignore_errors=True)
    subset.mkdir(parents=True)
    for kind in range(KINDS):
        extension, randoms = "png" if kind % 4 == 3 else "jpg", np.random.default_rng(kind)
        pixels = MEGAPIXELS[extension][kind % 2 if extension == "jpg" else kind // 4 % 2] * 1e6
        aspect = ASPECTS[kind % len(ASPECTS)] * randoms.uniform(0.97, 1.03)
        size = round((pixels * aspect) ** 0.5), round((pixels / aspect) ** 0.5)
        small = Image.fromarray(randoms.integers(0, 256, (12, 12, 3), np.uint8))
        picture = np.asarray(small.resize(size, Image.Resampling.BICUBIC), np.float32)
        detail = small.resize((size[0] // 8, size[1] // 8), Image.Resampling.NEAREST).resize(size)
        picture = picture * 0.8 + np.asarray(detail, np.float32) * 0.2 + randoms.normal(0, 3, picture.shape)
        first = subset / f"first.{extension}"
        Image.fromarray(picture.clip(0, 255).astype(np.uint8)).save(first, quality=92)
        content = first.read_bytes()
        first.unlink()
        for i in range(kind, number, KINDS):
            (subset / f"{i:06}.{extension}").write_bytes(content + i.to_bytes(4, "big"))
            (subset / f"{i:06}.txt").write_text("sks thing\n")


def make_vae(folder: Path) -> None:
    """One of 8 pixels a latent, that draws next to no noise: latents can be compared."""
    import torch
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    levels = 4
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * levels, up_block_types=["UpDecoderBlock2D"] * levels,
        block_out_channels=(4, 4, 8, 8), layers_per_block=1, norm_num_groups=2, mid_block_add_attention=False,
    )  # fmt: skip
    with torch.no_grad():
        vae.quant_conv.weight[4:], vae.quant_conv.bias[4:] = 0.0, -30.0
    vae.save_pretrained(folder / "vae")


def vae_of(folder: Path) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL.from_pretrained(folder / "vae").eval().requires_grad_(False)


def ours(folder: Path, case: Case) -> dict[str, Any]:
    from accelerate import Accelerator

    from library.data.examples import views
    from library.data.index import Index
    from library.data.plan import plan_of
    from library.data.remarks import Remarks
    from library.models.family import Family
    from library.options.rooms import BucketOptions, CacheOptions, DataOptions, DatasetOptions, SubsetOptions
    from library.training import prepare

    class Model:
        multiple_of = pixels_per_latent = 8
        vae = vae_of(folder)
        encode_image = Family.encode_image

    subset = SubsetOptions(str(folder / SUBSET), caption_extension=".txt")
    dataset = DatasetOptions((subset,), BucketOptions((RESOLUTION, RESOLUTION), enable_bucket=True))
    caches = CacheOptions(
        cache_latents_to_disk=case.on_disk, vae_batch_size=case.batch,
        cache_dir=str(folder / "cache"),
    )  # fmt: skip
    options, accelerator, model = DataOptions((dataset,), caches=caches), Accelerator(cpu=True), Model()
    plan = plan_of(options, Index(folder / "cache"), Remarks())
    start = time.perf_counter()
    plan, latents = prepare.read_pictures(options, plan, model, accelerator)  # type: ignore[arg-type]
    seconds = time.perf_counter() - start
    scale = model.vae.config.scaling_factor
    means = {view.picture.path.stem: float(latents.read(view)[0].abs().mean()) / scale for view in views(plan)}
    return {"seconds": seconds, "means": means}


def theirs(folder: Path, case: Case) -> dict[str, Any]:
    import numpy as np
    import train_network
    from accelerate import Accelerator

    from library import config_util, strategy_base, strategy_sd

    collecting, collect = [], gc.collect

    def timed() -> int:
        begin, found = time.perf_counter(), collect()
        collecting.append(time.perf_counter() - begin)
        return found

    gc.collect = timed  # type: ignore[assignment]
    strategy = strategy_sd.SdSdxlLatentsCachingStrategy(True, case.on_disk, case.batch, False)
    strategy_base.LatentsCachingStrategy.set_strategy(strategy)
    config = {
        "general": {"resolution": RESOLUTION, "enable_bucket": True, "caption_extension": ".txt"},
        "datasets": [{"batch_size": 1, "subsets": [{"image_dir": str(folder / SUBSET), "num_repeats": 1}]}],
    }
    arguments = train_network.setup_parser().parse_args(["--cache_latents", "--vae_batch_size", str(case.batch)])
    sanitizer = config_util.ConfigSanitizer(True, True, False, True)
    blueprint = config_util.BlueprintGenerator(sanitizer).generate(config, arguments)
    group, _ = config_util.generate_dataset_group_by_blueprint(blueprint.dataset_group)
    vae, accelerator = vae_of(folder), Accelerator(cpu=True)
    start = time.perf_counter()
    group.new_cache_latents(vae, accelerator)
    seconds, collected = time.perf_counter() - start, sum(collecting)
    means = {}
    for info in (info for dataset in group.datasets for info in dataset.image_data.values()):
        found = info.latents
        if case.on_disk:
            with np.load(info.latents_npz) as file:
                (found,) = (file[name] for name in file.files if name.startswith("latents") and file[name].ndim == 3)
        means[Path(info.absolute_path).stem] = float(abs(found).mean())
    return {"seconds": seconds, "collecting": collected, "collections": len(collecting), "means": means}


def side(way: str, folder: Path, case: Case) -> None:
    """One caching, in a process of its own."""
    import cv2
    import PIL
    import torch

    result = ours(folder, case) if way == "ours" else theirs(folder, case)
    result |= {
        "peak_mib": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, 1),
        "versions": {"torch": torch.__version__, "pillow": PIL.__version__, "opencv": cv2.__version__},
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


def cleared(folder: Path, cold: bool) -> None:
    """Nothing cached; pictures written to the disk, and dropped from the system's memory or read into it."""
    shutil.rmtree(folder / "cache", ignore_errors=True)
    for file in (folder / SUBSET).iterdir():
        if file.suffix == ".npz":
            file.unlink()
        elif cold:
            with open(file, "rb") as opened:
                os.fsync(opened.fileno())
                os.posix_fadvise(opened.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        else:
            file.read_bytes()


def cached(way: str, case: Case, options: argparse.Namespace) -> dict[str, Any]:
    folder, python = (ROOT, sys.executable) if way == "ours" else (options.sd_scripts, options.python)
    environment = os.environ | {
        "PYTHONPATH": str(folder), "OMP_NUM_THREADS": str(options.threads), "CUDA_VISIBLE_DEVICES": "",
        "HF_HUB_OFFLINE": "1",
    }  # fmt: skip
    given = json.dumps([way, *case])
    command = [python, str(Path(__file__).resolve()), "--side", given, "--folder", str(options.folder.resolve())]
    cleared(options.folder, case.cold)
    load = os.getloadavg()[0]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"load": round(load, 1)}


def measured(case: Case, options: argparse.Namespace) -> dict[str, list[dict[str, Any]]]:
    """Way -> rounds, round by round in another order."""
    found: dict[str, list[dict[str, Any]]] = {way: [] for way in WAYS}
    for number in range(options.rounds):
        for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
            result = cached(way, case, options)
            found[way].append(result)
            print(f"{case.name}, round {number}, {way}: {result['seconds']:.2f} s, load {result['load']}", flush=True)
    return found


def largest_difference(ours: dict[str, Any], theirs: dict[str, Any], number: int) -> float:
    """In a picture's mean latent, to its size."""
    assert ours["means"].keys() == theirs["means"].keys()
    assert len(ours["means"]) == number
    return max(abs(mean - theirs["means"][name]) / mean for name, mean in ours["means"].items())


def rate(seconds: list[float], number: int) -> dict[str, Any]:
    """Pictures a second."""
    rates = [number / one for one in seconds]
    return {
        "median": round(statistics.median(rates), 2),
        "least_and_most": [round(min(rates), 2), round(max(rates), 2)],
    }


def summary(found: dict[str, list[dict[str, Any]]], number: int) -> dict[str, Any]:
    """Rates in pictures a second, and how many times theirs ours is, round by round."""
    ours, theirs = (found[way] for way in WAYS)
    seconds = {
        "ours": [one["seconds"] for one in ours],
        "theirs": [one["seconds"] for one in theirs],
        "theirs_without_collecting": [one["seconds"] - one["collecting"] for one in theirs],
    }
    content: dict[str, Any] = {name: rate(values, number) for name, values in seconds.items()}
    for name in list(content)[1:]:
        ratios = [other / one for one, other in zip(seconds["ours"], seconds[name], strict=True)]
        content[name]["ours_to_it"] = round(statistics.median(ratios), 2)
        content[name]["of_each_round"] = [round(ratio, 2) for ratio in ratios]
    return content | {
        "collections": theirs[0]["collections"],
        "largest_difference": float(f"{largest_difference(ours[0], theirs[0], number):.2g}"),
        "peak_mib": {way: max(one["peak_mib"] for one in found[way]) for way in WAYS},
        "load": {way: [one["load"] for one in found[way]] for way in WAYS},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd_scripts", type=Path, help="a checkout")
    parser.add_argument("--commit", default="", help="of the checkout, for the record")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that can run it")
    parser.add_argument("--folder", type=Path, required=True, help="where the pictures are made, about 200 MB")
    parser.add_argument("--number", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1, help="of torch, for both")
    parser.add_argument(
        "--cases", default="", help=f"of {'; '.join(case.name for case in CASES)}; all if none is given"
    )
    parser.add_argument("--output", type=Path, default=RESULT)
    parser.add_argument("--side", type=json.loads, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        way, *case = options.side
        side(way, options.folder, Case(*case))
        return
    make_pictures(options.folder, options.number)
    make_vae(options.folder)
    wanted = [name.strip() for name in options.cases.split(";") if name.strip()]
    found = {case: measured(case, options) for case in CASES if not wanted or case.name in wanted}
    content = {
        "pictures": options.number, "resolution": RESOLUTION, "rounds": options.rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "threads": options.threads,
        "sd_scripts": options.commit,
        "versions": {way: next(iter(found.values()))[way][0]["versions"] for way in WAYS},
        "cases": {case.name: summary(rounds, options.number) for case, rounds in found.items()},
    }  # fmt: skip
    options.output.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
