"""Configuration files of data sets and options: precedence, what is refused and how, damaged files."""

from __future__ import annotations

import json
import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

import pytest
import toml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from library.options.dataset_config import named_folders
from library.options.dataset_file import DATASET, GENERAL, KEYS, SUBSET, read_dataset_config
from library.options.parse import parse
from library.options.rooms import AugmentOptions, Run
from library.options.table import OPTIONS
from networks.deft_config import DeftError
from tests.kohya_configs import CASES, MODEL, NEW_CASES, Case, make_data, written


@dataclass(frozen=True)
class Refused(Case):
    """A configuration that is refused, with what is said; and whether sd-scripts passes the fault over."""

    told: str = ""
    passed_over: bool = False


def folders(text: str, general: str = "", dataset: str = "resolution = 512") -> str:
    """A data set of one subset, with more of its keys."""
    return f"[general]\n{general}\n[[datasets]]\n{dataset}\n[[datasets.subsets]]\nimage_dir = 'DATA/cats'\n{text}\n"


TRAIN = ("--train_data_dir", "DATA/train", "--resolution", "512")
REFUSED: dict[str, Refused] = {
    "misspelt in a subset": Refused(
        dataset=folders("num_repeat = 3"),
        told="[[datasets]] 1, subset 1: unknown key 'num_repeat' (did you mean 'num_repeats'?)",
    ),
    "all that is misspelt": Refused(
        dataset=folders("shufle_caption = true\nbatch_size = 2", "resolutoin = 512\nimage_dir = 'x'", "subset = 1"),
        told="[general]: unknown key 'resolutoin' (did you mean 'resolution'?); "
        "[general]: 'image_dir' belongs into [[datasets.subsets]]; "
        "[[datasets]] 1: unknown key 'subset' (did you mean 'subsets'?); "
        "[[datasets]] 1, subset 1: unknown key 'shufle_caption' (did you mean 'shuffle_caption'?); "
        "[[datasets]] 1, subset 1: 'batch_size' belongs into [general] or [[datasets]]",
    ),
    "outside of all sections": Refused(
        dataset="resolution = 512\n" + folders(""), told="'resolution' belongs into [general] or [[datasets]]"
    ),
    "a section of another name": Refused(
        dataset=folders("") + "[generall]\n", told="unknown key or section 'generall' (did you mean 'general'?)"
    ),
    "subsets without a data set": Refused(
        dataset="[[subsets]]\nimage_dir = 'DATA/cats'\n", told="'subsets' belong to a data set"
    ),
    "single brackets": Refused(
        dataset="[datasets]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = 'DATA/cats'\n",
        told="datasets must be a list: write [[datasets]], in double brackets",
    ),
    "single brackets of a subset": Refused(
        dataset="[[datasets]]\nresolution = 512\n[datasets.subsets]\nimage_dir = 'DATA/cats'\n",
        told="[[datasets]] 1: subsets must be a list: write [[datasets.subsets]], in double brackets",
    ),
    "no data set": Refused(dataset="[general]\nresolution = 512\n", told="has no data set: write [[datasets]]"),
    "no subset": Refused(dataset="[[datasets]]\nresolution = 512\n", told="[[datasets]] 1: has no subsets"),
    "no folder": Refused(
        dataset="[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nnum_repeats = 2\n",
        told="[[datasets]] 1, subset 1: needs an image_dir",
    ),
    "an option's name for a key": Refused(
        dataset=folders("", "train_batch_size = 2"), told="[general]: 'train_batch_size' is batch_size here"
    ),
    "an option that is none of data sets": Refused(
        dataset=folders("", "max_token_length = 225"),
        told="[general]: 'max_token_length' is an option of the command line or of --config_file",
    ),
    "a number in quotes": Refused(
        dataset=folders("num_repeats = '10'"), told="num_repeats = '10': must be a whole number"
    ),
    "a switch in quotes": Refused(
        dataset=folders("flip_aug = 'false'"), told="flip_aug = 'false': must be true or false"
    ),
    "a number for a switch": Refused(dataset=folders("flip_aug = 1"), told="flip_aug = 1: must be true or false"),
    "a text for a table": Refused(
        dataset=folders("custom_attributes = 'x'"), told="custom_attributes = 'x': must be a table"
    ),
    "a resolution of three": Refused(
        dataset=folders("", "", "resolution = [1, 2, 3]"),
        told="resolution = [1, 2, 3]: must be one number or WIDTH,HEIGHT",
    ),
    "an unknown way to resize": Refused(
        dataset=folders("resize_interpolation = 'best'"),
        told="resize_interpolation = 'best': must be one of lanczos, ",
        passed_over=True,  # until the first picture is resized
    ),
    "folders and metadata in one data set": Refused(
        dataset=folders("[[datasets.subsets]]\nmetadata_file = 'DATA/meta.json'\nimage_dir = 'DATA/cats'"),
        told="[[datasets]] 1: some subsets have a metadata_file and some have none; make two data sets of them",
    ),
    "classes beside metadata": Refused(
        dataset=folders("metadata_file = 'DATA/meta.json'\nclass_tokens = 'cat'"),
        told="[[datasets]] 1, subset 1: class_tokens means nothing with a metadata_file; leave it out",
    ),
    "masks without masked_loss": Refused(
        dataset=folders("conditioning_data_dir = 'DATA/masks'"),
        told="conditioning_data_dir holds masks with --masked_loss; ControlNets are not trained here",
    ),
    "an adapter that is switched off": Refused(
        dataset="[[datasets]]\nnetwork_multiplier = 0.0\n  [[datasets.subsets]]\n  image_dir = 'DATA/train'\n",
        told="[[datasets]] 1: network_multiplier = 0.0: must be other than 0, with which nothing is learnt",
    ),
    "cached latents of changing pictures": Refused(
        arguments=(*TRAIN, "--cache_latents", "--color_aug"),
        told="--color_aug and --cache_latents do not go together: what is another picture each time cannot be cached",
    ),
    "latents on disk of changing pictures": Refused(
        dataset=folders("random_crop = true"),
        arguments=("--cache_latents_to_disk",),
        told="[[datasets]] 1, subset 1: random_crop and --cache_latents_to_disk do not go together",
    ),
    "cached texts of changing captions": Refused(
        dataset=folders("shuffle_caption = true\ncaption_tag_dropout_rate = 0.1"),
        arguments=("--cache_text_encoder_outputs", "--network_train_unet_only"),
        script="sdxl_train_network",
        told="shuffle_caption, caption_tag_dropout_rate and --cache_text_encoder_outputs do not go together",
    ),
    "cached texts with wildcards": Refused(
        dataset=folders("enable_wildcard = true"),
        arguments=("--cache_text_encoder_outputs_to_disk", "--network_train_unet_only"),
        script="sdxl_train_network",
        told="enable_wildcard and --cache_text_encoder_outputs do not go together",
        passed_over=True,
    ),
    "smaller than the smallest bucket": Refused(
        arguments=("--train_data_dir", "DATA/train", "--resolution", "128", "--enable_bucket"),
        told="--min_bucket_reso=256: must not be above --resolution=128,128",
    ),
    "larger than the largest bucket": Refused(
        dataset=folders("", "enable_bucket = true", "resolution = [512, 1600]"),
        told="[[datasets]] 1: max_bucket_reso=1024: must not be below resolution=512,1600",
    ),
    "steps that no model takes": Refused(
        arguments=(*TRAIN, "--enable_bucket", "--bucket_reso_steps", "8"),
        told="--bucket_reso_steps=8: must be a multiple of 32",
    ),
    "buckets of no size": Refused(
        arguments=(*TRAIN, "--enable_bucket", "--min_bucket_reso", "32"),
        told="--min_bucket_reso=32: must not be below --bucket_reso_steps=64",
    ),
    "a class of one's own": Refused(
        arguments=(*TRAIN, "--dataset_class", "a.B"), told="--dataset_class: Python classes", passed_over=True
    ),
    "a face between nothing": Refused(
        arguments=(*TRAIN, "--face_crop_aug_range", "3.0,1.0"),
        told="--face_crop_aug_range 3.0,1.0: must be two numbers above 0, the smaller one first",
    ),
    "captions that are dropped too often": Refused(
        arguments=(*TRAIN, "--caption_dropout_rate", "1.5"),
        told="--caption_dropout_rate=1.5: must be from 0 to 1",
        passed_over=True,
    ),
    "an empty separator": Refused(
        dataset=folders("caption_separator = ''"),
        told="caption_separator = '': must be a text that is not empty",
        passed_over=True,
    ),
    "regularisation alone": Refused(
        dataset=folders("is_reg = true"),
        told="[[datasets]] 1: nothing is left to train on",
    ),
    "a data set of another ending": Refused(dataset=folders(""), ending=".yaml", told="must be a .toml or .json file"),
    "data sets in the file of options": Refused(
        config="[[datasets]]\nresolution = 512\n",
        arguments=TRAIN,
        told="'datasets' belongs into a file of its own, which dataset_config names",
        passed_over=True,
    ),
    "a misspelt option in the file": Refused(
        config="shufle_caption = true\nkeep_token = 1\n",
        arguments=TRAIN,
        told="unknown keys 'shufle_caption' (did you mean 'shuffle_caption'?), "
        "'keep_token' (did you mean 'keep_tokens'?)",
        passed_over=True,
    ),
    "a switch in quotes in the file": Refused(
        config="flip_aug = 'false'\n", arguments=TRAIN, told="flip_aug = 'false': must be true or false"
    ),
    "an option given twice in the file": Refused(
        config="[a]\nseed = 1\n[b]\nseed = 2\n",
        arguments=TRAIN,
        told="seed is given twice, as 1 and as 2",
        passed_over=True,
    ),
    "another model of the GUI's": Refused(
        config="clip_g = 'x'\n", arguments=TRAIN, told="'clip_g' is for Stable Diffusion 3", passed_over=True
    ),
}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return make_data(tmp_path_factory.mktemp("data"))


