"""What would be trained on, for a person to look at: one HTML page that needs nothing else, and a contact sheet."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from library.data.advice import ENLARGED, Advice, enlargement
from library.data.batches import Loader, Turn
from library.data.building import WORKERS
from library.data.examples import Decoded, decoded, decoded_input, drawn
from library.data.pixels import Colour
from library.data.plan import Dataset, InputPicture, Picture, Plan, by_subset
from library.data.resizing import Crop
from library.models.outline import Encoder
from library.pages import data_url, jpeg, style, text
from networks import deft_io
from networks.deft_progress import Bar

SHOWN = 240  # pictures at most: a page of about 5 MB
SIDE, SMALL = 256, 128  # pixels of a picture on the page, and of its mirrored one
EPOCHS = 3
CAPTIONS = 4  # of one picture in an epoch
BARS = 40  # buckets of a data set
NAMES = 20  # files of one kind
LETTERS, REST = 1500, 200  # of a caption, and of what is cut
CELL, COLUMNS = 128, 10  # of the contact sheet
TEMPLATE = Path(__file__).parent / "page.html"

Size = tuple[int, int]


@dataclass(frozen=True)
class Appearance:
    """Of a picture in an epoch."""

    caption: str
    mirrored: bool


@dataclass(frozen=True)
class Card:
    """A picture on the page.

    :param image: as cropped, at most SIDE a side, with what its mask leaves out in grey; None where it cannot be read
    :param epochs: its different appearances in each
    :param inputs: the pictures that its caption speaks of, at most SMALL a side, as `image`
    """

    picture: Picture
    image: Image.Image | None
    epochs: tuple[tuple[Appearance, ...], ...]
    inputs: tuple[Image.Image | None, ...] = ()


@dataclass(frozen=True)
class Preview:
    """All that the page says.

    :param name: of the adapter
    :param model: its file or folder
    :param loaders: of what is trained on, one a process; they know the steps
    :param kept: what is kept apart to validate on, in order
    :param epochs: of the training
    :param seeded: whether --seed is given, so that the training draws the same
    :param encoders: that read the captions
    :param advice: what a friend would say
    :param remarks: a line of what is left out or odd -> the files
    :param duplicates: files of the same content
    :param background: behind transparent pictures
    :param takes_pictures: whether the model reads input pictures
    """

    name: str
    model: str
    loaders: Sequence[Loader]
    kept: Loader | None
    epochs: int
    seeded: bool
    encoders: Sequence[Encoder]
    advice: Sequence[Advice]
    remarks: dict[str, Sequence[Path]]
    duplicates: Sequence[Sequence[Path]]
    background: Colour
    takes_pictures: bool = False


def write(preview: Preview, folder: Path) -> list[Path]:
    """`NAME-dataset.html` and `NAME-dataset.jpg`, each whole or not at all.

    :raises DeftError: when they cannot be written
    """
    asked = preview.background, preview.takes_pictures
    trained = cards(preview.loaders, min(EPOCHS, preview.epochs), *asked)
    kept = [] if preview.kept is None else cards([preview.kept], 1, *asked, SHOWN // 10)
    contents = {
        folder / f"{preview.name}-dataset.html": page(preview, trained, kept).encode("utf-8", "replace"),
        folder / f"{preview.name}-dataset.jpg": jpeg(sheet(trained), 85),
    }
    for file, content in contents.items():
        deft_io.write_whole(file, content)
    return list(contents)


# --- what is shown ---------------------------------------------------------------------------------------------------


def chosen(plan: Plan, most: int) -> list[tuple[int, int]]:
    """(data set, picture) of so many at most, as many of each bucket as there is room for; in the plan's order of data
    sets, buckets and pictures."""
    ranks: Counter[tuple[int, Size]] = Counter()
    found = []
    for number, dataset in enumerate(plan):
        for place, picture in enumerate(dataset.pictures):
            bucket = number, picture.fit.bucket
            found.append((ranks[bucket], bucket, place))
            ranks[bucket] += 1
    return [(bucket[0], place) for _, bucket, place in sorted(sorted(found)[:most], key=lambda one: one[1:])]


def cards(
    loaders: Sequence[Loader], epochs: int, background: Colour, takes_pictures: bool = False, most: int = SHOWN
) -> list[Card]:
    """Of the pictures that are shown, drawn as the training draws them.

    :param loaders: of every process
    :param takes_pictures: whether the model reads input pictures
    """
    plan, seed = loaders[0].plan, loaders[0].seed
    shown = chosen(plan, most)
    turns: dict[tuple[int, int], list[list[Turn]]] = {one: [[] for _ in range(epochs)] for one in shown}
    for epoch in range(1, epochs + 1):
        for loader in loaders:
            for turn in (turn for batch in loader.turns(epoch) for turn in batch):
                if (turn.dataset, turn.picture) in turns:
                    turns[turn.dataset, turn.picture][epoch - 1].append(turn)

    def card(one: tuple[int, int]) -> Card:
        picture = plan[one[0]].pictures[one[1]]
        found = tuple(tuple(_different(picture, of_epoch, seed, takes_pictures)) for of_epoch in turns[one])
        first = min((turn for of_epoch in turns[one] for turn in of_epoch), key=lambda turn: (turn.epoch, turn.place))
        inputs = tuple(_of_input(one, background) for one in picture.inputs)
        return Card(picture, _thumbnail(picture, first, seed, background), found, inputs)

    with ThreadPoolExecutor(WORKERS) as pool, Bar(len(shown), "drawing pictures", "pictures") as bar:
        made = []
        for one in pool.map(card, shown):
            made.append(one)
            bar.add(1)
    return made


def _different(picture: Picture, turns: Iterable[Turn], seed: int, takes_pictures: bool) -> list[Appearance]:
    found = (drawn(picture, turn, seed, takes_pictures) for turn in sorted(turns, key=lambda turn: turn.place))
    return list(dict.fromkeys(Appearance(one.caption, one.mirrored) for one in found))


def _thumbnail(picture: Picture, turn: Turn, seed: int, background: Colour) -> Image.Image | None:
    """As cropped and coloured in its first turn, not mirrored."""
    one = drawn(picture, turn, seed)
    try:
        found = decoded(picture, one.crop, False, background, one.colours)
    except Exception:  # whatever Pillow raises; the remarks say it
        return None
    image = _small(found, SIDE)
    return image if found.mask is None else masked(image, Image.fromarray(found.mask).resize(image.size))


def _of_input(picture: InputPicture, background: Colour) -> Image.Image | None:
    try:
        return _small(decoded_input(picture, background), SMALL)
    except Exception:  # as `_thumbnail`
        return None


def _small(found: Decoded, side: int) -> Image.Image:
    image = Image.fromarray(found.pixels.add(1).mul(127.5).round().byte().permute(1, 2, 0).numpy())
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    return image


def masked(image: Image.Image, mask: Image.Image) -> Image.Image:
    """With what is not trained on in dim grey, striped.

    :param mask: of the image's size, 255 where it is trained on
    """
    rows, columns = np.indices(image.size[::-1])
    stripes = ((rows + columns) % 12 < 3)[..., None] * np.array([70, 0, 30], np.float32)
    left_out = np.asarray(image.convert("L"))[..., None] * np.float32(0.4) + 30 + stripes
    return Image.composite(image, Image.fromarray(left_out.clip(0, 255).astype(np.uint8)), mask)


# --- the contact sheet -----------------------------------------------------------------------------------------------


def sheet(shown: Sequence[Card]) -> Image.Image:
    """All shown pictures, bucket after bucket, each with its size below."""
    images = [(card.picture.fit.bucket, card.image) for card in shown if card.image is not None]
    gap, line = 8, 16
    columns, rows = max(1, min(COLUMNS, len(images))), max(1, math.ceil(len(images) / COLUMNS))
    total = Image.new("RGB", (gap + columns * (CELL + gap), gap + rows * (CELL + line + gap)), (248, 248, 247))
    draw, font = ImageDraw.Draw(total), ImageFont.load_default()
    for number, (size, image) in enumerate(images):
        row, column = divmod(number, COLUMNS)
        left, top = gap + column * (CELL + gap), gap + row * (CELL + line + gap)
        small = image.copy()
        small.thumbnail((CELL, CELL), Image.Resampling.LANCZOS)
        total.paste(small, (left + (CELL - small.width) // 2, top + CELL - small.height))
        draw.text((left + CELL // 2, top + CELL + 2), f"{size[0]} x {size[1]}", (96, 96, 100), font, "mt")
    return total


# --- the page --------------------------------------------------------------------------------------------------------


def page(preview: Preview, trained: Sequence[Card], kept: Sequence[Card]) -> str:
    """The whole page."""
    name = text(preview.name)
    parts = [
        f"<header><h1>What <em>{name}</em> would be trained on</h1>",
        f"<p>{_lead(preview)}</p></header>",
        *_advice(preview.advice),
        *_summary(preview),
        *_left_out(preview),
        *_buckets(preview),
        *_pictures(preview, trained),
        *_kept(preview, kept),
    ]
    return (
        TEMPLATE.read_text(encoding="utf-8")
        .replace("/*style*/", style())
        .replace("<!--title-->", f"{name}: what would be trained on")
        .replace("<!--page-->", "\n".join(parts))
    )


def _name(path: Path) -> str:
    """A file's, whatever its direction of writing."""
    return f'<bdi class="file" title="{text(path)}">{text(path.name)}</bdi>'


