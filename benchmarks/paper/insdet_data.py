"""InsDet's objects and scenes (arXiv 2310.19257) as subjects. Its authors detect them; here they are learnt and drawn.

The protocol is this project's: the paper's own results on InsDet could not be found, nor its pictures' captions.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks.paper.cuts import Cuts
from benchmarks.paper.plan import Asked, Row, Subject
from library.data.folders import listed, picture_files
from library.data.remarks import Remarks
from networks.deft_config import DeftError, nearest

PUBLISHED = "https://github.com/insdet/instance-detection (InsDet-FULL or InsDet-mini)"
TOKEN = "sks"
EVERY = 4  # of an object's views one is trained on, and the one in the middle to the next is compared with
MARGIN = 0.1  # around what is trained on; what is compared with has none
DRAWN = 2  # pictures of each prompt, but for a scene's own
TUNING_OBJECTS = slice(2, None, 25)  # of the names in order; none of them is among every fifth
TUNING_SCENE = "sink"
SCENE, CHANGE = "scene", "change"  # categories of what is asked of scenes

# ours: {} is the object, in places and on grounds that InsDet's pictures do not show
OBJECT_PROMPTS = (
    "a photo of {} on a sandy beach",
    "a photo of {} in deep snow",
    "a photo of {} on a stone bridge",
    "a photo of {} in a vegetable garden",
    "a photo of {} on a red velvet cushion",
    "a photo of {} on the seat of a train",
    "a photo of {} in front of a lighthouse",
    "a photo of {} next to a bowl of oranges",
    "a photo of {} under a neon sign at night",
    "a photo of {} floating in a swimming pool",
)  # fmt: skip
# ours: one thing about the scene is another
SCENE_PROMPTS = (
    "a photo of {} at night",
    "a photo of {} in the light of a sunset",
    "a photo of {} with a red chair",
    "a photo of {} with a cat on the floor",
    "a photo of {} with blue walls",
    "a photo of {} full of house plants",
    "a photo of {} decorated with balloons",
    "a photo of {} under water",
    "a watercolour painting of {}",
    "a pencil drawing of {}",
)  # fmt: skip


@dataclass(frozen=True)
class Protocol:
    """What of InsDet is made into subjects.

    :param objects: "all", how many, or names, with spaces between
    :param reference: the first view that is trained on is given to the model as well; OmniGen alone reads it
    """

    objects: str = "20"
    reference: bool = False


def objects(data: Path, cuts: Cuts, protocol: Protocol) -> list[Subject]:
    """Objects, of which some views are trained on and others are compared with.

    :raises DeftError: when there are none, an object is not there, or has too few views
    """
    folders = [folder for folder in listed(_inside(data, "Objects")) if folder.is_dir()]
    chosen = _chosen(folders, protocol.objects)
    tuning = [folder for folder in folders[TUNING_OBJECTS] if not _named(protocol.objects) or folder not in chosen]
    remarks = Remarks()
    found = [
        _object(folder, cuts, protocol.reference, folder in tuning, remarks)
        for folder in folders
        if folder in chosen or folder in tuning
    ]
    if not found:
        raise DeftError(f"{data}: Objects holds no folders of objects; it is published at {PUBLISHED}")
    if cuts.missing():  # what is made is not told again
        remarks.tell()
    return found


def scenes(data: Path, cuts: Cuts, protocol: Protocol) -> list[Subject]:
    """Scenes: of the frames in the order of their names the even ones are trained on, the odd ones compared with.

    :raises DeftError: when there are none
    """
    found, remarks = [], Remarks()
    for level in (path for path in listed(_inside(data, "Scenes")) if path.is_dir()):
        for folder in (path for path in listed(level) if path.is_dir()):
            frames = picture_files(folder)
            if len(frames) > 1:
                found.append(_scene(level.name, folder, frames, cuts, protocol.reference))
            else:
                remarks.add("{n} scene{s} ({one}) with fewer than two frames left out", folder)
    if not found:
        raise DeftError(f"{data}: Scenes holds no frames in easy/SCENE or hard/SCENE; it is published at {PUBLISHED}")
    if cuts.missing():
        remarks.tell()
    return found


WHAT: dict[str, Callable[[Path, Cuts, Protocol], list[Subject]]] = {"objects": objects, "scenes": scenes}


def words_of(folder: str) -> str:
    """What a folder's name says: `000_aveda_shampoo` and `leisure_zone_001` without their numbers."""
    return re.sub(r"^\d+_|_\d+$", "", folder).replace("_", " ").strip() or folder


