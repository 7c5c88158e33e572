"""Buckets, crops, pixels, masks and batches, against sd-scripts' own data sets on the same pictures, each side in its
own Python.

SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... pytest tests/integration/test_pictures.py -s
"""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageFilter

from library.data.augment import change_colours, flips
from library.data.buckets import Buckets, Epochs, Size, dataset_seed, regularization_repeats
from library.data.index import header_of
from library.data.masks import alpha_mask, find_masks, in_latents, read_mask
from library.data.pixels import read_picture
from library.data.resizing import Crop, crop_of, face_of, in_tensor
from library.options.rooms import AugmentOptions, BucketOptions
from networks.deft_config import DeftError
from tests.integration.conftest import SD_SCRIPTS, needs_sd_scripts, run_script

pytestmark = needs_sd_scripts

PICTURES = 210
SMALL = {"enable_bucket": True, "min_bucket_reso": 64, "max_bucket_reso": 256, "bucket_reso_steps": 32}


def size_of(path: Path) -> tuple[int, int]:
    header = header_of(path)
    return header.width, header.height


# --- pictures --------------------------------------------------------------------------------------------------------


def scene(drawn: np.random.Generator, size: Size, mode: str = "RGB") -> Image.Image:
    """Soft shapes and some noise, so that every resampling shows."""
    channels = len(Image.new(mode, (1, 1)).getbands())
    coarse = drawn.integers(0, 256, (5, 7, channels), np.uint8)
    image = Image.fromarray(coarse.squeeze(), mode if channels > 1 else "L").resize(size, Image.Resampling.BICUBIC)
    noise = drawn.integers(-20, 20, (size[1], size[0], channels)).squeeze()
    return Image.fromarray((np.asarray(image, np.int64) + noise).clip(0, 255).astype(np.uint8), image.mode)


def write_plain(folder: Path, number: int, sizes: tuple[int, int] = (40, 420), name: str = "{:03}_{}") -> None:
    """Pictures that both sides read alike: no EXIF orientation, nothing transparent, eight bits."""
    folder.mkdir(parents=True)
    drawn = np.random.default_rng(number)
    kinds = ("rgb.png", "rgb.jpg", "rgb.webp", "rgb.bmp", "l.png", "p.png", "1.png", "cmyk.jpg", "rgba.png", "la.png",
             "progressive.jpeg", "l.jpg", "p.bmp")  # fmt: skip
    for i in range(number):
        size = tuple(int(side) for side in np.exp(drawn.uniform(*np.log(sizes), 2)).round())
        kind = kinds[i % len(kinds)]
        image = scene(drawn, size, "CMYK" if "cmyk" in kind else "RGB")
        if kind.startswith(("l", "1", "p.")):
            image = image.convert({"l": "L", "1": "1", "p": "P", "a": "LA"}["a" if "la" in kind else kind[0]])
        if kind.startswith("rgba"):
            image = image.convert("RGBA")
        image.save(folder / name.format(i, kind), **({"progressive": True} if "progressive" in kind else {}))


def write_faces(folder: Path, number: int) -> None:
    folder.mkdir(parents=True)
    drawn = np.random.default_rng(7)
    for i in range(number):
        width, height = drawn.integers(128, 500, 2).tolist()
        face = [*drawn.integers(1, (width, height)), *drawn.integers(10, 200, 2)]
        name = f"a_b{i:02}_{'_'.join(map(str, face))}.png" if i % 5 else f"plain{i}.png"
        scene(drawn, (width, height)).save(folder / name)


def write_on_purpose(folder: Path) -> None:
    """Pictures that we read otherwise than sd-scripts does, and under twins/ what ours look like to it."""
    (folder / "odd").mkdir(parents=True)
    (folder / "twins").mkdir()
    drawn = np.random.default_rng(3)
    for turn in range(1, 9):
        for extension in ("jpg", "png", "webp"):
            exif = Image.Exif()
            exif[0x0112] = turn
            options = {"lossless": True} if extension == "webp" else {"quality": 90} if extension == "jpg" else {}
            path = folder / "odd" / f"turned_{extension}{turn}.{extension}"
            scene(drawn, (90 + 10 * turn, 200)).save(path, exif=exif, **options)
    for i in range(8):
        picture = scene(drawn, (100 + 20 * i, 180), "RGBA")
        picture.putalpha(picture.getchannel("A").filter(ImageFilter.GaussianBlur(9)).point(lambda v: 2 * v - 128))
        picture.save(folder / "odd" / f"transparent_{i}.{('png', 'webp')[i % 2]}", lossless=True)
        deep = (np.asarray(scene(drawn, (150, 90 + 30 * i), "L"), np.uint16) * 257).astype(np.uint16)
        Image.fromarray(deep).save(folder / "odd" / f"deep_{i}.png")
    for path in (folder / "odd").iterdir():
        read_picture(path).image.save(folder / "twins" / f"{path.stem}.png")