def _lead(preview: Preview) -> str:
    loader = preview.loaders[0]
    number = sum(len(dataset.pictures) for dataset in loader.plan)
    drawn_again = "" if preview.seeded else (
        " Without <code>--seed</code>, every training draws another order, other captions and crops: these are an "
        "example."
    )  # fmt: skip
    return (
        f"{_count(number, 'picture')}, {_count(loader.steps, 'step')}, {_count(preview.epochs, 'epoch')} on "
        f'<bdi class="file">{text(preview.model)}</bdi>. Nothing has been trained.{drawn_again}'
    )


def _advice(found: Sequence[Advice]) -> Iterator[str]:
    if not found:
        return
    yield '<section><h2>Before you train</h2><ul class="advice">'
    for one in found:
        yield f"<li{' class=grave' * one.grave}><strong>{text(one.line[0].upper() + one.line[1:])}.</strong> "
        yield f"{text(one.reason[0].upper() + one.reason[1:])}.</li>"
    yield "</ul></section>"


def _summary(preview: Preview) -> Iterator[str]:
    loader, processes = preview.loaders[0], len(preview.loaders)
    plan, accumulated = loader.plan, loader.accumulated
    sizes = sorted({dataset.options.batch_size for dataset in plan})
    effective = " or ".join(f"{size * accumulated * processes:,}" for size in sizes)
    factors = [(" or ".join(map(str, sizes)), "a batch"), (accumulated, "batches a step"), (processes, "processes")]
    told = " × ".join(f"{number} {what}" for number, what in factors if what == "a batch" or number != 1)
    pictures = sum(len(dataset.pictures) for dataset in plan)
    views = loader.steps / loader.steps_an_epoch * loader.pictures / pictures
    facts = [
        ("pictures", f"{pictures:,}", ""),
        ("with repeats", f"{loader.pictures:,}", "an epoch"),
        ("batches", f"{loader.total:,}", "an epoch"),
        ("effective batch", effective, told if len(told) > 9 else "pictures a step"),
        ("steps", f"{loader.steps:,}", f"{loader.steps_an_epoch:,} an epoch"),
        ("epochs", f"{preview.epochs:,}", f"each picture about {views:,.0f} times"),
    ]
    yield '<section><h2>Summary</h2><dl class="facts">'
    for name, value, more in facts:
        yield f"<div><dt>{name}</dt><dd>{value}<small>{more}</small></dd></div>"
    yield "</dl>"
    yield '<div class="wide"><table><thead><tr><th>data set</th><th>resolution</th><th>batch</th><th>subset</th>'
    yield '<th class="n">pictures</th><th class="n">× repeats</th><th class="n">of an epoch</th><th>with</th></tr>'
    yield "</thead><tbody>"
    for number, dataset in enumerate(plan, 1):
        for i, (subset, group) in enumerate(by_subset(dataset.pictures)):
            width, height = dataset.options.buckets.resolution
            own = sum(picture.repeats for picture in group)
            of_set = (number, f"{width} × {height}", dataset.options.batch_size) if i == 0 else ("", "", "")
            yield "<tr>" + "".join(f"<td>{value}</td>" for value in of_set)
            yield f'<td><bdi class="file" title="{text(subset.place)}">{text(subset.name)}</bdi></td>'
            yield f'<td class="n">{len(group):,}</td><td class="n">{_repeats(group)}</td>'
            yield f'<td class="n">{own:,} · {own / loader.pictures:.0%}</td>'
            yield f"<td>{', '.join(_options(dataset, max(group, key=lambda one: len(one.inputs))))}</td></tr>"
    yield "</tbody></table></div></section>"


