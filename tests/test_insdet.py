"""InsDet as subjects: what is trained on, what is held out, and how pictures are cut."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import insdet
from benchmarks.paper import insdet_data
from benchmarks.paper.cuts import Cut, Cuts, around, square_of, within
from benchmarks.paper.insdet_data import Protocol
from library.data.resizing import resize
from networks.deft_config import DeftError
from tests import small_insdet, small_judges

SIZE = 16


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return small_insdet.make(tmp_path / "InsDet-mini")


@pytest.fixture(scope="module")
def judges(tmp_path_factory) -> dict[str, Path]:
    return small_judges.build(tmp_path_factory.mktemp("judges"))


@pytest.fixture
def cuts(tmp_path: Path) -> Cuts:
    return Cuts(tmp_path / "cuts", SIZE)


def stems(paths) -> list[str]:
    return [path.stem.split("_0x")[0].rsplit("_", 1)[0] for path in paths]


def test_views_are_trained_on_or_held_out(data: Path, cuts: Cuts):
    first, second = insdet_data.objects(data, cuts, Protocol())
    assert first.name == "000_aveda_shampoo"
    assert [row.caption for row in second.rows] == ["a photo of sks binder clips median"] * 2
    assert stems(row.picture for row in first.rows) == ["001", "005"]
    assert stems(first.references) == ["003"]
    assert len({asked.prompt for asked in first.asked}) == len(first.asked) == 10
    assert all(asked.number == 2 and not asked.inputs for asked in first.asked)
    assert [asked.index for asked in first.asked] == list(range(10))
    assert all("sks aveda shampoo" in asked.prompt and "sks" not in asked.text for asked in first.asked)


def test_of_24_views_six_are_trained_on_and_six_others_held_out(data: Path, cuts: Cuts):
    images = data / "Objects" / "000_aveda_shampoo" / "images"
    for view in range(7, 25):
        small_insdet.picture(view).save(images / f"{view:03}.jpg")
    first, _ = insdet_data.objects(data, cuts, Protocol())
    assert stems(row.picture for row in first.rows) == ["001", "005", "009", "013", "017", "021"]
    assert stems(first.references) == ["003", "007", "011", "015", "019", "023"]


def test_frames_are_even_or_odd(data: Path, cuts: Cuts):
    (scene,) = insdet_data.scenes(data, cuts, Protocol())
    assert (scene.name, scene.group, scene.tuning) == ("easy_leisure_zone_001", "easy", False)
    assert stems(row.picture for row in scene.rows) == ["rgb_000", "rgb_002"]
    assert stems(scene.references) == ["rgb_001", "rgb_003"]
    same, *changes = scene.asked
    assert same.prompt == scene.rows[0].caption == "a photo of sks leisure zone"
    assert (same.number, same.category) == (len(scene.references), insdet_data.SCENE)
    assert [asked.number for asked in changes] == [2] * 10
    assert {asked.category for asked in changes} == {insdet_data.CHANGE}


@pytest.mark.parametrize("what", insdet_data.WHAT)
def test_a_reference_is_a_picture_that_was_trained_on(data: Path, cuts: Cuts, what: str):
    for subject in insdet_data.WHAT[what](data, cuts, Protocol(reference=True)):
        for asked in subject.asked:
            assert asked.inputs == (subject.rows[0].picture,)
            assert "<img><|image_1|></img>" in asked.prompt
            assert "<img>" not in asked.text
        assert all(not row.inputs for row in subject.rows)


def test_all_pictures_are_made_once(data: Path, cuts: Cuts):
    subjects = [*insdet_data.objects(data, cuts, Protocol()), *insdet_data.scenes(data, cuts, Protocol())]
    wanted = [p for s in subjects for p in (*(row.picture for row in s.rows), *s.references)]
    assert cuts.missing() == len(wanted) == len(set(wanted)) == 2 * 3 + 4
    cuts.make()
    made = {path: path.stat().st_mtime_ns for path in wanted}
    for path in wanted:
        with Image.open(path) as image:
            assert (image.size, image.mode) == ((SIZE, SIZE), "RGB")
    cuts.make()
    assert made == {path: path.stat().st_mtime_ns for path in wanted}
    assert {p for p in cuts.folder.rglob("*") if p.is_file()} == set(wanted)


def test_what_is_trained_on_has_a_margin_and_what_is_compared_with_none(data: Path, cuts: Cuts):
    whole = (4, 0, 44, 40)  # the middle
    first, second = insdet_data.objects(data, cuts, Protocol())
    cuts.make()
    images = data / "Objects"
    for made, view, box in [
        (second.rows[0].picture, "001_binder_clips_median/images/001.jpg", (8, 4, 32, 28)),
        (second.references[0], "001_binder_clips_median/images/003.jpg", (10, 6, 30, 26)),
        (first.references[0], "000_aveda_shampoo/images/003.jpg", whole),  # its mask is missing
    ]:
        with Image.open(images / view) as image, Image.open(made) as found:
            wanted = resize(np.asarray(image.crop(box)), (SIZE, SIZE))
            assert np.array_equal(np.asarray(found), wanted)


def test_a_changed_picture_is_cut_anew(data: Path, cuts: Cuts):
    before = insdet_data.objects(data, cuts, Protocol())[0].rows[0].picture
    mask = data / "Objects" / "000_aveda_shampoo" / "masks" / "001.png"
    Image.new("L", (24, 20), 255).save(mask)
    assert insdet_data.objects(data, cuts, Protocol())[0].rows[0].picture != before


def test_the_object_is_cut_out_where_its_mask_shows_it(tmp_path: Path):
    view = np.zeros((40, 48, 3), np.uint8)
    left, top, right, bottom = small_insdet.BOX
    view[top:bottom, left:right] = 255
    Image.fromarray(view).save(tmp_path / "view.png")
    small_insdet.mask().save(tmp_path / "mask.png")
    cut = square_of(Cut(tmp_path / "view.png", tmp_path / "mask.png", 0.0), 20)
    pixels = np.asarray(cut)[..., 0]
    rows, columns = (np.flatnonzero(pixels.max(axis)) for axis in (1, 0))
    assert (columns[0], columns[-1] + 1) == (0, 20)  # 20 pixels wide, and 16 high in the middle
    assert (rows[0], rows[-1] + 1) == (2, 18)


def test_a_mask_of_another_size_is_scaled(tmp_path: Path):
    assert within((5, 4, 15, 12), (24, 20), (48, 40), tmp_path) == (10, 8, 30, 24)
    with pytest.raises(DeftError, match="do not fit"):
        within((5, 4, 15, 12), (20, 24), (48, 40), tmp_path)


@pytest.mark.parametrize(
    ("box", "margin", "square"),
    [
        ((10, 8, 30, 24), 0.0, (10, 6, 30, 26)),
        ((10, 8, 30, 24), 0.1, (8, 4, 32, 28)),
        ((0, 0, 10, 10), 0.5, (0, 0, 20, 20)),  # moved into the picture
        ((44, 36, 48, 40), 1.0, (36, 28, 48, 40)),
        ((0, 10, 48, 20), 0.1, (4, 0, 44, 40)),  # no larger than the shorter side
    ],
)
def test_squares(box, margin, square):
    assert around(box, (48, 40), margin) == square


def test_an_empty_mask_and_none_take_the_middle(tmp_path: Path):
    small_insdet.picture(1).save(tmp_path / "view.png")
    Image.new("L", small_insdet.VIEW).save(tmp_path / "mask.png")
    without = square_of(Cut(tmp_path / "view.png", None, 0.0), 40)
    assert square_of(Cut(tmp_path / "view.png", tmp_path / "mask.png", 0.0), 40).tobytes() == without.tobytes()
    assert without.tobytes() == small_insdet.picture(1).crop((4, 0, 44, 40)).tobytes()


def test_what_is_not_there_is_told_once(data: Path, cuts: Cuts, caplog):
    single = data / "Scenes" / "hard" / "office_001"
    single.mkdir(parents=True)
    small_insdet.picture(1).save(single / "rgb_000.jpg")
    for times in (1, 0):
        for what in insdet_data.WHAT.values():
            what(data, cuts, Protocol())
        told = [record.message for record in caplog.records]
        assert sum("1 view (" in line and "003.jpg) without a mask" in line for line in told) == times
        assert sum("1 scene (" in line and "office_001) with fewer" in line for line in told) == times
        cuts.make()
        caplog.clear()


def test_which_objects(tmp_path: Path, cuts: Cuts):
    root = tmp_path / "data"
    for number in range(100):
        images = root / "objects" / f"{number:03}_thing" / "Images"
        images.mkdir(parents=True)
        for view in range(3):
            (images / f"{view}.jpg").touch()
    found = insdet_data.objects(root, cuts, Protocol())
    counted = [s.name for s in found if not s.tuning]
    assert counted == [f"{number:03}_thing" for number in range(0, 100, 5)]
    assert [s.name for s in found if s.tuning] == [f"{n:03}_thing" for n in (2, 27, 52, 77)]
    everything = insdet_data.objects(root, cuts, Protocol(objects="all"))
    assert (len(everything), sum(s.tuning for s in everything)) == (100, 4)
    named = insdet_data.objects(root, cuts, Protocol(objects="002_thing 050_thing"))
    assert [s.name for s in named if not s.tuning] == ["002_thing", "050_thing"]


def test_mistakes_are_one_line(data: Path, cuts: Cuts, tmp_path: Path):
    def subjects(what=insdet_data.objects, folder: Path = data, **protocol):
        what(folder, cuts, Protocol(**protocol))
        cuts.make()

    def refused(match: str, *given, **protocol):
        with pytest.raises(DeftError, match=match) as error:
            subjects(*given, **protocol)
        assert "\n" not in str(error.value)

    refused("did you mean '000_aveda_shampoo'", objects="000_aveda_shampo")
    refused("--objects 0:", objects="0")
    refused("no such folder: .*published at", insdet_data.objects, tmp_path / "none")
    refused("no folder Scenes", insdet_data.scenes, tmp_path / "InsDet-mini" / "Objects")
    (tmp_path / "empty" / "objects").mkdir(parents=True)
    (tmp_path / "empty" / "scenes").mkdir()
    refused("Objects holds no folders", insdet_data.objects, tmp_path / "empty", objects="all")
    refused("Scenes holds no frames", insdet_data.scenes, tmp_path / "empty")
    images = data / "Objects" / "000_aveda_shampoo" / "images"
    (images / "001.jpg").write_bytes((images / "001.jpg").read_bytes()[:300])
    refused("001.jpg: cannot be read as a picture")
    for view in sorted(images.iterdir())[2:]:
        view.unlink()
    refused("2 views; at least 3 are needed")


def test_scenes_from_data_to_report(data: Path, model_folder: Path, judges: dict[str, Path], tmp_path: Path, capsys):
    out = tmp_path / "out"
    options = ["--what", "scenes", "--data", data, "--model", model_folder, "--output", out, "--device", "cpu",
               "--clip", judges["clip"], "--dino", judges["dino"], "--dinov2", judges["dinov2"],
               "--adapters", "lora", "--rank", "2", "--rates", "1e-3", "--steps", "1", "--size", "64",
               "--drawing_steps", "1", "--limit_prompts", "1"]  # fmt: skip
    assert insdet.main([*map(str, options), "--dry_run"]) == 0
    assert not (out / "cuts").exists()
    assert insdet.main(list(map(str, options))) == 0
    records, scores = (
        [json.loads(line) for line in (out / name).read_text(encoding="utf-8").splitlines()]
        for name in ("records.jsonl", "scores.jsonl")
    )
    methods = ("base", "lora|2|0.001|1")
    for method in methods:  # the scene as often as it has odd frames, and a change twice
        assert sum(record["method"] == method for record in records) == 2 + 2
    drawn = [score for score in scores if score.get("picture", "").startswith("pictures/")]
    assert len(drawn) == 2 * (2 + 2)
    assert all({"clip_i", "dino", "dinov2", "clip_t"} <= score.keys() for score in drawn)
    sets = {score["method"]: (score["drawn"], score["real"]) for score in scores if "fd_dinov2" in score}
    assert sets == dict.fromkeys(methods, (2, 2))  # without the changes
    report = (out / "report.md").read_text(encoding="utf-8")
    assert "CLIP-T, change" in report
    assert "lora" in report
    options[1] = "objects"
    assert insdet.main([*map(str, options), "--objects", "all"]) == 2
    assert "another benchmark, InsDet scenes and not InsDet objects; give another --output" in capsys.readouterr().err