def read(data: Path, folder: Path, *arguments: str, config: str = "", dataset: str = "") -> Run:
    return parse(written(Case(config, dataset, (*MODEL, *arguments)), data, folder))


@pytest.mark.parametrize("case", REFUSED.values(), ids=REFUSED)
def test_what_is_wrong_is_told_in_one_line(case, data, tmp_path):
    with pytest.raises(DeftError) as error:
        parse(written(replace(case, arguments=(*MODEL, *case.arguments)), data, tmp_path))
    assert case.told in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("case", [*CASES.values(), *NEW_CASES.values()], ids=[*CASES, *NEW_CASES])
def test_published_configurations_are_read(case, data, tmp_path):
    run = parse(written(case, data, tmp_path))
    assert all(dataset.subsets for dataset in run.data.datasets)
    for dataset in run.data.datasets:
        for subset in dataset.subsets:
            assert Path(subset.image_dir).is_dir()
            assert subset.caption_extension in (".txt", ".caption")


def test_a_key_is_taken_from_the_nearest_place(data, tmp_path):
    """The subset's own, its data set's, the general one, the command line's, the default."""
    places = {"subset": ("", "", "keep_tokens = 4"), "dataset": ("", "keep_tokens = 3", "")}
    places |= {"general": ("keep_tokens = 2", "", ""), "nothing": ("", "", "")}
    found = {}
    for chosen in (("subset", "dataset", "general"), ("dataset", "general"), ("general",), ("nothing",)):
        general, dataset, subset = ("\n".join(texts) for texts in zip(*(places[one] for one in chosen), strict=True))
        text = folders(subset, general, f"resolution = 512\n{dataset}")
        found[chosen[0]] = [
            read(data, tmp_path, *arguments, dataset=text).data.datasets[0].subsets[0].captions.keep_tokens
            for arguments in ((), ("--keep_tokens", "1"))
        ]
    assert found == {"subset": [4, 4], "dataset": [3, 3], "general": [2, 2], "nothing": [0, 1]}


