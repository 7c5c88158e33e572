"""A file that is ready to share: its picture, the words that call what it has learnt, and what stands beside it."""

from __future__ import annotations

import base64
import logging
import mimetypes
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from library.data import captions
from library.data.plan import Picture, Plan, by_subset, pictures
from library.options.rooms import Run, SubsetOptions
from library.prompts import Prompt
from library.training.record import Drawn, Record
from networks import deft_card, deft_io, deft_pictures, deft_sharing
from networks.deft_config import DeftError, reason_of
from networks.deft_pictures import THUMBNAIL

logger = logging.getLogger(__name__)

TRIGGER = deft_sharing.FRIENDLY["trigger"]
LONGEST = 6  # words of a trigger that captions share
FEWEST = 3  # captions that share it by more than chance
# words that captions have whatever they are of: such as join, what the picture is, and what it may be of
_JOINING = (
    "a", "an", "the", "of", "in", "on", "at", "by", "with", "and", "or", "is", "are", "was", "has", "to", "for", "from",
    "this", "that", "it", "its", "his", "her", "their", "my", "there", "here", "one", "two", "three", "several", "some",
)  # fmt: skip
_MEDIA = (
    "photo", "photograph", "picture", "image", "painting", "drawing", "sketch", "illustration", "render", "portrait",
    "closeup", "close-up", "close", "up", "shot", "view",
)  # fmt: skip
_SUBJECTS = ("man", "woman", "person", "boy", "girl", "people", "male", "female")
_PLAIN_TAGS = (
    "1girl", "1boy", "2girls", "2boys", "1other", "solo", "no humans", "masterpiece", "best quality", "high quality",
    "highres", "absurdres", "photorealistic", "realistic",
)  # fmt: skip


# --- the trigger ------------------------------------------------------------------------------------------------------


def trigger_of(plan: Plan, trigger_word: str | None) -> tuple[str, str]:
    """The words that call what is trained, and what says so; "" twice where nothing is certain.

    --trigger_word; or a folder's or data set's class tokens, where no picture has a caption of its own; or what all
    captions begin with: tags or words that are more than "a photo of a".

    :param trigger_word: what is given as such
    """
    if trigger_word:
        return trigger_word, "--trigger_word"
    shown = [one for one in pictures(plan) if not one.subset.is_reg and not one.subset.preserved]
    subsets = [subset for subset, _ in by_subset(shown)]
    if not shown or any(subset.train_jsonl for subset in subsets):  # instructions name what is to be done
        return "", ""
    if all(one.caption and one.caption == one.subset.class_tokens for one in shown):
        texts = {_whole(one) for one in shown}
        folders = ", ".join(dict.fromkeys(subset.name for subset in subsets))
        return (texts.pop(), f"the class tokens of {folders}") if len(texts) == 1 else ("", "")
    found = _shared_tags(shown) or _shared_words([_whole(one) for one in shown])
    return (found, "what all captions begin with") if found else ("", "")


def _whole(picture: Picture) -> str:
    return captions.whole(picture.caption, picture.subset.captions)


def _shared_tags(shown: Sequence[Picture]) -> str:
    """Those that stay in front by keep_tokens, or else the first one, where they are the same everywhere."""
    kept = {_kept(one.subset, _whole(one)) for one in shown}
    if len(kept) == 1 and (found := [tag for tag in kept.pop() if tag.lower() not in _PLAIN_TAGS]):
        return ", ".join(found)
    tags = [_tags(_whole(one), one.subset) for one in shown]
    if any(len(found) < 2 for found in tags):  # sentences
        return ""
    shared = [tag for tag in _same(tags) if tag.lower() not in _PLAIN_TAGS]
    return _certain(shared[0].split(), {_whole(one) for one in shown}) if shared else ""


def _kept(subset: SubsetOptions, caption: str) -> tuple[str, ...]:
    options = subset.captions
    if options.keep_tokens_separator and options.keep_tokens_separator in caption:
        return tuple(_tags(caption.split(options.keep_tokens_separator)[0], subset))
    return tuple(_tags(caption, subset)[: options.keep_tokens])


def _tags(caption: str, subset: SubsetOptions) -> list[str]:
    return [tag.strip() for tag in caption.split(subset.captions.caption_separator or ",") if tag.strip()]


def _shared_words(texts: Sequence[str]) -> str:
    """What sentences begin with, but for "a photo of a" before it and words that join it to the rest."""
    words = [text.split(",")[0].split() for text in texts]
    shared = _same(words)
    while shared and shared[0].lower() in _JOINING + _MEDIA:
        shared = shared[1:]
    while shared and shared[-1].lower() in _JOINING and len(set(texts)) > 1:
        shared = shared[:-1]
    return _certain(shared, set(texts))


def _same(rows: Sequence[Sequence[str]]) -> list[str]:
    """What all begin with."""
    shared = list(rows[0])
    for row in rows[1:]:
        same = (i for i, (one, other) in enumerate(zip(shared, row, strict=False)) if one != other)
        shared = shared[: next(same, min(len(shared), len(row)))]
    return shared