def _repeats(group: Sequence[Picture]) -> str:
    """Balanced regularisation pictures have different ones."""
    least, most = min(one.repeats for one in group), max(one.repeats for one in group)
    return f"{least}" if least == most else f"{least} to {most}"


def _options(dataset: Dataset, picture: Picture) -> Iterator[str]:
    """What is done with a subset's pictures and captions."""
    subset, captions = picture.subset, picture.subset.captions
    switches = {
        "regularisation": subset.is_reg,
        "buckets": dataset.options.buckets.enable_bucket,
        "mirrored by half": subset.augment.flip_aug,
        "colours changed": subset.augment.color_aug,
        "cropped at random": subset.augment.random_crop,
        "masks": picture.mask is not None or subset.alpha_mask,
        "tags shuffled": captions.shuffle_caption,
        f"first {captions.keep_tokens} tags stay": captions.keep_tokens > 0,
        "wildcards": captions.enable_wildcard,
        "input pictures": bool(picture.inputs),
        f"{captions.caption_dropout_rate:.0%} of captions dropped": captions.caption_dropout_rate > 0,
        f"{captions.caption_tag_dropout_rate:.0%} of tags dropped": captions.caption_tag_dropout_rate > 0,
        f"{subset.validation_split:.0%} kept apart": subset.validation_split > 0 and not subset.is_reg,
    }
    return (name for name, is_so in switches.items() if is_so)


