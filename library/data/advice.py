"""What a friend who has trained often would say of a data set: rules, each with the number from which it speaks up."""

from __future__ import annotations

import logging
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from library.data import captions
from library.data.batches import Loader
from library.data.plan import Picture, Plan, by_subset, pictures

logger = logging.getLogger(__name__)

ENLARGED = 1.5  # times a side, from which a picture is blurred


@dataclass(frozen=True)
class Facts:
    """What the rules are asked about.

    :param loader: of what is trained on, which knows the steps of the training
    :param kept: what is kept apart to validate on
    :param trigger: --trigger_word
    :param duplicates: files of the same content
    :param cut: captions that are longer than the text encoder reads; none, where another line tells that
    """

    loader: Loader
    kept: Plan = ()
    trigger: str | None = None
    duplicates: Sequence[Sequence[Path]] = ()
    cut: Sequence[Path] = ()

    @cached_property
    def trained(self) -> list[Picture]:
        """All but regularisation pictures."""
        return [picture for picture in pictures(self.loader.plan) if not picture.subset.is_reg]

    @cached_property
    def different(self) -> int:
        """How many files these are."""
        return len({picture.path for picture in self.trained})

    @property
    def views(self) -> float:
        """How often each is trained on in the end, on average."""
        epochs = self.loader.steps / self.loader.steps_an_epoch
        return epochs * sum(picture.repeats for picture in self.trained) / max(self.different, 1)


@dataclass(frozen=True)
class Rule:
    """:param found: what there is to say, from the facts and the limit; None for nothing
    :param reason: why it matters, and what to do
    :param grave: whether the training is hardly what was meant
    """

    found: Callable[[Facts, float], str | None]
    limit: float
    reason: str
    grave: bool = False


@dataclass(frozen=True)
class Advice:
    """A rule that spoke up."""

    line: str
    reason: str
    grave: bool = field(default=False, compare=False)


def few_pictures(facts: Facts, least: float) -> str | None:
    """The limit is in pictures."""
    number = facts.different
    return f"{_pictures(number)} to train on" if number < least else None


def ends_early(facts: Facts, epochs: float) -> str | None:
    """The limit is in epochs."""
    loader = facts.loader
    if loader.steps >= epochs * loader.steps_an_epoch:
        return None
    return f"the training ends at step {loader.steps}, before an epoch's {loader.steps_an_epoch} steps are over"


def few_views(facts: Facts, least: float) -> str | None:
    """The limit is in times that a picture is trained on; a hundred pictures and more are a style's rather."""
    if facts.views >= least or facts.different >= 100 or facts.loader.steps >= 10 * least:
        return None
    return f"a picture is trained on {_times(facts.views)} on average, in {facts.loader.steps} steps"


def many_views(facts: Facts, most: float) -> str | None:
    """The limit is in times that a picture is trained on."""
    return f"a picture is trained on {_times(facts.views)} on average" if facts.views > most else None


def without_trigger(facts: Facts, share: float) -> str | None:
    """The limit is the share of captions that may lack a word by mistake: where more do, it is no trigger."""
    for subset, group in by_subset(facts.trained):
        meant = subset.class_tokens or ""
        asked = [facts.trigger] if facts.trigger else [meant, meant.split(" ")[0]]
        for word in (word for word in asked if word and len(word) > 2):
            lacking = [one for one in group if word.casefold() not in text_of(one).casefold()]
            if lacking and (facts.trigger or len(lacking) <= share * len(group)):
                return f"{len(lacking)} of {len(group)} captions of {subset.name} lack '{word}', {_some(lacking)}"
    return None


def same_captions(facts: Facts, least: float) -> str | None:
    """The limit is in pictures."""
    texts = {(text_of(one), *(other.path for other in one.inputs)) for one in facts.trained}
    folders = {(one.subset.class_tokens,) for one in facts.trained}  # which stand in for captions knowingly
    if facts.different < least or len(texts) > 1 or texts <= folders:
        return None
    return f"all captions are the same: '{_short(str(texts.pop()[0]))}'"


def cut_captions(facts: Facts, most: float) -> str | None:
    """The limit is in captions."""
    if len(facts.cut) <= most:
        return None
    return f"{len(facts.cut)} caption{'s' * (len(facts.cut) > 1)} longer than the text encoder reads, {_of(facts.cut)}"


def alone_in_bucket(facts: Facts, pictures_alone: float) -> str | None:
    """The limit is in pictures of a bucket, where batches could have more."""
    alone = [paths[0] for _, batch, paths in _buckets(facts) if len(paths) <= pictures_alone and batch > 1]
    if not alone or facts.different == 1:
        return None
    return f"{len(alone)} size{'s' * (len(alone) > 1)} with a single picture, {_of(alone)}"


def batches_never_full(facts: Facts, share: float) -> str | None:
    """The limit is the share of the batch size that the largest bucket fills."""
    for dataset in facts.loader.plan:
        largest, size = max(dataset.alike().values()), dataset.options.batch_size
        if largest < share * size:
            return f"--train_batch_size {size}: no size of pictures comes more than {_times(largest)} in an epoch"
    return None


def drowned(facts: Facts, share: float) -> str | None:
    """The limit is the share of an epoch, where it is also a third of the share of pictures: repeats did it."""
    total = sum(picture.repeats for picture in facts.trained)
    for subset, group in by_subset(facts.trained):
        own, of_pictures = sum(one.repeats for one in group) / total, len(group) / len(facts.trained)
        if own < share and own < of_pictures / 3:
            return f"{subset.name} has {of_pictures:.0%} of the pictures and, by the repeats, {own:.1%} of an epoch"
    return None