def test_every_key_reaches_its_room_from_every_place(data, tmp_path):
    """A value that is not the default, at each place where it may stand."""
    values = {
        "resolution": [256, 320], "skip_image_resolution": [8, 9], "face_crop_aug_range": [1.5, 2.5],
        "custom_attributes": {"a": 1}, "resize_interpolation": "area", "network_multiplier": 0.5, "batch_size": 3,
        "min_bucket_reso": 128, "max_bucket_reso": 2048, "bucket_reso_steps": 32, "validation_split": 0.25,
        "token_warmup_step": 5, "caption_dropout_rate": 0.5, "caption_tag_dropout_rate": 0.5, "class_tokens": "cat",
        "caption_extension": ".cap", "condition_dropout_prob": 0.5,
    }  # fmt: skip
    not_in_rooms = {"cache_info", "train_inpainting", "image_dir", "metadata_file", "conditioning_data_dir", "is_reg",
                    "train_jsonl", "image_path"}  # fmt: skip
    for name in KEYS.keys() - not_in_rooms:
        value = values.get(name, True if KEYS[name].read.__name__ == "_switch" else 7)
        value = value if KEYS[name].read.__name__ != "_text" or name in values else ";"
        for place in KEYS[name].places:
            content = {"general": {"resolution": 512}, "datasets": [{"subsets": [{"image_dir": f"{data}/cats"}]}]}
            if name != "enable_bucket" and "bucket" in name:
                content["general"]["enable_bucket"] = True
            where = {GENERAL: content["general"], DATASET: content["datasets"][0],
                     SUBSET: content["datasets"][0]["subsets"][0]}[place]  # fmt: skip
            where[name] = value
            (tmp_path / "c.json").write_text(json.dumps(content))
            run = parse([*MODEL, "--dataset_config", str(tmp_path / "c.json")])
            (dataset,) = run.data.datasets
            (subset,) = dataset.subsets
            rooms = (subset.captions, subset.augment, subset, dataset.buckets, dataset)
            (room, *_) = [one for one in rooms if hasattr(one, name)]
            found = getattr(room, name)
            assert found == (tuple(value) if isinstance(value, list) else value), (name, place)


