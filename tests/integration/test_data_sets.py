"""Whole data sets, from the command line to batches and token ids, against sd-scripts' own on the same pictures, each
side in its own Python.

SD_SCRIPTS_DIR=... SD_SCRIPTS_PYTHON=... pytest tests/integration/test_data_sets.py -s

SD_SCRIPTS_TOKENIZERS: a folder of published models' parts (runwayml/, stabilityai/, black-forest-labs/, as Stable
Diffusion WebUI Forge has it in backend/huggingface), to take their tokenizers; else small ones are taken.
DREAMBOOTH_DIR: the folder dataset/ of github.com/google/dreambooth, for configurations of those photos too.

Both sides draw the same numbers for a picture's turn: ours begin a stream for each purpose by seed, epoch and place,
and sd-scripts' random source is begun anew by the same text before it draws for that purpose.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import random
import shlex
import shutil
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from PIL import Image
from torch import Tensor
from transformers import CLIPTokenizer, T5TokenizerFast

from library.data.batches import Batch, Loader, Turn
from library.data.buckets import Epochs, dataset_seed
from library.data.index import Index
from library.data.pixels import read_picture
from library.data.plan import Dataset, Picture, Plan, plan_of
from library.data.remarks import Remarks
from library.models.clip import OPEN_CLIP_PADDING, Reader, cleaned
from library.models.family import Family
from library.models.flux import Flux
from library.options.parse import parse
from library.options.rooms import Run
from library.training import prepare
from tests import small_flux, small_models
from tests.integration.conftest import needs_sd_scripts, run_script
from tests.integration.test_pictures import older, write_faces, write_masks, write_on_purpose, write_plain

pytestmark = [needs_sd_scripts, pytest.mark.usefixtures("fresh_accelerator")]

SIDE = Path(__file__).with_name("data_sets_side.py")
TOKENIZERS = os.environ.get("SD_SCRIPTS_TOKENIZERS")
DREAMBOOTH = os.environ.get("DREAMBOOTH_DIR")
PICTURES, EPOCHS, T5, STEPS = 210, 3, 64, 200
CLIP_L, BIG_G, T5_XXL = (
    "openai_clip-vit-large-patch14", "laion_CLIP-ViT-bigG-14-laion2B-39B-b160k", "google_t5-v1_1-xxl",
)  # fmt: skip
PUBLISHED = {CLIP_L: "runwayml/stable-diffusion-v1-5/tokenizer", T5_XXL: "black-forest-labs/FLUX.1-dev/tokenizer_2",
             BIG_G: "stabilityai/stable-diffusion-xl-base-1.0/tokenizer_2"}  # fmt: skip


# --- cases -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A configuration; ROOT in it stands for the folder of all pictures.

    :param dataset: of --dataset_config
    :param arguments: further words of the command line
    :param shows: `Counts` that it is there for
    """

    name: str
    dataset: str = ""
    arguments: str = ""
    script: str = "train_network"
    seed: int = 1
    shows: tuple[str, ...] = ()

    def written(self, root: Path) -> list[str]:
        """Its command line; writes its file."""
        words = (
            "--pretrained_model_name_or_path ROOT/model --output_dir ROOT/out --network_module networks.deft "
            f"--tokenizer_cache_dir ROOT/tokenizers --max_train_steps {STEPS} --seed {self.seed} {self.arguments}"
        )
        if self.script == "flux_train_network":
            words += f" --t5xxl_max_token_length {T5}"
        found = [word.replace("ROOT", str(root)) for word in shlex.split(words)]
        if self.dataset:
            file = root / f"{self.name}.toml"
            file.write_text(self.dataset.replace("ROOT", str(root)), encoding="utf-8")
            found += ["--dataset_config", str(file)]
        return found