def write_masks(folder: Path, pictures: Path) -> None:
    folder.mkdir(parents=True)
    drawn = np.random.default_rng(5)
    for i, path in enumerate(sorted(pictures.iterdir())):
        mask = scene(drawn, Image.open(path).size, ("L", "RGB")[i % 2])
        mask.save(folder / f"{path.stem}.{('png', 'bmp')[i // 2 % 2]}")


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A data set. `folder` and the like are below the fixture's; `theirs` is what sd-scripts is given in its place."""

    name: str
    folder: str = "plain"
    dataset: dict[str, Any] = field(default_factory=lambda: dict(SMALL))
    subset: dict[str, Any] = field(default_factory=dict)
    resolution: Size = (128, 128)
    batch_size: int = 3
    epochs: int = 2
    seed: int = 1
    repeats: int = 1
    reg: str | None = None
    reg_repeats: int = 1
    theirs: str | None = None
    masks: str | None = None
    cached: bool = False
    loader: bool = False

    def config(self, root: Path) -> dict[str, Any]:
        """sd-scripts' TOML."""
        subset = {"image_dir": str(root / (self.theirs or self.folder)), "num_repeats": self.repeats} | self.subset
        if self.masks:
            subset["conditioning_data_dir"] = str(root / self.masks)
        else:
            subset["class_tokens"] = "cat"
        subsets = [subset]
        if self.reg:
            subsets.append({"image_dir": str(root / self.reg), "is_reg": True, "class_tokens": "animal",
                            "num_repeats": self.reg_repeats} | self.subset)  # fmt: skip
        options = {"resolution": list(self.resolution), "batch_size": self.batch_size, **self.dataset}
        return {"datasets": [{"subsets": subsets, **options}]}

    def buckets(self) -> Buckets:
        return Buckets(BucketOptions(self.resolution, **self.dataset))