def test_folders_are_named_as_sd_scripts_names_them(tmp_path):
    for name in ("10_sks cat", "2_a_b", "1_", "0_none", "no repeats", "_3", "x_1", "3", "03_dog"):
        (tmp_path / name).mkdir()
    (tmp_path / "5_file").touch()
    found = [(Path(folder).name, repeats, name) for folder, repeats, name in named_folders(str(tmp_path))]
    assert found == [("03_dog", 3, "dog"), ("10_sks cat", 10, "sks cat"), ("1_", 1, ""), ("2_a_b", 2, "a_b")]
    assert named_folders(str(tmp_path / "nowhere")) == []


def test_regularisation_pictures_come_behind_the_others(data, tmp_path):
    (dataset,) = read(data, tmp_path, *TRAIN, "--reg_data_dir", "DATA/reg").data.datasets
    found = [(Path(one.image_dir).name, one.num_repeats, one.class_tokens, one.is_reg) for one in dataset.subsets]
    assert found == [
        ("3_sks cat", 3, "sks cat", False), ("3_sks dog", 3, "sks dog", False), ("2_cat", 2, "cat", True)
    ]  # fmt: skip


def test_a_folder_that_is_not_there_leaves_its_message_to_whoever_reads_it(data, tmp_path):
    (dataset,) = read(data, tmp_path, "--train_data_dir", "DATA/nowhere").data.datasets
    assert dataset.subsets == ()