BUCKETS = "enable_bucket = true\nmin_bucket_reso = 64\nmax_bucket_reso = 256\nbucket_reso_steps = 32\n"
GENERAL = f"[general]\ncaption_extension = '.txt'\n{BUCKETS}"
IN_BUCKETS = "--enable_bucket --min_bucket_reso 64 --max_bucket_reso 256 --bucket_reso_steps 32 "
CASES = [
    Case("two_resolutions", GENERAL + """flip_aug = true
shuffle_caption = true
[[datasets]]
resolution = 128
batch_size = 3
  [[datasets.subsets]]
  image_dir = 'ROOT/plain'
  class_tokens = 'sks thing'
  num_repeats = 2
  keep_tokens = 1
[[datasets]]
resolution = [192, 128]
batch_size = 5
bucket_reso_steps = 64
network_multiplier = 0.5
  [[datasets.subsets]]
  image_dir = 'ROOT/plain'
  class_tokens = 'other thing'
  caption_dropout_rate = 0.2
""", shows=("flipped", "dropped", "cut")),
    Case("folders_and_reg", arguments="--train_data_dir ROOT/train --reg_data_dir ROOT/reg --resolution 128,128 "
         "--train_batch_size 4 --prior_loss_weight 0.5 --flip_aug --shuffle_caption --caption_prefix 'a photo,' "
         "--caption_suffix ', end' --caption_extension .txt " + IN_BUCKETS, script="sdxl_train_network", seed=42,
         shows=("flipped", "cut", "weighted")),
    Case("fine_tuning", arguments="--train_data_dir ROOT/plain --in_json ROOT/tags.json --dataset_repeats 2 "
         "--resolution 160,128 --train_batch_size 6 --shuffle_caption --keep_tokens 2 --caption_tag_dropout_rate 0.2 "
         "--flip_aug " + IN_BUCKETS, script="flux_train_network", seed=7, shows=("flipped",)),
    Case("no_upscale", """[general]
caption_extension = '.txt'
enable_bucket = true
bucket_no_upscale = true
min_bucket_reso = 64
caption_tag_dropout_rate = 0.3
[[datasets]]
resolution = 256
batch_size = 2
bucket_reso_steps = 64
  [[datasets.subsets]]
  image_dir = 'ROOT/large'
  class_tokens = 'large ones'
[[datasets]]
resolution = [256, 192]
batch_size = 4
bucket_reso_steps = 32
  [[datasets.subsets]]
  image_dir = 'ROOT/plain'
  class_tokens = 'all of them'
  shuffle_caption = true
  keep_tokens = 3
""", "--max_token_length 225", shows=("cut",)),
    Case("random_crop", """[general]
caption_extension = '.txt'
resolution = [128, 112]
random_crop = true
flip_aug = true
color_aug = true
[[datasets]]
batch_size = 3
enable_bucket = false
  [[datasets.subsets]]
  image_dir = 'ROOT/large'
  class_tokens = 'large'
  caption_prefix = 'before'
  caption_suffix = 'behind'
  num_repeats = 3
[[datasets]]
batch_size = 4
enable_bucket = true
min_bucket_reso = 64
max_bucket_reso = 256
bucket_reso_steps = 32
  [[datasets.subsets]]
  image_dir = 'ROOT/plain'
[[datasets]]
batch_size = 2
  [[datasets.subsets]]
  image_dir = 'ROOT/faces'
  face_crop_aug_range = [2.0, 4.0]
""", "--max_token_length 150", "sdxl_train_network", 5, ("flipped",)),
    Case("without_buckets", """[general]
caption_extension = '.txt'
resolution = [160, 96]
batch_size = 4
[[datasets]]
  [[datasets.subsets]]
  image_dir = 'ROOT/plain'
  class_tokens = 'sks thing'
  flip_aug = true
  enable_wildcard = true
""", "--cache_latents --vae_batch_size 3", "sdxl_train_network", shows=("flipped",)),
    Case("alpha_mask", GENERAL + """flip_aug = true
resolution = 128
batch_size = 3
[[datasets]]
  [[datasets.subsets]]
  image_dir = 'ROOT/alpha'
  class_tokens = 'see through'
  alpha_mask = true
  num_repeats = 3
[[datasets]]
  [[datasets.subsets]]
  image_dir = 'ROOT/plain'
  class_tokens = 'first, second||| third;;;fourth, fifth'
  shuffle_caption = true
  keep_tokens_separator = '|||'
  secondary_separator = ';;;'
  enable_wildcard = true
  [[datasets.subsets]]
  image_dir = 'ROOT/large_alpha'
  alpha_mask = true
""", "--max_token_length 225", "sdxl_train_network", 3, ("flipped", "masks", "transparent")),
    Case("masks", GENERAL + """resolution = 128
batch_size = 3
[[datasets]]
  [[datasets.subsets]]
  image_dir = 'ROOT/plain'
  conditioning_data_dir = 'ROOT/masks'
  flip_aug = true
  shuffle_caption = true
""", "--masked_loss", shows=("flipped", "masks")),
    Case("interpolations", GENERAL + """resolution = 144
batch_size = 3
resize_interpolation = 'lanczos'
""" + "".join(f"""[[datasets]]
  [[datasets.subsets]]
  image_dir = 'ROOT/parts/{i}'
  class_tokens = 'part {i}'
  flip_aug = {('true', 'false')[i % 2]}
{f"  resize_interpolation = '{name}'" if name else ''}
""" for i, name in enumerate(("", "nearest", "area", "bicubic", "box", "bilinear"))),
         "--cache_latents --vae_batch_size 2", seed=9, shows=("flipped",)),
    Case("captions_over_time", GENERAL + """resolution = 128
batch_size = 4
enable_wildcard = true
token_warmup_min = 2
token_warmup_step = 0.6
[[datasets]]
  [[datasets.subsets]]
  image_dir = 'ROOT/plain'
  class_tokens = 'a {red|green|blue} thing, {{kept}}, third, fourth, fifth'
  caption_dropout_every_n_epochs = 2
  shuffle_caption = true
  color_aug = true
  [[datasets.subsets]]
  image_dir = 'ROOT/large'
  is_reg = true
  class_tokens = 'thing'
  num_repeats = 2
  random_crop = true
  [datasets.subsets.custom_attributes]
  diff_output_preservation = true
""", "--prior_loss_weight 0.25", "flux_train_network", 11, ("dropped", "cut", "weighted", "preserved")),
]  # fmt: skip
if not older():
    CASES.append(Case("skip", f"[general]\nresolution = 128\nskip_image_resolution = [150, 120]\n{BUCKETS}" + """
[[datasets]]
batch_size = 3
  [[datasets.subsets]]
  image_dir = 'ROOT/plain'
  caption_extension = '.txt'
[[datasets]]
batch_size = 2
  [[datasets.subsets]]
  image_dir = 'ROOT/plain'
  metadata_file = 'ROOT/tags.json'
  shuffle_caption = true
"""))  # fmt: skip
if DREAMBOOTH:
    CASES += [
        Case("dreambooth_folders", arguments="--train_data_dir ROOT/dreambooth --resolution 256,256 "
             "--train_batch_size 4 --enable_bucket --min_bucket_reso 128 --max_bucket_reso 512 --bucket_reso_steps 32 "
             "--flip_aug --caption_extension .txt", script="sdxl_train_network"),
        Case("dreambooth_no_upscale", arguments="--train_data_dir ROOT/dreambooth --resolution 512,512 "
             "--train_batch_size 2 --enable_bucket --bucket_no_upscale --caption_extension .txt --caption_prefix "
             "'a photo of'", script="flux_train_network"),
        Case("dreambooth_unbucketed", arguments="--train_data_dir ROOT/dreambooth --resolution 256,320 "
             "--train_batch_size 8 --caption_extension .txt --random_crop --flip_aug --color_aug"),
    ]  # fmt: skip