def _left_out(preview: Preview) -> Iterator[str]:
    if preview.remarks:
        yield "<section><h2>Left out, and otherwise remarkable</h2><ul>"
        for line, files in preview.remarks.items():
            yield f"<li>{text(line)}{_files(files) if len(files) > 1 else ''}</li>"
        yield "</ul></section>"
    if preview.duplicates:
        yield "<section><h2>Duplicates</h2><p>Files with the same content, to the byte.</p><ul>"
        for group in preview.duplicates[:NAMES]:
            yield f"<li>{', '.join(_name(path) for path in group[:NAMES])}{_more(len(group) - NAMES, 'file')}</li>"
        yield f"</ul>{_more(len(preview.duplicates) - NAMES, 'picture')}</section>"


def _files(files: Sequence[Path]) -> str:
    names = ", ".join(_name(path) for path in files[:NAMES])
    return f"<details><summary>which</summary>{names}{_more(len(files) - NAMES, 'file')}</details>"


def _more(number: int, what: str) -> str:
    return f'<span class="more"> and {_count(number, f"more {what}")}</span>' if number > 0 else ""


def _buckets(preview: Preview) -> Iterator[str]:
    plan = preview.loaders[0].plan
    yield "<section><h2>Buckets</h2>"
    for number, dataset in enumerate(plan, 1):
        counts, files = dataset.buckets(), Counter(picture.fit.bucket for picture in dataset.pictures)
        largest, batches = max(counts.values()), dataset.batches()
        shown = dict(sorted(counts.items(), key=lambda one: -one[1])[:BARS])
        yield f"<h3>Data set {number}</h3>" * (len(plan) > 1)
        yield '<div class="wide"><table class="bars"><thead><tr><th>size</th><th class="n">pictures</th>'
        yield '<th class="n">with repeats</th><th class="n">batches</th><th></th></tr></thead><tbody>'
        for size, count in counts.items():
            if size in shown:
                yield f'<tr><th scope="row">{size[0]} × {size[1]}</th><td class="n">{files[size]:,}</td>'
                yield f'<td class="n">{count:,}</td><td class="n">{batches[size]:,}</td>'
                yield f'<td class="bar"><span style="width:{100 * count / largest:.1f}%"></span></td></tr>'
        yield "</tbody></table></div>"
        if more := len(counts) - len(shown):
            left = sum(counts.values()) - sum(shown.values())
            yield f'<p class="more">and {_count(more, "more size")} with {_count(left, "picture")} in all.</p>'
    yield "</section>"