@pytest.mark.parametrize(
    ("arguments", "dataset", "told"),
    [
        ((*TRAIN, "--max_bucket_reso", "2048"), "", "--max_bucket_reso has no effect without --enable_bucket"),
        ((*TRAIN, "--keep_tokens", "1"), "", "--keep_tokens has no effect without --shuffle_caption"),
        ((*TRAIN, "--token_warmup_min", "2"), "", "--token_warmup_min has no effect without --token_warmup_step"),
        ((*TRAIN, "--prior_loss_weight", "0.5"), "", "--prior_loss_weight: no effect without regularisation pictures"),
        ((*TRAIN, "--masked_loss"), "", "--masked_loss: no effect without masks"),
        ((*TRAIN, "--conditioning_data_dir", "x"), "", "--conditioning_data_dir: no effect without --masked_loss"),
        ((*TRAIN, "--dataset_repeats", "2"), "", "--dataset_repeats: no effect on folders"),
        (("--train_data_dir", "x", "--reg_data_dir", "y"), folders(""),
         "--train_data_dir, --reg_data_dir: no effect with --dataset_config"),
        ((*TRAIN, "--in_json", "DATA/meta.json", "--reg_data_dir", "y"), "",
         "--reg_data_dir: no effect with --in_json"),
        ((*TRAIN, "--enable_bucket", "--face_crop_aug_range", "1,2"), "",
         "--face_crop_aug_range has no effect with --enable_bucket"),
        ((*TRAIN, "--enable_bucket", "--max_bucket_reso", "1000"), "",
         "--max_bucket_reso=1000: 1024 is taken, a multiple of --bucket_reso_steps"),
        ((), folders("num_repeats = 0\n[[datasets.subsets]]\nimage_dir = 'DATA/dogs'"),
         "cats is left out: num_repeats is 0"),
        ((), folders("[[datasets.subsets]]\nimage_dir = 'DATA/cats'"), "cats is left out: the data set has it already"),
    ],
)  # fmt: skip
def test_what_does_nothing_is_told(arguments, dataset, told, data, tmp_path, caplog):
    read(data, tmp_path, *arguments, dataset=dataset)
    assert [record.message for record in caplog.records if told in record.message]


def test_a_line_that_holds_for_many_folders_is_told_once(data, tmp_path, caplog):
    read(data, tmp_path, *TRAIN, "--keep_tokens", "1")
    assert len(caplog.records) == 1


def test_masks_are_those_of_the_folder_or_the_pictures_own(data, tmp_path):
    masked = ("--masked_loss", "--conditioning_data_dir", "DATA/masks", "--alpha_mask", "--reg_data_dir", "DATA/reg")
    (dataset,) = read(data, tmp_path, *TRAIN, *masked).data.datasets
    found = [(bool(one.conditioning_data_dir), one.alpha_mask, one.is_reg) for one in dataset.subsets]
    assert found == [(True, False, False), (True, False, False), (False, True, True)]


def test_the_command_line_is_over_the_file(data, tmp_path):
    config = "resolution = 768\nseed = 1\nnetwork_module = 'networks.lora'\nflip_aug = true\nnetwork_args = ['a=7']\n"
    command_line = ("--seed", "2", "--network_module", "networks.deft", "--network_args")
    run = read(data, tmp_path, "--train_data_dir", "DATA/train", *command_line, config=config)
    assert run.process.seed == 2
    assert run.network.network_args == {}
    assert run.data.datasets[0].buckets.resolution == (768, 768)
    assert run.data.datasets[0].subsets[0].augment == AugmentOptions(flip_aug=True)


def test_the_file_of_the_gui(data, tmp_path, caplog):
    """Keys of its own, whole numbers as 10.0, switches as 1, and what asks for nothing."""
    config = (
        "epoch = 1\nnoise_offset_type = 'Original'\nnoise_offset = 0.05\nstop_text_encoder_training = 3\n"
        "dynamo_backend = 'no'\npersistent_data_loader_workers = 1\nmem_eff_save = true\nmax_bucket_reso = 1024.0\n"
        "network_args = []\nlr_scheduler_args = []\nresolution = '512,512'\ncaption_dropout_every_n_epochs = 0\n"
        "train_data_dir = 'DATA/train'\nclip_g = ''\nhighvram = true\nvae = ''\nflip_aug = 1\n"
    )
    run = read(data, tmp_path, config=config)
    assert run.objective.noise_offset == 0.05
    assert run.data.datasets[0].subsets[0].augment.flip_aug
    assert [record.message.split(": ")[1] for record in caplog.records] == [
        "stop_text_encoder_training = 3", "mem_eff_save = True"
    ]  # fmt: skip


def test_a_file_may_be_named_without_its_ending(data, tmp_path):
    (tmp_path / "run.v1.toml").write_text("seed = 5\n")
    assert read(data, tmp_path, *TRAIN, "--config_file", str(tmp_path / "run.v1")).process.seed == 5