def _certain(words: Sequence[str], texts: Collection[str]) -> str:
    """What is found, where it is short and more than plain words, and no accident of few captions.

    :param texts: the captions that are not the same
    """
    found = " ".join(words).rstrip(".;: ")
    is_plain = found.lower() in _PLAIN_TAGS or all(word.lower() in _JOINING + _MEDIA + _SUBJECTS for word in words)
    return "" if is_plain or len(words) > LONGEST or 1 < len(texts) < FEWEST else found


# --- the picture ------------------------------------------------------------------------------------------------------


def best_sample(record: Record, prompts: Sequence[str], trigger: str, step: int) -> Drawn | None:
    """The sample that shows best what a file has learnt: of the first prompt that has the trigger, or the first one,
    at the step nearest to the file's. What was drawn before the first step shows the base model.

    :param step: of the file
    """
    number = next((i for i, text in enumerate(prompts) if trigger and trigger in text), 0)
    drawn = [one for one in record.samples if one.step > 0]
    drawn = [one for one in drawn if one.prompt == number] or drawn
    return min(drawn, key=lambda one: (abs(one.step - step), -one.step), default=None)


@dataclass(frozen=True)
class Sharing:
    """What files of a training show of themselves.

    :param folder: of the output
    :param record: whose samples are shown
    :param trigger: words, "" for none
    :param from_samples: whether files have pictures of samples; else those alone that are given
    :param thumbnail: the picture that is given
    :param given: keys of the metadata that this run was given
    """

    folder: Path
    record: Record
    prompts: Sequence[Prompt]
    trigger: str
    from_samples: bool
    thumbnail: Path | None
    given: Collection[str]
    sidecars: bool
    model_card: bool

    def sample(self, step: int) -> Drawn | None:
        """That a file of a step shows."""
        if not self.from_samples:
            return None
        return best_sample(self.record, [prompt.text for prompt in self.prompts], self.trigger, step)

    def cover(self, file: str, step: int) -> dict[str, str]:
        """The metadata's picture of a file; nothing where there is no sample, with a line where it cannot be read.

        :param file: its name
        """
        sample = self.sample(step)
        if sample is None:
            return {}
        try:
            return deft_pictures.fields_of(self.folder / sample.name)
        except DeftError as error:
            logger.warning(f"{file}: without a picture, {sample.name} {error}")
            return {}

    def beside(self, files: Mapping[Path, int]) -> None:
        """What is asked for to stand beside files. What fails is told: the files themselves are written.

        :param files: with their steps
        """
        for file, step in files.items():
            try:
                for line in self._beside(file, self.sample(step)):
                    logger.info(line)
            except (DeftError, OSError) as error:
                logger.error(str(error))

    def _beside(self, file: Path, sample: Drawn | None) -> Iterable[str]:
        metadata = deft_io.read_metadata(file)
        picture = self.thumbnail if sample is None else self.folder / sample.name
        if picture is not None and (not picture.is_file() or self._is_kept(file)):
            picture = None
        if self.sidecars:
            yield from deft_sharing.write_sidecars(file, metadata, picture, self.given)
        if self.model_card:
            texts = dict(enumerate(prompt.text for prompt in self.prompts))
            prompt = "" if sample is None else texts.get(sample.prompt, "")  # before --resume there may have been more
            yield from deft_card.write(file, metadata, picture, prompt)

    def _is_kept(self, file: Path) -> bool:
        """Whether a picture is beside it already that is none of our samples: a person's."""
        there = deft_sharing.picture_beside(file)
        if there is None:
            return False
        content = there.read_bytes()
        ours = [path for path in (self.folder / "sample").glob("*.png") if path.stat().st_size == len(content)]
        return not any(path.read_bytes() == content for path in ours)


def sharing_of(run: Run, record: Record, prompts: Sequence[Prompt], metadata: Mapping[str, str]) -> Sharing:
    """:param prompts: of the samples
    :param metadata: of the training's files
    """
    given = {key for key in run.recorded if key.startswith("modelspec.")}
    thumbnail = str(run.recorded.get(THUMBNAIL, "data:"))
    return Sharing(
        Path(run.saves.output_dir), record, prompts, metadata.get(TRIGGER, ""),
        not run.saves.no_metadata and THUMBNAIL not in given,
        None if thumbnail.startswith("data:") else Path(thumbnail), given, run.saves.sidecars, run.saves.model_card,
    )  # fmt: skip


# --- --metadata_thumbnail ---------------------------------------------------------------------------------------------


def thumbnail_fields(given: str) -> dict[str, str]:
    """Of --metadata_thumbnail: what sd-scripts makes of it (`sai_model_spec.file_to_data_url`, commit 48d368fa), and
    the same picture where UIs look.

    :param given: a picture's file, or a data URL
    :raises DeftError: when the file cannot be read as a picture
    """
    if given.startswith("data:"):
        content, url = deft_pictures.of_data_url(given), given
    else:
        try:
            content = Path(given).read_bytes()
        except OSError as error:
            raise DeftError(f"--metadata_thumbnail {given}: {reason_of(error)}") from None
        kind = mimetypes.guess_type(given)[0] or "image/jpeg"
        url = f"data:{kind};base64,{base64.b64encode(content).decode()}"
    try:
        return deft_pictures.fields_of(content) | {THUMBNAIL: url} if content else {THUMBNAIL: url}
    except DeftError as error:
        raise DeftError(f"--metadata_thumbnail {given[:200]}: {error}") from None