def _object(folder: Path, cuts: Cuts, reference: bool, tuning: bool, remarks: Remarks) -> Subject:
    views = picture_files(_inside(folder, "images"))
    trained, held = views[::EVERY], views[EVERY // 2 :: EVERY]
    if not held:
        raise DeftError(f"{folder}: {len(views)} views; at least {EVERY // 2 + 1} are needed")
    masks = _masks(folder)
    for view in (*trained, *held):
        if view.stem not in masks:
            remarks.add("{n} view{s} ({one}) without a mask: cut in the middle", view)
    rows = [cuts.add(folder.name, view, masks.get(view.stem), MARGIN) for view in trained]
    real = [cuts.add(folder.name, view, masks.get(view.stem)) for view in held]
    words = words_of(folder.name)
    inputs = (rows[0],) if reference else ()
    asked = [_asked(i, prompt, words, inputs) for i, prompt in enumerate(OBJECT_PROMPTS)]
    return Subject(folder.name, _rows(rows, words), tuple(asked), tuple(real), tuning=tuning)


def _scene(level: str, folder: Path, frames: Sequence[Path], cuts: Cuts, reference: bool) -> Subject:
    name = f"{level}_{folder.name}"
    squares = [cuts.add(name, frame) for frame in frames]
    trained, held = squares[::2], squares[1::2]
    words = words_of(folder.name)
    inputs = (trained[0],) if reference else ()
    same = _asked(0, "a photo of {}", words, inputs, SCENE, len(held))
    changes = [_asked(i, prompt, words, inputs, CHANGE) for i, prompt in enumerate(SCENE_PROMPTS, start=1)]
    tuning = folder.name == TUNING_SCENE
    return Subject(name, _rows(trained, words), (same, *changes), tuple(held), group=level, tuning=tuning)


def _rows(pictures: Sequence[Path], words: str) -> tuple[Row, ...]:
    return tuple(Row(picture, f"a photo of {TOKEN} {words}") for picture in pictures)


def _asked(
    index: int, prompt: str, words: str, inputs: tuple[Path, ...], category: str = "", number: int = DRAWN
) -> Asked:
    shown = f"{TOKEN} {words} <img><|image_1|></img>" if inputs else f"{TOKEN} {words}"
    return Asked(index, prompt.format(shown), prompt.format(words), number, category, inputs)


def _masks(folder: Path) -> dict[str, Path]:
    """By the stem of their pictures; there may be none."""
    beside = [path for path in listed(folder) if path.name.lower() == "masks" and path.is_dir()]
    return {mask.stem: mask for mask in picture_files(beside[0])} if beside else {}


def _inside(folder: Path, name: str) -> Path:
    """A folder in another one, in whatever case.

    :raises DeftError: when it is not there
    """
    if not folder.is_dir():
        raise DeftError(f"--data: no such folder: {folder}; InsDet is published at {PUBLISHED}")
    for path in listed(folder):
        if path.name.lower() == name.lower() and path.is_dir():
            return path
    raise DeftError(f"{folder}: no folder {name}; InsDet is published at {PUBLISHED}")


def _named(wanted: str) -> bool:
    return wanted != "all" and not wanted.isdecimal()


def _chosen(folders: Sequence[Path], wanted: str) -> Sequence[Path]:
    """:raises DeftError: for an object that is not there"""
    if wanted == "all":
        return folders
    if wanted.isdecimal() and int(wanted) > 0:
        return folders[:: max(1, len(folders) // int(wanted))][: int(wanted)]
    known = {folder.name: folder for folder in folders}
    for name in wanted.split() or [wanted]:
        if name not in known:
            raise DeftError(f"--objects {name}: no such object in the data{nearest(name, known)}; or a number, or all")
    return [known[name] for name in wanted.split()]