@pytest.mark.parametrize("path", ["C:\\new\\train", "\\\\server\\photos"])
def test_backslashes_in_double_quotes_are_explained(data, tmp_path, path):
    with pytest.raises(DeftError, match="backslashes have to be doubled: write"):
        read(data, tmp_path, dataset=folders(f'metadata_file = "{path}"').replace("DATA", ""))
    single = read(data, tmp_path, dataset=folders("").replace("'DATA/cats'", f"'{path}'"))
    assert single.data.datasets[0].subsets[0].image_dir == path


def test_a_data_set_from_notepad_is_read(data, tmp_path):
    text = "\ufeff" + folders("class_tokens = 'кот'").replace("DATA", data.as_posix()).replace("\n", "\r\n")
    (tmp_path / "d.toml").write_bytes(text.encode())
    run = parse([*MODEL, "--dataset_config", str(tmp_path / "d.toml")])
    assert run.data.datasets[0].subsets[0].class_tokens == "кот"
    (tmp_path / "d.toml").write_bytes(text.encode("utf-16"))
    with pytest.raises(DeftError, match="not UTF-8 text"):
        parse([*MODEL, "--dataset_config", str(tmp_path / "d.toml")])


def test_preserving_needs_a_word_to_replace(data, tmp_path):
    given = ("--diff_output_preservation_class", "cat")
    with pytest.raises(DeftError, match="--diff_output_preservation_class needs --trigger_word"):
        read(data, tmp_path, *TRAIN, *given)
    run = read(data, tmp_path, *TRAIN, *given, "--trigger_word", "sks")
    assert (run.preservation.diff_output_preservation_class, run.preservation.trigger_word) == ("cat", "sks")


text = st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=12)
name = st.text(st.characters(exclude_categories=("Cs", "Cc")), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(prefix=text, rate=st.floats(0, 1), steps=st.integers(1, 10**6), words=st.lists(name, max_size=3))
@example(prefix='"', rate=0.0, steps=1, words=[])
def test_what_is_written_reads_back_the_same(data, tmp_path, prefix, rate, steps, words):
    arguments = [
        *MODEL, "--train_data_dir", "DATA/train", f"--caption_prefix={prefix}", f"--caption_dropout_rate={rate!r}",
        f"--max_train_steps={steps}", "--flip_aug", "--resolution", "640,512", "--face_crop_aug_range", "1.0,2.5",
        "--lr_warmup_steps", "0.1", "--text_encoder_lr", "1e-05", "0",
        "--network_args", *(f"keep=C:\\x{word}" for word in words[:1]),
    ]  # fmt: skip
    arguments = [word.replace("DATA", data.as_posix()) for word in arguments]
    file = tmp_path / "written.toml"
    file.unlink(missing_ok=True)
    with pytest.raises(SystemExit):
        parse([*arguments, "--output_config", "--config_file", str(file)])
    assert parse(["--config_file", str(file)]) == parse(arguments)


def damaged(content: bytes, seed: int) -> bytes:
    """Bytes flipped, left out, doubled, words exchanged, values of another type."""
    draw = random.Random(seed)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(content) + 1)
        way = draw.randrange(7)
        if way == 0:
            content = content[:at] + bytes([draw.randrange(256)]) + content[at + 1 :]
        elif way == 1:
            content = content[:at] + content[at + draw.randint(1, 30) :]
        elif way == 2:
            content = content[:at] + content[at : at + draw.randint(1, 40)] + content[at:]
        elif way == 3:
            words = re.findall(rb"\w+", content) or [b"x"]
            content = content.replace(draw.choice(words), draw.choice(words), 1)
        else:
            values = (b"1e999", b"-1", b"[]", b"[[[]]]", b"{}", b"{a=[{}]}", b"nan", b"null", b"true", b"''",
                      b'"\\u0000"', b"9" * draw.choice((5, 400, 5000)), b"1979-05-27", b"[1, 'a']", b"0x10",
                      b"[1e400, 2]", b"'a\tb'", b'{"a": {"b": 1}}')  # fmt: skip
            lines = re.split(rb"(?<=[=:])[^\n=:]*(?=\n|$)", content)
            chosen = draw.randrange(len(lines))
            old = re.findall(rb"(?<=[=:])[^\n=:]*(?=\n|$)", content)
            old = [draw.choice(values) if i == chosen else one for i, one in enumerate(old)]
            content = b"".join(one for pair in zip(lines, [*old, b""], strict=False) for one in pair)
    return content