# --- pictures --------------------------------------------------------------------------------------------------------


def write_captions(folder: Path) -> None:
    """Of most pictures: tags, separators, wildcards, several lines, long ones, other scripts."""
    tags = ("red ball", "1girl", "a house by the sea", "日本", "é", "solo", "(weighted:1.2)", "{red|green} car",
            "{{b}}", "left;;;right", "<sign>", "“quoted”", "50% off!", "UPPER case", "dog's", "a_b c_d")  # fmt: skip
    for i, path in enumerate(sorted(folder.iterdir())):
        draw = random.Random(i)
        if i % 7 == 0:
            continue
        lines = [", ".join(draw.choices(tags, k=draw.choice((1, 3, 6, 12)))) for _ in range(draw.choice((1, 1, 3)))]
        if i % 5 == 0:
            lines[0] = f"sks, first ||| {lines[0]}" + " ||| last, very last" * (i % 2)
        if i % 11 == 0:
            lines[0] += ", " + ", ".join(f"{draw.choice(tags)} {j}" for j in range(40))
        path.with_suffix(".txt").write_bytes(("\n", "\r\n")[i % 2].join(lines).encode())


def write_tags(file: Path, folder: Path) -> None:
    """A metadata file of a folder's pictures, named in all ways that the version of sd-scripts knows."""
    found = {}
    for i, path in enumerate(path for path in sorted(folder.iterdir()) if path.suffix != ".txt"):
        draw = random.Random(i)
        key = (str(path), path.name, path.name if older() else path.stem)[i % 3]
        tags = ", ".join(
            draw.choices(("1girl", "solo", "red hair", "日本", "smile", "outdoors", "a b"), k=draw.randrange(9))
        )
        found[key] = {"caption": draw.choice(("a cat", "two dogs, running", ""))} | ({"tags": tags} if i % 4 else {})
    file.write_text(json.dumps(found), encoding="utf-8")