def _pictures(preview: Preview, shown: Sequence[Card]) -> Iterator[str]:
    plan, epochs = preview.loaders[0].plan, min(EPOCHS, preview.epochs)
    yield f"<section><h2>Pictures</h2><p>{_legend(shown, epochs, preview.encoders)}</p>"
    for number, dataset in enumerate(plan, 1):
        files = Counter(picture.fit.bucket for picture in dataset.pictures)
        known = {id(picture) for picture in dataset.pictures}
        own = [card for card in shown if id(card.picture) in known]
        yield f"<h3>Data set {number}</h3>" * (len(plan) > 1)
        yield '<div class="grid">'
        for size, group in itertools.groupby(own, lambda card: card.picture.fit.bucket):
            cards = list(group)
            for card in cards:
                yield from _card(card, preview.encoders)
            if more := files.pop(size) - len(cards):
                yield f'<p class="rest">and {_count(more, "more picture")} of {size[0]} × {size[1]}</p>'
        if files:
            rest = _count(sum(files.values()), "more picture")
            yield f'<p class="rest">and {rest} of {_count(len(files), "other size")}</p>'
        yield "</div>"
    yield "</section>"


def _kept(preview: Preview, shown: Sequence[Card]) -> Iterator[str]:
    if preview.kept is not None:
        number = sum(len(dataset.pictures) for dataset in preview.kept.plan)
        yield f"<section><h2>Kept apart to validate on <small>{_count(number, 'picture')}</small></h2>"
        yield '<div class="grid">'
        for card in shown:
            yield from _card(card, preview.encoders)
        if more := number - len(shown):
            yield f'<p class="rest">and {_count(more, "more picture")}</p>'
        yield "</div></section>"


def _legend(shown: Sequence[Card], epochs: int, encoders: Sequence[Encoder]) -> str:
    """How a card is read, as far as there is something of the kind."""
    read = ", ".join(f"{names} {length:,}" for names, length in _limits(encoders).items())
    lines = [
        f"As cropped, with the captions of the first {epochs} epochs." if epochs > 1
        else "As cropped, with the captions of the only epoch.",
        f"Tokens are counted without start and end; read are {read}.",
        "What a mask leaves out is grey and striped." if any(_has_mask(card.picture) for card in shown) else "",
        "Random crops and colours are those of the first appearance." if any(c.picture.varies for c in shown) else "",
    ]  # fmt: skip
    return " ".join(line for line in lines if line)


def _limits(encoders: Sequence[Encoder]) -> dict[str, int]:
    return {encoder.name: encoder.length for encoder in encoders}


def _has_mask(picture: Picture) -> bool:
    return picture.mask is not None or picture.subset.alpha_mask