UNBUCKETED: dict[str, Any] = {"enable_bucket": False}
CASES = [
    Case("steps32"),
    Case("steps64", dataset=SMALL | {"bucket_reso_steps": 64}, batch_size=4, seed=42),
    Case("limits", dataset=SMALL | {"min_bucket_reso": 90, "max_bucket_reso": 170}),
    Case("wide", resolution=(192, 128)),
    Case("uneven", resolution=(150, 115), batch_size=5),
    Case("no_upscale", folder="large", dataset=SMALL | {"bucket_no_upscale": True}),
    Case("no_upscale64", folder="large", dataset=SMALL | {"bucket_no_upscale": True, "bucket_reso_steps": 64},
         resolution=(256, 192)),
    *(Case(name, subset={"resize_interpolation": name}, epochs=1)
      for name in ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area", "box")),
    Case("flip", subset={"flip_aug": True}),
    Case("random_crop", subset={"random_crop": True, "flip_aug": True}),
    Case("color_aug", subset={"color_aug": True}),
    Case("all", subset={"color_aug": True, "random_crop": True, "flip_aug": True}, batch_size=1),
    Case("repeats", repeats=3, batch_size=7, epochs=3),
    Case("reg", folder="few", repeats=4, reg="large", batch_size=4, epochs=3),
    Case("reg_few", reg="few", reg_repeats=2, batch_size=4, epochs=2),
    Case("alpha_mask", folder="alpha", subset={"alpha_mask": True, "flip_aug": True}),
    Case("alpha_lanczos", folder="alpha", subset={"alpha_mask": True, "resize_interpolation": "lanczos"}),
    Case("masks", masks="masks", subset={"flip_aug": True}),
    Case("masks_exact", folder="exact", masks="exact_masks", subset={"flip_aug": True}, dataset=UNBUCKETED),
    Case("unbucketed", dataset=UNBUCKETED, cached=True),
    Case("unbucketed_wide", dataset=UNBUCKETED, resolution=(160, 96), cached=True),
    Case("unbucketed_random", folder="large", dataset=UNBUCKETED, subset={"random_crop": True, "flip_aug": True}),
    Case("faces", folder="faces", dataset=UNBUCKETED,
         subset={"face_crop_aug_range": [2.0, 4.0], "flip_aug": True, "random_crop": True}),
    Case("faces_middle", folder="named", dataset=UNBUCKETED, subset={"face_crop_aug_range": [1.5, 5.0]}),
    Case("faces_fixed", folder="named", dataset=UNBUCKETED, subset={"face_crop_aug_range": [3.0, 3.0]},
         resolution=(128, 96)),
    Case("faces_bucketed", folder="faces", subset={"face_crop_aug_range": [2.0, 4.0]}),
    Case("on_purpose", folder="purpose/odd", theirs="purpose/twins", subset={"flip_aug": True}),
    Case("as_it_is", folder="purpose/odd", batch_size=1, epochs=1),
    Case("loader", loader=True, epochs=3),
]  # fmt: skip


def older() -> bool:
    """48d368fa, which does not know --skip_image_resolution and squeezes masks into buckets."""
    return not (Path(SD_SCRIPTS or "") / "library" / "dataset.py").is_file()


if not older():
    CASES.append(Case("skip", dataset=SMALL | {"skip_image_resolution": (150, 120)}))

LIMITS = [
    BucketOptions((512, 512), True),
    BucketOptions((512, 512), False),
    BucketOptions((1024, 1024), True, 256, 2048, 64),
    BucketOptions((1024, 1024), True, 512, 1536, 32),
    BucketOptions((768, 512), True, 320, 960, 8),
    BucketOptions((1000, 700), True, 250, 1100, 48),
    BucketOptions((768, 768), True, 256, 1024, 64, True),
    BucketOptions((1024, 1024), True, 256, 2048, 32, True),
    BucketOptions((832, 1216), True, 256, 2048, 64, True),
    BucketOptions((640, 960), False),
]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures, and what sd-scripts makes of them in every case."""
    root = tmp_path_factory.mktemp("pictures")
    write_plain(root / "plain", PICTURES)
    write_plain(root / "large", 60, (130, 500))
    write_plain(root / "few", 26)
    write_plain(root / "exact", 13, (128, 128))
    write_faces(root / "faces", 60)
    shutil.copytree(root / "faces", root / "named", ignore=shutil.ignore_patterns("plain*"))
    write_on_purpose(root / "purpose")
    shutil.copytree(root / "purpose" / "odd", root / "alpha", ignore=shutil.ignore_patterns("turned*", "deep*"))
    for path in list((root / "few").iterdir()):
        shutil.copy(path, root / "alpha" / path.name)
    write_masks(root / "masks", root / "plain")
    write_masks(root / "exact_masks", root / "exact")
    drawn = np.random.default_rng(0)
    np.save(root / "sizes.npy", np.exp(drawn.uniform(np.log(8), np.log(12000), (100_000, 2))).astype(np.int64))
    (root / "buckets.json").write_text(json.dumps([asdict(options) for options in LIMITS]))
    cases = [{"name": case.name, "config": case.config(root), "masked": bool(case.masks), "cached": case.cached,
              "loader": case.loader, "epochs": case.epochs, "seed": case.seed} for case in CASES]  # fmt: skip
    (root / "cases.json").write_text(json.dumps(cases))
    run_script(Path(__file__).with_name("pictures_side.py"), root, with_deft=False)
    return root


# --- ours ------------------------------------------------------------------------------------------------------------


@dataclass
class Ours:
    """A data set as the trainer makes one of these rooms."""

    case: Case
    root: Path

    def __post_init__(self) -> None:
        case = self.case
        self.buckets = case.buckets()
        paths = sorted((self.root / case.folder).iterdir())
        self.paths = [path for path in paths if not self.buckets.skips(*size_of(path))]
        self.repeats = [case.repeats] * len(self.paths)
        if case.reg:
            reg = sorted((self.root / case.reg).iterdir())
            self.repeats += regularization_repeats(sum(self.repeats), [case.reg_repeats] * len(reg))
            self.paths += reg
        self.masks = find_masks(self.root / case.masks, self.paths) if case.masks else None
        self.sizes = [size_of(path) for path in self.paths]
        fits = [self.buckets.fit(*size).bucket for size in self.sizes]
        self.epochs = Epochs(fits, self.repeats, case.batch_size, dataset_seed(case.seed))
        options = {name: case.subset[name] for name in ("flip_aug", "color_aug", "random_crop") if name in case.subset}
        faces = case.subset.get("face_crop_aug_range")
        self.augment = AugmentOptions(**options, face_crop_aug_range=faces and tuple(faces))

    def item(self, place: int, randoms: random.Random) -> dict[str, Any]:
        """One picture, drawn in sd-scripts' order."""
        path, interpolation = self.paths[place], self.case.subset.get("resize_interpolation")
        flipped = self.augment.flip_aug and flips(randoms)
        crop = crop_of(self.sizes[place], self.buckets, self.augment, randoms, face_of(path))
        picture = read_picture(path)
        assert picture.image.size == self.sizes[place]
        image = crop.of(np.asarray(picture.image), interpolation)
        if self.augment.color_aug:
            image = change_colours(image, randoms)
        found = {"image": image[:, ::-1] if flipped else image, "flipped": flipped, "crop": crop,
                 "sizes": list(crop.conditioning(flipped)), "transparent": picture.transparent}  # fmt: skip
        mask = None
        if self.case.subset.get("alpha_mask"):
            mask = found["alpha"] = crop.of(alpha_mask(picture), interpolation, flipped)
        elif self.masks:
            mask = crop.of(read_mask(self.masks[place], self.sizes[place]), interpolation, flipped)
        if mask is not None:
            found["loss"] = in_latents(mask, (image.shape[0] // 8, image.shape[1] // 8)).numpy()
        return found


def both(case: Case, root: Path) -> Iterator[tuple[Ours, list[int], dict, dict, random.Random]]:
    """Each batch: ours, its places, what sd-scripts has of it, and the generator as it had it."""
    ours, arrays = Ours(case, root), np.load(root / f"{case.name}.npz")
    facts = json.loads((root / "facts.json").read_text())["cases"][case.name]
    assert facts["seed"] == dataset_seed(case.seed)
    for epoch, theirs in enumerate(facts["epochs"], start=1):
        batches = [[i] for i in range(len(ours.paths))] if case.cached else ours.epochs.batches(epoch)
        assert len(batches) == len(theirs)
        for i, (places, found) in enumerate(zip(batches, theirs, strict=True)):
            values = {name.split("/")[2]: arrays[name] for name in arrays.files if name.startswith(f"{epoch}/{i}/")}
            yield ours, places, found, values, random.Random(1000 * epoch + i)


def stems(paths: list) -> list[str]:
    return [Path(path).stem for path in paths]


@pytest.mark.parametrize("case", [case for case in CASES if case.name not in ("as_it_is", "loader")],
                         ids=lambda case: case.name)  # fmt: skip
def test_the_same_batches_crops_and_pixels(root, case):
    pictures = batches = flipped = compared = masks = 0
    shapes, largest = set(), 0.0
    for ours, places, theirs, values, randoms in both(case, root):
        assert stems([ours.paths[place] for place in places]) == stems(theirs["keys"])
        batches += 1
        for i, place in enumerate(places):
            item = ours.item(place, randoms)
            told = theirs["sizes"][i]
            if case.name == "masks_exact" and item["flipped"]:
                assert told[3] == case.resolution[0]  # to which sd-scripts' own cached latents do not agree: 0
                told[3] = 0
            assert item["sizes"] == told, ours.paths[place]
            assert item["image"].shape == values["images"][i].shape
            if not case.cached:
                assert item["flipped"] == theirs["flippeds"][i]
            if case.folder != "alpha" or not item["transparent"]:
                np.testing.assert_array_equal(item["image"], values["images"][i], str(ours.paths[place]))
                compared += 1
            if "alpha" in item:
                np.testing.assert_array_equal(item["alpha"], values["alpha"][i], str(ours.paths[place]))
            if "loss" in item and masks_agree(case, item["crop"]):
                largest = max(largest, np.abs(item["loss"] - values["loss"][i]).max())
                masks += 1
            pictures += 1
            flipped += item["flipped"]
            shapes.add(item["image"].shape)
    assert largest < 1e-6
    print(f"--- {case.name}: {pictures} pictures in {batches} batches of {len(shapes)} buckets, {flipped} flipped: "
          f"batches and sizes equal, {compared} pictures equal"
          + f", {masks} masks within {largest:.1e}" * ("loss" in item))  # fmt: skip


def masks_agree(case: Case, crop: Crop) -> bool:
    """48d368fa squeezes a mask into the bucket where v0.11.1 and we cut it as its picture."""
    return case.subset.get("alpha_mask", False) or not older() or crop.resized == crop.size


def test_what_is_read_otherwise_on_purpose(root):
    """Turned by EXIF, transparent, of 16 bits: those differ from sd-scripts', and none else but a WebP with metadata,
    which imagesize 1.4.1, that sd-scripts pins, takes for a pixel narrower and lower than it is."""
    case = next(case for case in CASES if case.name == "as_it_is")
    ours, arrays = Ours(case, root), np.load(root / "as_it_is.npz")
    facts = json.loads((root / "facts.json").read_text())["cases"]["as_it_is"]["epochs"][0]
    theirs = {Path(batch["keys"][0]).stem: arrays[f"1/{i}/images"][0] for i, batch in enumerate(facts)}
    differ: dict[str, int] = {}
    for place, path in enumerate(ours.paths):
        image = ours.item(place, random.Random(0))["image"]
        kind = path.stem.split("_")[0] if not path.stem.endswith("1") or "turned" not in path.stem else path.stem
        equal = image.shape == theirs[path.stem].shape and (image == theirs[path.stem]).all()
        differ[kind] = differ.get(kind, 0) + (not equal)
    print(f"--- as_it_is: pictures that differ, by kind: {differ}")
    assert differ == {"turned": 21, "turned_jpg1": 0, "turned_png1": 0, "turned_webp1": 1, "transparent": 8, "deep": 8}


def test_a_loader_takes_each_epochs_first_batch_from_the_epoch_before(root):
    """sd-scripts' collator shuffles after the first batch was fetched; we shuffle before."""
    case = next(case for case in CASES if case.name == "loader")
    ours = Ours(case, root)
    facts = json.loads((root / "facts.json").read_text())["cases"]["loader"]["epochs"]
    for epoch, theirs in enumerate(facts, start=1):
        before, now = ours.epochs.batches(epoch - 1), ours.epochs.batches(epoch)
        expected = [before[0], *now[1:]]
        assert [stems([ours.paths[place] for place in batch]) for batch in expected] == [
            stems(batch["keys"]) for batch in theirs
        ]
        twice = len([p for b in expected for p in b]) - len({p for b in expected for p in b})
        print(f"--- loader: epoch {epoch}: {twice} pictures twice in sd-scripts, none in ours")


@pytest.mark.parametrize("number", range(len(LIMITS)))
def test_the_same_bucket_for_100000_sizes(root, number):
    sizes, theirs = np.load(root / "sizes.npy"), np.load(root / f"buckets_{number}.npy")
    buckets, refused, different = Buckets(LIMITS[number]), 0, 0
    for (width, height), wanted in zip(sizes.tolist(), theirs.tolist(), strict=True):
        try:
            fit = buckets.fit(width, height)
        except DeftError:
            refused += 1
            different += any(wanted) and 0 not in wanted[:2]
            continue
        different += [*fit.bucket, *fit.resized] != wanted
    print(f"--- {LIMITS[number]}: {len(sizes)} sizes, {different} differ, {refused} refused by both")
    assert different == 0


def test_tensors(root):
    """Nothing is lost in the bytes that are compared here."""
    image = np.arange(256, dtype=np.uint8).repeat(3).reshape(16, 16, 3)
    tensor = in_tensor(image)
    assert tensor.min() == -1
    assert tensor.max() == 1
    assert (((tensor * 0.5 + 0.5) * 255).round().numpy().transpose(1, 2, 0) == image).all()