def enlarged(facts: Facts, most: float) -> str | None:
    """The limit is in times a side."""
    found = sorted(((enlargement(one), one.path) for one in facts.trained), reverse=True)
    large = [path for factor, path in found if factor > most]
    if not large:
        return None
    return f"{_pictures(len(large))} enlarged more than {most} times, {large[0].name} {found[0][0]:.1f} times"


def cut_off(facts: Facts, most: float) -> str | None:
    """The limit is the share of a picture's area, where buckets are not asked for."""
    lost = {
        one.path: 1 - one.fit.bucket[0] * one.fit.bucket[1] / (one.fit.resized[0] * one.fit.resized[1])
        for one in facts.trained
        if not one.buckets.options.enable_bucket and not one.varies
    }
    large = [path for path, share in lost.items() if share > most]
    if not large:
        return None
    worst = max(large, key=lost.__getitem__)
    return f"{_pictures(len(large))} cropped by more than {most:.0%}, {worst.name} by {lost[worst]:.0%}"


def few_regular(facts: Facts, ratio: float) -> str | None:
    """The limit is in regularisation pictures for each picture that is trained on."""
    regular = len({one.path for one in pictures(facts.loader.plan) if one.subset.is_reg})
    if not regular or regular >= ratio * facts.different:
        return None
    return f"{regular} regularisation picture{'s' * (regular > 1)} for {_pictures(facts.different)}"


def few_kept(facts: Facts, least: float) -> str | None:
    """The limit is in pictures, on either side."""
    kept = sum(1 for _ in pictures(facts.kept))
    if not kept or (kept >= least and facts.different >= least):
        return None
    return f"{_pictures(kept)} to validate on, {facts.different} to train on"


def copies(facts: Facts, most: float) -> str | None:
    """The limit is in groups of copies."""
    if len(facts.duplicates) <= most:
        return None
    names = " and ".join(path.name for path in facts.duplicates[0][:2])
    return f"{len(facts.duplicates)} picture{'s' * (len(facts.duplicates) > 1)} there more than once, {names}"


RULES = (
    Rule(few_pictures, 5, "the model learns so few by heart, with background and pose; 10 to 30 that differ are usual"),
    Rule(ends_early, 1, "what would come behind is not trained on; give more steps, or a larger batch", grave=True),
    Rule(few_views, 20, "50 to 200 times are usual for a subject; give more steps, epochs or repeats"),
    Rule(many_views, 500, "50 to 200 times are usual for a subject; beyond, pictures are learnt by heart"),
    Rule(without_trigger, 0.2, "what these pictures teach is not bound to the word; add it", grave=True),
    Rule(same_captions, 5, "what the pictures have in common is all learnt as one; say what is to stay changeable"),
    Rule(cut_captions, 0, "what is behind is not read; shorten them, or give --max_token_length 225 (not FLUX.1)"),
    Rule(
        alone_in_bucket,
        1,
        "it is trained in batches of itself alone; crop it, and its input pictures, to the shape of others",
    ),
    Rule(batches_never_full, 1, "batches are never full, and rates meant for full ones too high; give a smaller one"),
    Rule(drowned, 0.1, "the others drown it; give it more repeats, or the others fewer", grave=True),
    Rule(
        enlarged, ENLARGED, "blur is learnt as a feature; give larger pictures, leave them out, or --bucket_no_upscale"
    ),
    Rule(cut_off, 0.4, "heads and feet are lost so; --enable_bucket keeps the pictures' shapes"),
    Rule(few_regular, 1, "each is seen again and again and learnt itself; 100 and more are usual"),
    Rule(few_kept, 2, "the loss of one picture says little; give more pictures, or another --validation_split"),
    Rule(copies, 0, "each counts as often as it is there; delete copies, and raise repeats where that is meant"),
)


def advice(facts: Facts) -> Iterator[Advice]:
    """What the rules say, in their order; nothing of a good data set."""
    for rule in RULES:
        if line := rule.found(facts, rule.limit):
            yield Advice(line, rule.reason, rule.grave)


def tell(facts: Facts) -> None:
    """The same in the log."""
    for one in advice(facts):
        logger.log(logging.WARNING if one.grave else logging.INFO, f"{one.line}: {one.reason}")


def enlargement(picture: Picture) -> float:
    """How many times each side is enlarged; 1 where it is not."""
    return max(1.0, picture.fit.resized[0] / picture.size[0], picture.fit.resized[1] / picture.size[1])


def _buckets(facts: Facts) -> Iterator[tuple[tuple[int, ...], int, list[Path]]]:
    """Each data set's: its size, the batch size, and its files."""
    for dataset in facts.loader.plan:
        found: dict[tuple[int, ...], dict[Path, bool]] = defaultdict(dict)
        for picture in dataset.pictures:
            found[picture.alike][picture.path] = True
        for size, paths in found.items():
            yield size, dataset.options.batch_size, list(paths)


def text_of(picture: Picture) -> str:
    """Its caption with nothing dropped or shuffled."""
    return captions.whole(picture.caption, picture.subset.captions)


def _pictures(number: int) -> str:
    return f"{number} picture{'s' * (number != 1)}"


def _times(number: float) -> str:
    return "once" if round(number) == 1 else f"{number:.0f} times" if number >= 1 else f"{number:.1f} times"


def _some(found: Sequence[Picture]) -> str:
    return _of([one.path for one in found])


def _of(paths: Sequence[Path]) -> str:
    return f"{paths[0].name} for one" if len(paths) > 1 else paths[0].name


def _short(text: str) -> str:
    text = text.replace("\n", " / ")
    return text if len(text) <= 60 else f"{text[:60]}..."