def copied(files: list[Path], folder: Path) -> None:
    folder.mkdir(parents=True)
    for path in files:
        shutil.copy(path, folder)
        if path.with_suffix(".txt").is_file():
            shutil.copy(path.with_suffix(".txt"), folder)


def write_photos(folder: Path, photos: Path) -> None:
    """Google's photos in folders as kohya names them; those that are read otherwise on purpose are made plain."""
    as_they_are = plain = 0
    for number, subject in enumerate(sorted(path for path in photos.iterdir() if path.is_dir())):
        to = folder / f"{1 + number % 3}_sks {subject.name.replace('_', ' ')}"
        to.mkdir(parents=True)
        for path in sorted(subject.iterdir()):
            with Image.open(path) as image:
                usual = image.getexif().get(0x0112, 1) == 1 and image.mode == "RGB"
            as_they_are, plain = as_they_are + usual, plain + (not usual)
            if usual:
                shutil.copy(path, to)
            else:
                read_picture(path).image.save(to / f"{path.stem}.png")
    print(f"--- {as_they_are} photos as they are, {plain} made plain")


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """Pictures, captions, masks, tokenizers."""
    root = tmp_path_factory.mktemp("data_sets")
    write_plain(root / "plain", PICTURES)
    write_masks(root / "masks", root / "plain")
    write_captions(root / "plain")
    write_plain(root / "large", 60, (130, 500), "large{:03}_{}")
    write_faces(root / "faces", 40)
    write_on_purpose(root / "purpose")
    transparent = sorted((root / "purpose" / "odd").glob("transparent*"))
    plain = [path for path in sorted((root / "plain").iterdir()) if path.suffix != ".txt"]
    copied([*transparent, *plain[:26]], root / "alpha")
    copied(transparent, root / "large_alpha")
    copied(plain[:120], root / "train" / "2_sks cat")
    copied(plain[120:], root / "train" / "1_other_thing")
    copied(sorted((root / "large").iterdir()), root / "reg" / "2_animal")
    for i in range(6):
        copied(plain[i::6], root / "parts" / str(i))
    write_tags(root / "tags.json", root / "plain")
    if DREAMBOOTH:
        write_photos(root / "dreambooth", Path(DREAMBOOTH))
    if TOKENIZERS:
        for name, place in PUBLISHED.items():
            shutil.copytree(Path(TOKENIZERS, place), root / "tokenizers" / name)
    else:
        for name in (CLIP_L, BIG_G):
            small_models.tokenizer(root / "tokenizers" / name)
        small_flux.t5_tokenizer(root / "tokenizers" / T5_XXL)
    return root


# --- ours ------------------------------------------------------------------------------------------------------------


class Pixels:
    """A model whose latents are the pixels themselves, 8 x 8 of them in the channels of one latent."""

    multiple_of = pixels_per_latent = 8
    takes_pictures, dropped = Family.takes_pictures, Family.dropped

    def __init__(self) -> None:
        self.vae = torch.nn.Identity()

    def encode_image(self, pixels: Tensor, generators: Any) -> Tensor:
        return F.pixel_unshuffle(pixels, self.pixels_per_latent)


@dataclass
class Ours:
    """What the trainer makes of a command line before its first step."""

    run: Run
    plan: Plan
    loader: Loader

    @classmethod
    def of(cls, arguments: list[str], seed: int, folder: Path) -> Ours:
        run = parse([*arguments, "--cache_dir", str(folder)])
        model: Any = Pixels()
        accelerator = Accelerator(cpu=True)
        plan = plan_of(run.data, Index(folder), Remarks())
        plan, latents = prepare.read_pictures(run.data, plan, model, accelerator)
        weight = run.preservation.prior_loss_weight
        loader = prepare.loader_of(plan, seed, weight=weight, latents=latents, model=model, accelerator=accelerator)
        loader.steps = STEPS
        return cls(run, plan, loader)

    def epoch(self, number: int) -> list[list[tuple[list[Turn], Batch]]]:
        """The batches of each data set, in its own order, which sd-scripts' are in too."""
        came = defaultdict(list)
        for turns, batch in zip(self.loader.turns(number), self.loader.epoch(number), strict=True):
            came[turns[0].dataset, tuple(turn.picture for turn in turns)].append((turns, batch))
        found = []
        for place, dataset in enumerate(self.plan):
            order = epochs_of(dataset, self.loader.seed).batches(number)
            found.append([came[place, tuple(pictures)].pop(0) for pictures in order])
        assert not any(came.values())  # no batch is too many
        return found


