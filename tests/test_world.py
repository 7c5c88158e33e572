"""The small world: its generator, its judge, its model, and what an adapter does to it."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image, ImageChops
from safetensors.torch import load_file

diffusers = pytest.importorskip("diffusers")

from library.world import concepts, draw, judge, measure, scenes, train_judge, train_model  # noqa: E402
from tests.test_resume import run as run_apart  # noqa: E402

ROOT = Path(__file__).parent.parent
CONFIG = "configs/quickstart/creature.toml"
FASTER = ["--network_args", "conv_dim=8", "conv_alpha=8"]  # without keep, and less sparing
STEPS = 70


@pytest.fixture
def soon_drawn(monkeypatch):
    """Pictures in half the steps, which are no better for it."""
    monkeypatch.setattr(measure, "STEPS", 12)


def test_a_seed_is_a_world():
    drawn = [[scenes.draw_scene(random.Random(seed)) for _ in range(20)] for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    pictures = [draw.render([scene.picture() for scene in some]) for some in drawn]
    assert torch.equal(pictures[0], pictures[1])
    assert pictures[0].shape == (20, 3, 64, 64)
    assert pictures[0].abs().max() <= 1


def test_training_scenes_have_no_held_out_combination():
    rng = random.Random(0)
    seen = [scenes.draw_scene(rng) for _ in range(20_000)]
    pairs = {(thing.shape, thing.colour) for scene in seen for thing in scene.things}
    assert len(pairs) == 56, "8 of the 64 pairs of shape and colour are never shown"
    held_out = [scenes.draw_scene(rng, held_out=True) for _ in range(2000)]
    assert not set(map(_combination, seen)) & set(map(_combination, held_out))


def _combination(scene):
    things = tuple((thing.shape, thing.colour) for thing in scene.things)
    return (things, scene.relation, scene.background if len(things) == 1 else None)


@pytest.mark.parametrize(("index", "first", "second"), [(0, "left", "right"), (1, "above", "below")])
def test_relations_name_the_places(index, first, second):
    rng = random.Random(index)
    for _ in range(300):
        scene = scenes.draw_scene(rng, "pair")
        if scene.relation != scenes.RELATIONS[index]:
            continue
        one, two = scene.things
        assert (one.x < two.x) if index == 0 else (one.y < two.y)
        names = [f"{thing.colour} {thing.shape}" for thing in scene.things]
        text = scenes.caption(scene, rng)
        if f" {first} " in text:
            assert text.index(names[0]) < text.index(f" {first} ") < text.rindex(names[1])
        elif f" {second} " in text:
            assert text.index(names[1]) < text.index(f" {second} ") < text.rindex(names[0])


def test_pictures_have_the_colours_that_they_name():
    """By counting pixels, which the judge has no part in."""
    rng = random.Random(3)
    for _ in range(100):
        scene = scenes.draw_scene(rng, "single")
        pixels = draw.render([scene.picture()])[0].flatten(1).T
        for name, least in ((scene.background, 0.4), (scene.things[0].colour, 0.005)):
            colour = torch.tensor(scenes.PALETTE[name]) / 127.5 - 1
            assert ((pixels - colour).abs().amax(1) < 0.02).float().mean() > least


def test_every_word_of_a_caption_is_a_token(tmp_path):
    tokenizer = train_model.build_tokenizer(tmp_path)
    shipped = diffusers.StableDiffusionPipeline.from_pretrained(measure.MODEL).tokenizer
    rng = random.Random(4)
    for _ in range(500):
        text = scenes.caption(scenes.draw_scene(rng), rng)
        words = text.replace(",", " ,").split()
        assert [token.removesuffix("</w>") for token in tokenizer.tokenize(text)] == words
        assert tokenizer(text).input_ids == shipped(text).input_ids
    assert shipped.decode(shipped("sks, déjà vu").input_ids, skip_special_tokens=True).split()[0] == "sks"


def test_the_quickstarts_pictures_are_the_creature(tmp_path):
    """The five files in the repository are what the code draws."""
    from library.quickstart import CREATURE

    committed = ROOT / "configs" / "quickstart" / "creature" / "20_sks"
    names = ("white", "grey", "black", "green", "yellow")
    drawn = concepts.write_data_set(tmp_path, concepts.creature(CREATURE), "sks", names, seed=0)
    for name, image in zip(names, drawn, strict=True):
        with Image.open(committed / f"{name}.png") as shipped:
            assert ImageChops.difference(shipped, image).getbbox() is None
        assert (committed / f"{name}.txt").read_text() == (tmp_path / f"{name}.txt").read_text()


def test_judge_on_renders():
    """Of combinations that its training saw in other places, sizes and noise."""
    shares = train_judge.accuracy(judge.load(), 300, torch.device("cpu"), seed=1)
    assert min(shares.values()) > 0.97, shares


def test_judge_sees_what_is_wrong():
    """A judge that always agrees would pass all else."""
    rng = random.Random(5)
    asked = [scenes.draw_scene(rng, kind) for kind in ("single", "pair", "several") for _ in range(100)]
    others = [scenes.draw_scene(rng, kind) for kind in ("single", "pair", "several") for _ in range(100)]
    readings = judge.read(judge.load(), draw.render([scene.picture() for scene in others]))
    found: dict[str, list[bool]] = {}
    for scene, reading in zip(asked, readings, strict=True):
        for name, right in judge.agreement(scene, reading).items():
            found.setdefault(name, []).append(right)
    chance = {"background": 1 / 6, "colour": 1 / 8, "shape": 1 / 8, "pair": 0.01, "relation": 0.25, "count": 0.5}
    for name, expected in chance.items():
        assert abs(sum(found[name]) / len(found[name]) - expected) < 0.17, name


def test_model_is_small_and_plain():
    size = sum(path.stat().st_size for path in measure.MODEL.rglob("*.safetensors"))
    assert size < 25e6
    pipeline = diffusers.StableDiffusionPipeline.from_pretrained(measure.MODEL)
    names = [type(part).__name__ for part in (pipeline.unet, pipeline.vae, pipeline.text_encoder, pipeline.tokenizer)]
    assert names[:3] == ["UNet2DConditionModel", "AutoencoderKL", "CLIPTextModel"]
    assert names[3].startswith("CLIPTokenizer")
    text_encoder = load_file(measure.MODEL / "text_encoder" / "model.safetensors")
    assert all(name.startswith("text_model.") for name in text_encoder), "older transformers find no others"


@pytest.mark.usefixtures("soon_drawn")
def test_model_draws_what_it_is_asked_for():
    results = measure.agreements(judge.load(), measure.load(measure.MODEL), measure.known_scenes(32))
    shares = {name: sum(right) / len(right) for name, right in results.items()}
    assert min(shares[name] for name in ("colour", "background", "shape")) > 0.7, shares


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    """The quickstart's adapter in fewer steps, which takes it about as far."""
    folder = tmp_path_factory.mktemp("trained")
    _train(folder, STEPS, FASTER)
    return folder / "sks.safetensors"