VALUES = (True, 0, -1, 1, 3, 512, 10**400, 0.5, 1.0, -0.1, 1e308, "", " ", ",", "1", "0.1", "512,768", "a=1", "area",
          ".txt", [], [1], [512, 768], [1.0, 3.0], [[]], ["a=1"], {}, {"a": 1}, {"a": {"b": []}})  # fmt: skip


def rearranged(content: dict, draw: random.Random) -> dict:
    """Keys renamed, moved and left out, values of another kind."""
    tables = [content]
    for table in tables:  # grows as it goes
        inner = [value for one in table.values() for value in (one if isinstance(one, list) else [one])]
        tables += [value for value in inner if isinstance(value, dict)]
    for _ in range(draw.randint(1, 3)):
        table, other = draw.choice(tables), draw.choice(tables)
        key = draw.choice(list(table) or ["x"])
        value = table.pop(key, draw.choice(VALUES))
        way = draw.randrange(5)
        if way == 0:
            other[key] = value
        elif way == 1:
            table[draw.choice([*KEYS, *OPTION_NAMES, "datasets", "subsets", "general"])] = value
        elif way == 2:
            other[draw.choice([*KEYS, *OPTION_NAMES])] = draw.choice(VALUES)
        elif way == 3:
            table[key] = draw.choice(VALUES)
    return content


OPTION_NAMES = [option.name for option in OPTIONS]
SOURCES = [(case.config, "config_file", ".toml") for case in CASES.values() if case.config]
SOURCES += [(case.dataset, "dataset_config", case.ending) for case in CASES.values() if case.dataset]


def read_damaged(folder: Path, seed: int) -> bool:
    """Whether a damaged file is still read. Anything but DeftError goes through."""
    draw = random.Random(seed)
    source, option, ending = SOURCES[seed % len(SOURCES)]
    content = source.encode()
    if draw.random() < 0.5:
        content = damaged(content, seed)
    else:
        ending = ".json"  # which --config_file takes as well
        loaded = json.loads(source) if source.startswith("{") else toml.loads(source)
        content = json.dumps(rearranged(json.loads(json.dumps(loaded)), draw)).encode()
    file = folder / f"damaged{ending}"
    file.write_bytes(content)
    arguments = [*MODEL, f"--{option}", str(file)]
    try:
        parse(arguments if option == "dataset_config" else [*arguments, "--train_data_dir", "x"])
    except DeftError as error:
        if "\n" in str(error):
            raise RuntimeError(f"several lines: {error}") from None
        return False
    return True


def test_damaged_files_end_in_one_line(tmp_path):
    read_anyway = sum(read_damaged(tmp_path, seed) for seed in range(400))
    assert 0 < read_anyway < 400


@pytest.mark.parametrize(
    ("attributes", "told"),
    [
        ("{diff_output_preservaton = true}", "did you mean 'diff_output_preservation'?"),
        ("{diff_output_preservation = 'false'}", "diff_output_preservation = true or false"),
        ("3", "a table"),
    ],
)
def test_custom_attributes_that_would_be_misread_are_refused(tmp_path, attributes, told):
    (tmp_path / "a").mkdir()
    config = tmp_path / "sets.toml"
    config.write_text(
        f"[[datasets]]\n[[datasets.subsets]]\nimage_dir = '{tmp_path / 'a'}'\ncustom_attributes = {attributes}\n"
    )
    with pytest.raises(DeftError, match=re.escape(told)):
        read_dataset_config(str(config), False)
    config.write_text(config.read_text().replace(attributes, "{mine = 1, diff_output_preservation = true}"))
    read_dataset_config(str(config), False)