def epochs_of(dataset: Dataset, seed: int) -> Epochs:
    pictures = dataset.pictures
    buckets, repeats = [one.fit.bucket for one in pictures], [one.repeats for one in pictures]
    return Epochs(buckets, repeats, dataset.options.batch_size, dataset_seed(seed))


class Ids:
    """Token ids, and T5's attention mask, as the models of a script read captions."""

    def __init__(self, tokenizers: Path, script: str, max_token_length: int | None):
        self.clip: Any = CLIPTokenizer.from_pretrained(str(tokenizers / CLIP_L))
        self.readers = [Reader(self.clip, self.clip.eos_token_id, 77, max_token_length)]
        self.t5 = None
        if script == "sdxl_train_network":
            second = CLIPTokenizer.from_pretrained(str(tokenizers / BIG_G))
            self.readers.append(Reader(second, OPEN_CLIP_PADDING, 77, max_token_length))
        if script == "flux_train_network":
            self.t5 = T5TokenizerFast.from_pretrained(str(tokenizers / T5_XXL))

    def of(self, captions: list[str]) -> list[Tensor]:
        if self.t5 is None:
            return [reader.tokens(captions) for reader in self.readers]
        short = Flux._tokens_of(self.clip, list(map(cleaned, captions)), 77)
        long = Flux._tokens_of(self.t5, captions, T5)
        return [short.input_ids, long.input_ids, long.attention_mask]

    def are_cut(self, caption: str) -> bool:
        """Whether an encoder reads less than the whole caption."""
        if self.t5 is not None and len(self.t5(caption).input_ids) > T5:
            return True
        return any(reader.beyond(caption)[0] != "" for reader in self.readers)


def digest(tensor: Tensor) -> str:
    return hashlib.blake2b(tensor.contiguous().numpy().tobytes(), digest_size=16).hexdigest()


# --- compared --------------------------------------------------------------------------------------------------------


def theirs_of(case: Case, arguments: list[str], turns: list[Any], root: Path) -> tuple[dict[str, Any], Any]:
    """What sd-scripts makes of it, its random numbers begun as ours are for the same places; and the arrays of each
    batch, by EPOCH/DATA SET/BATCH."""
    request = root / f"{case.name}-request.json"
    asked = {"name": case.name, "script": case.script, "arguments": arguments, "turns": turns}
    request.write_text(json.dumps([asked]), encoding="utf-8")
    run_script(SIDE, root, request, with_deft=False)
    arrays = defaultdict(dict)
    with np.load(root / f"{case.name}.npz") as file:
        for name in file.files:
            batch, kind = name.rsplit("/", 1)
            arrays[batch][kind] = file[name]
    return json.loads((root / f"{case.name}.json").read_text(encoding="utf-8")), arrays