def _card(card: Card, encoders: Sequence[Encoder]) -> Iterator[str]:
    picture, factor = card.picture, enlargement(card.picture)
    (width, height), (wide, high), bucket = picture.size, picture.fit.resized, picture.fit.bucket
    yield "<article>"
    if card.inputs:
        yield '<div class="pictures inputs">'
        for number, image in enumerate(card.inputs, 1):
            yield '<p class="warn">cannot be read</p>' if image is None else _image(image, f"input picture {number}")
        yield "</div>"
    yield '<div class="pictures">'
    yield from _images(card)
    yield f"</div><h4>{_name(picture.path)}</h4>"
    steps = [f"{width} × {height}"]
    steps += [f"scaled to {wide} × {high}"] * (picture.size != picture.fit.resized)
    steps += [f"cut to {bucket[0]} × {bucket[1]}"] * (picture.fit.resized != bucket)
    yield f'<p class="size">{", ".join(steps)}</p>'
    for number, one in enumerate(picture.inputs, 1):
        yield f'<p class="size">input picture {number}: {_name(one.path)}, {_cut_to(one.crop)}</p>'
    marks = [
        (f"× {picture.repeats}", "", picture.repeats > 1),
        ("regularisation", "", picture.subset.is_reg),
        (f"enlarged {factor:.1f} times", "warn" * (factor > ENLARGED), factor >= 1.05),
        ("mask", "", _has_mask(picture)),
        ("random crop", "", picture.subset.augment.random_crop),
        ("colours", "", picture.subset.augment.color_aug),
    ]
    if any(is_so for _, _, is_so in marks):
        found = "".join(f"<li{' class=warn' if kind else ''}>{mark}</li>" for mark, kind, is_so in marks if is_so)
        yield f'<ul class="marks">{found}</ul>'
    yield from _captions(card)
    yield from _tokens(dict.fromkeys(one.caption for found in card.epochs for one in found), encoders)
    yield "</article>"


def _cut_to(crop: Crop) -> str:
    (wide, high), (width, height) = crop.original, crop.size
    return f"{wide} × {high}" + f" as {width} × {height}" * (crop.original != crop.size)


def _images(card: Card) -> Iterator[str]:
    if card.image is None:
        yield '<p class="warn">cannot be read</p>'
        return
    yield _image(card.image, "as cropped")
    if card.picture.subset.augment.flip_aug:
        small = card.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        small.thumbnail((SMALL, SMALL), Image.Resampling.LANCZOS)
        yield _image(small, "mirrored")


def _image(image: Image.Image, what: str) -> str:
    return f'<img alt="{what}" width="{image.width}" height="{image.height}" src="{data_url(image)}">'


def _captions(card: Card) -> Iterator[str]:
    """One line for all epochs where nothing differs."""
    epochs = [list(_lines(found)) for found in card.epochs]
    if len(set(map(tuple, epochs))) == 1 and len(epochs[0]) == 1:
        yield f'<p class="caption">{epochs[0][0]}</p>'
        return
    yield '<ol class="epochs">'
    for lines in epochs:
        yield "<li>" + "".join(f"<p>{line}</p>" for line in lines[:CAPTIONS])
        yield f"{_more(len(lines) - CAPTIONS, 'caption')}</li>"
    yield "</ol>"


def _lines(appearances: Sequence[Appearance]) -> Iterator[str]:
    """The captions of an epoch, each with whether the picture is mirrored."""
    found: dict[str, set[bool]] = {}
    for one in appearances:
        found.setdefault(one.caption, set()).add(one.mirrored)
    for caption, mirrored in found.items():
        shown = f"{caption[:LETTERS]}…" if len(caption) > LETTERS else caption
        words = f'<span dir="auto">{text(shown)}</span>' if caption else "<i>no caption</i>"
        yield words + {(True,): " <small>mirrored</small>", (False, True): " <small>also mirrored</small>"}.get(
            tuple(sorted(mirrored)), ""
        )


def _tokens(captions: Iterable[str], encoders: Sequence[Encoder]) -> Iterator[str]:
    """Of the longest caption, for each text encoder; those that read alike are one."""
    found: dict[tuple[int, int, str], list[str]] = {}
    for encoder in encoders:
        longest = max(captions, key=lambda caption: len(encoder.ids(caption)))
        key = len(encoder.ids(longest)), encoder.length, encoder.beyond(longest)
        found.setdefault(key, []).append(encoder.name)
    for (tokens, length, rest), names in found.items():
        who = f"{' and '.join(names)}: " * (len(encoders) > 1)
        yield f'<p class="tokens{" warn" * (tokens > length)}">{who}{tokens:,} of {length:,} tokens</p>'
        if rest:
            shown = rest if len(rest) <= REST else f"{rest[:REST]}…"
            yield f'<p class="cut">not read: <del dir="auto">{text(shown)}</del></p>'


def _count(number: int, what: str) -> str:
    return f"{number:,} {what}{'s' * (number != 1)}"