def _train(folder: Path, steps: int, options: list[str], anew: bool = False) -> None:
    """:param anew: in a process with a hash seed of its own"""
    words = ["--config_file", CONFIG, "--output_dir", str(folder), "--max_train_steps", str(steps)]
    run_apart([*words, "--logging_dir", str(folder / "logs"), "--sample_every_n_steps", "9999", *options], anew)


@pytest.mark.usefixtures("soon_drawn")
def test_adapter_learns_the_creature(trained):
    """The file, in a fresh pipeline: at its full strength the pictures are like the creature, at none they are the base
    model's bit for bit, at half they lie between."""
    from library.quickstart import CREATURE

    likeness = measure.Likeness(judge.load(), concepts.creature(CREATURE))
    prompts = measure.concept_prompts("sks", 16)
    pipeline = measure.load(measure.MODEL)
    base = measure.draw(pipeline, prompts, range(16))
    pipeline.load_lora_weights(str(trained.parent), weight_name=trained.name, adapter_name="sks")
    pictures = {}
    for strength in (0.0, 0.5, 1.0):
        pipeline.set_adapters("sks", strength)
        pictures[strength] = measure.draw(pipeline, prompts, range(16))
    assert torch.equal(pictures[0.0], base)
    way = [sum(likeness(pixels)) / 16 / likeness.of_renders for pixels in (base, pictures[0.5], pictures[1.0])]
    assert way[2] - way[0] > 0.3 * (1 - way[0]), way
    assert way[0] - 0.05 < way[1] < way[2] + 0.05, way
    changes = [(pictures[strength] - base).abs().mean() for strength in (0.5, 1.0)]
    assert 0 < changes[0] < changes[1]