@dataclass
class Counts:
    """Of what was compared in a configuration, and found equal."""

    batches: int = 0
    pictures: int = 0
    buckets: set[tuple[int, ...]] = field(default_factory=set)
    flipped: int = 0
    transparent: int = 0  # whose pixels are otherwise on purpose, so that only their masks are compared
    masks: int = 0
    captions: set[str] = field(default_factory=set)
    dropped: int = 0
    cut: int = 0  # by the tokenizer
    tokens: int = 0
    weighted: int = 0  # regularisation pictures
    preserved: int = 0

    def compare(self, ours: Ours, turns: list[Turn], batch: Batch, theirs: dict[str, Any], arrays: dict[str, Any],
                ids: Ids) -> None:  # fmt: skip
        """:param arrays: of that batch: token ids and masks"""
        pictures = [ours.plan[turn.dataset].pictures[turn.picture] for turn in turns]
        assert [str(picture.path) for picture in pictures] == theirs["paths"]
        assert batch.sizes.tolist() == theirs["sizes"], theirs["paths"]
        assert batch.captions == theirs["captions"], theirs["paths"]
        assert batch.weights.tolist() == theirs["weights"]
        assert [i in batch.preserved for i in range(len(batch))] == theirs["preserved"]
        assert [batch.multiplier] * len(batch) == theirs["multipliers"]
        images = F.pixel_shuffle(batch.latents, Pixels.pixels_per_latent) if batch.pixels is None else batch.pixels
        assert list(images.shape[-2:]) == theirs["shape"]
        for picture, image, wanted in zip(pictures, images, theirs["pixels"], strict=True):
            if is_transparent(picture.path):
                self.transparent += 1
            else:
                assert digest(image) == wanted, picture.path
        self._compare_masks(pictures, batch, arrays)
        read = ids.of(batch.captions)
        assert [f"ids {i}" for i in range(len(read))] == sorted(arrays.keys() - {"mask"})
        for i, found in enumerate(read):
            np.testing.assert_array_equal(found.numpy().reshape(arrays[f"ids {i}"].shape), arrays[f"ids {i}"])
            self.tokens += found.numel()
        self.batches, self.pictures = self.batches + 1, self.pictures + len(batch)
        self.buckets.add(tuple(images.shape[-2:]))
        self.flipped += sum(theirs["flipped"])
        self.captions.update(batch.captions)
        self.dropped += sum(caption == "" for caption in batch.captions)
        self.cut += sum(ids.are_cut(caption) for caption in batch.captions)
        self.weighted += sum(weight != 1 for weight in theirs["weights"])
        self.preserved += len(batch.preserved)

    def _compare_masks(self, pictures: list[Picture], batch: Batch, arrays: dict[str, Any]) -> None:
        assert (batch.masks is None) == ("mask" not in arrays)
        for i, picture in enumerate(pictures if batch.masks is not None else ()):
            # 48d368fa squeezes masks of files into the bucket where v0.11.1 and we cut them as the picture
            if picture.mask is None or not older() or picture.fit.resized == picture.fit.bucket:
                np.testing.assert_allclose(batch.masks[i].numpy(), arrays["mask"][i], atol=1e-6, rtol=0)
                self.masks += 1

    def __str__(self) -> str:
        told = (f"{len(value) if isinstance(value, set) else value} {name}" for name, value in vars(self).items())
        return ", ".join(one for one in told if not one.startswith("0 "))


@functools.cache
def is_transparent(path: Path) -> bool:
    return read_picture(path).transparent


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_the_whole_data_set(root, case, tmp_path):
    arguments = case.written(root)
    ours = Ours.of(arguments, case.seed, tmp_path)
    epochs = [ours.epoch(number) for number in range(1, EPOCHS + 1)]
    turns = [[[[[turn.place for turn in of_batch], of_batch[0].step] for of_batch, _ in of_dataset]
              for of_dataset in epoch] for epoch in epochs]  # fmt: skip
    facts, arrays = theirs_of(case, arguments, turns, root)

    assert facts["seeds"] == [dataset_seed(case.seed)] * len(ours.plan)
    for dataset, wanted in zip(ours.plan, facts["pictures"], strict=True):
        found = [[str(one.path), one.repeats, one.caption, list(one.size), list(one.fit.bucket), list(one.fit.resized),
                  one.subset.is_reg] for one in dataset.pictures]  # fmt: skip
        assert found == wanted
    ids, counts = Ids(root / "tokenizers", case.script, ours.run.model.max_token_length), Counts()
    for number, (epoch, wanted) in enumerate(zip(epochs, facts["epochs"], strict=True), start=1):
        assert [len(of_dataset) for of_dataset in epoch] == [len(of_dataset) for of_dataset in wanted]
        for place, (of_dataset, of_theirs) in enumerate(zip(epoch, wanted, strict=True)):
            for i, ((of_batch, batch), their) in enumerate(zip(of_dataset, of_theirs, strict=True)):
                counts.compare(ours, of_batch, batch, their, arrays[f"{number}/{place}/{i}"], ids)
    different = sum(len(dataset.pictures) for dataset in ours.plan)
    print(
        f"--- {case.name}: {different} pictures of {len(ours.plan)} data sets, in {EPOCHS} epochs {counts}: all equal"
    )
    for name in case.shows:
        assert getattr(counts, name), name
