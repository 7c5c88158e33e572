"""From a folder of pictures to their captions and sizes: the first and the second start beside sd-scripts' own.

    python benchmarks/start_up.py --sd_scripts DIR --python PYTHON --folder /tmp/start_up

Makes 10,000 pictures with captions, then has each way start in processes of their own, one behind the other, round by
round in another order; imports are not counted. Ours finds pictures, reads captions and headers (`Index.contents`), and
with "hashes" also all contents, as caches on disk need them. Theirs is `DreamBoothDataset` up to the sizes of all
pictures, with and without --cache_info. Files are in the system's memory after the first round, which is left out.
Writes benchmarks/results/start_up.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULT = ROOT / "benchmarks" / "results" / "start_up.json"
KINDS, SUBSET = 100, "1_sks thing"
WAYS = ("ours", "ours, hashes", "theirs", "theirs, --cache_info")


def make_pictures(folder: Path, number: int) -> None:
    """JPEG, PNG and WebP of 256 to 1536 pixels a side, as many kinds as sizes; no two files are equal."""
    from PIL import Image

    sizes, subset = random.Random(0), folder / SUBSET
    if subset.is_dir() and len(list(subset.iterdir())) == 2 * number:
        return
    shutil.rmtree(subset, ignore_errors=True)
    subset.mkdir(parents=True)
    for kind in range(KINDS):
        extension = ("jpg", "jpg", "jpg", "png", "webp")[kind % 5]
        small = Image.frombytes("RGB", (24, 24), sizes.randbytes(3 * 24 * 24))
        first = subset / f"first.{extension}"
        small.resize((sizes.randrange(256, 1537), sizes.randrange(256, 1537)), Image.Resampling.BICUBIC).save(first)
        content = first.read_bytes()
        first.unlink()
        for i in range(kind, number, KINDS):
            (subset / f"{i:06}.{extension}").write_bytes(content + i.to_bytes(4, "big"))
            (subset / f"{i:06}.txt").write_text(f"sks thing, number {i}, tag {i % 17}\n")


def ours(folder: Path, hashes: bool) -> int:
    from library.data.folders import pictures_of
    from library.data.index import Index
    from library.data.remarks import Remarks
    from library.options.rooms import SubsetOptions

    subset = SubsetOptions(str(folder / SUBSET), caption_extension=".txt")
    paths = [found.path for found in pictures_of(subset, Remarks())]
    index = Index(folder / "cache")
    headers = index.contents(paths)
    assert not hashes or len(index.hashes(paths)) == len(paths)
    return sum(header.width * header.height for header in headers.values())


def theirs(folder: Path, cache_info: bool) -> int:
    """Both versions' constructors, whose parameters differ."""
    import inspect

    from library.train_util import DreamBoothDataset, DreamBoothSubset

    values: dict[str, Any] = {
        "image_dir": str(folder / SUBSET), "num_repeats": 1, "class_tokens": None, "caption_extension": ".txt",
        "cache_info": cache_info, "caption_separator": ",", "tokenizer": None, "is_training_dataset": True,
        "batch_size": 1, "resolution": (512, 512), "network_multiplier": 1.0, "enable_bucket": True,
        "min_bucket_reso": 256, "max_bucket_reso": 1024, "bucket_reso_steps": 64, "prior_loss_weight": 1.0,
        "validation_split": 0.0, "token_warmup_min": 1, "caption_dropout_rate": 0.0, "caption_tag_dropout_rate": 0.0,
        "caption_dropout_every_n_epochs": 0, "keep_tokens": 0, "keep_tokens_separator": "",
    }  # fmt: skip

    def given(kind: Any) -> dict[str, Any]:
        return {name: values.get(name) for name in inspect.signature(kind).parameters if name != "subsets"}

    subset = DreamBoothSubset(**given(DreamBoothSubset))
    dataset = DreamBoothDataset(subsets=[subset], **given(DreamBoothDataset))
    infos = dataset.image_data.values()
    for info in infos:  # as `make_buckets` begins
        if info.image_size is None:
            info.image_size = dataset.get_image_size(info.absolute_path)
    return sum(info.image_size[0] * info.image_size[1] for info in infos)


def side(way: str, folder: Path) -> None:
    """One start, in a process of its own."""
    who, _, how = way.partition(", ")
    if who == "ours":
        import library.data.folders
        import library.data.index
        import library.options.rooms
    else:
        import library.train_util  # noqa: F401
    before, start = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    pixels = ours(folder, bool(how)) if who == "ours" else theirs(folder, bool(how))
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    print(json.dumps({"seconds": seconds, "grown_mib": peak / 1024, "pixels": pixels}))


def started(way: str, options: argparse.Namespace) -> dict[str, Any]:
    mine = way.startswith("ours")
    folder, python = (ROOT, sys.executable) if mine else (options.sd_scripts, options.python)
    environment = os.environ | {"PYTHONPATH": str(folder), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [python, str(Path(__file__).resolve()), "--side", way, "--folder", str(options.folder)]
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def measured(options: argparse.Namespace) -> dict[str, dict[str, list[dict[str, Any]]]]:
    """Way -> "first" and "second" -> rounds."""
    found: dict[str, dict[str, list[dict[str, Any]]]] = {way: {"first": [], "second": []} for way in WAYS}
    for number in range(options.rounds + 1):
        for way in WAYS[number % len(WAYS) :] + WAYS[: number % len(WAYS)]:
            shutil.rmtree(options.folder / "cache", ignore_errors=True)
            (options.folder / SUBSET / "metadata_cache.json").unlink(missing_ok=True)
            for which in ("first", "second"):
                result = started(way, options)
                print(f"round {number}, {way}, {which}: {result['seconds']:.2f} s", flush=True)
                if number:
                    found[way][which].append(result)
    (options.folder / SUBSET / "metadata_cache.json").unlink(missing_ok=True)
    return found


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    seconds = [one["seconds"] for one in rounds]
    return {
        "median_seconds": round(statistics.median(seconds), 3),
        "least_and_most": [round(min(seconds), 3), round(max(seconds), 3)],
        "grown_mib": round(max(one["grown_mib"] for one in rounds), 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sd_scripts", type=Path, help="a checkout")
    parser.add_argument("--commit", default="", help="of the checkout, for the record")
    parser.add_argument("--python", default=sys.executable, help="an interpreter that can run it")
    parser.add_argument("--folder", type=Path, required=True, help="where the pictures are made, about 1 GB")
    parser.add_argument("--number", type=int, default=10_000)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--side", choices=WAYS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.side:
        side(options.side, options.folder)
        return
    make_pictures(options.folder, options.number)
    found = measured(options)
    pixels = {one["pixels"] for way in found.values() for which in way.values() for one in which}
    assert len(pixels) == 1, "they do not agree on the pictures' sizes"
    content = {
        "pictures": options.number, "rounds": options.rounds,
        "machine": f"{platform.machine()}, {os.cpu_count()} cores", "sd_scripts": options.commit,
        "load": [round(load, 1) for load in os.getloadavg()],  # at the end; this alone makes 1 to 2
        "ways": {way: {which: summary(rounds) for which, rounds in by.items()} for way, by in found.items()},
    }  # fmt: skip
    RESULT.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(content, indent=1))


if __name__ == "__main__":
    main()