def test_training_repeats_bit_for_bit(tmp_path):
    """With directions to keep, of a few prompts, which each training finds for itself."""
    prompts = (ROOT / CONFIG).with_name("keep.txt").read_text(encoding="utf-8").splitlines()
    few, files = tmp_path / "keep.txt", []
    few.write_text("\n".join(f"{prompt} --s 3" for prompt in prompts[:4]), encoding="utf-8")
    for folder in ("first", "second"):
        _train(tmp_path / folder, 8, [*FASTER, f"keep={few}"], anew=folder == "second")
        files.append(load_file(tmp_path / folder / "sks.safetensors"))
        shutil.rmtree(tmp_path / folder)
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(files[0][name], files[1][name]) for name in files[0])
    assert any(tensor.any() for name, tensor in files[0].items() if "lora_up" in name)


def test_the_recipe_repeats(tmp_path):
    """All stages, with next to no steps: the same seed gives the same model, and another seed another one."""
    from library.world import train

    steps = ["--vae_steps", "2", "--judge_steps", "2", "--text_steps", "2", "--unet_steps", "2"]
    models = []
    for name, seed in (("first", "0"), ("again", "0"), ("other", "1")):
        work = tmp_path / name
        options = ["--work", str(work), "--seed", seed, "--batch_size", "4", "--pictures", "8", "--device", "cpu"]
        assert train.main(["vae", "judge", "model", *options, *steps]) == 0
        files = [work / "judge.safetensors", *sorted((work / "model").rglob("*.safetensors"))]
        assert len(files) == 4
        models.append({f"{file.name} {key}": value for file in files for key, value in load_file(file).items()})
    first, again, other = models
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not all(torch.equal(first[name], other[name]) for name in first)


def test_a_recipe_that_was_broken_off_goes_on(tmp_path, monkeypatch):
    """The U-Net's training from a checkpoint is the one that was not broken off."""
    from diffusers import AutoencoderKL, UNet2DConditionModel

    from library.world import train_vae

    torch.manual_seed(0)
    tokenizer = train_model.build_tokenizer(tmp_path)
    vae = AutoencoderKL(**train_vae.CONFIG)
    pictures = train_model.make_pictures(vae, tokenizer, 8, torch.device("cpu"), 0)
    empty = train_model.tokens(tokenizer, [""])[0]
    monkeypatch.setattr(train_model, "SAVE_EVERY", 2)
    results = []
    for runs in ((4,), (2, 4)):
        checkpoint = tmp_path / f"{len(runs)}.pt"
        for stop in runs:
            torch.manual_seed(1)
            unet = UNet2DConditionModel(**train_model.UNET)
            text_encoder = train_model.build_text_encoder(tokenizer)
            unet, _ = train_model.train_unet(
                unet, text_encoder, pictures, empty, 4, 4, torch.device("cpu"), 0, checkpoint, stop=stop
            )
        results.append(unet.state_dict())
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
