"""The words that a file says call its concept: found where they are certain, and nothing where they are not."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.data.plan import Dataset, Picture
from library.options.rooms import CaptionOptions, SubsetOptions
from library.training.record import Drawn, Record
from library.training.sharing import best_sample, trigger_of


def plan(*subsets: tuple[SubsetOptions, list[str]]):
    """Pictures with these captions; without one, a picture has the class tokens, as the folders' reader gives them."""
    found = [
        Picture(Path(f"{i}.png"), text or subset.class_tokens or "", subset, 1, (64, 64), None, None)
        for subset, texts in subsets
        for i, text in enumerate(texts)
    ]
    return (Dataset(SimpleNamespace(), tuple(found)),)


def folder(name: str = "10_sks cat", class_tokens: str | None = "sks cat", **options) -> SubsetOptions:
    kept = {key: options.pop(key) for key in ("is_reg", "train_jsonl", "custom_attributes") if key in options}
    return SubsetOptions(name, class_tokens=class_tokens, captions=CaptionOptions(**options), **kept)


SENTENCES = ["a photo of sks cat on a sofa", "a photo of sks cat, asleep", "a photo of sks cat"]
TAGS = ["sks, 1girl, red hair", "sks, solo, hat", "sks, 1girl, smile"]


@pytest.mark.parametrize(
    ("found", "subsets"),
    [
        ("sks cat", [(folder(), ["", ""])]),
        ("sks cat", [(folder(), [""]), (folder("1_sks cat"), [""])]),
        ("my sks cat", [(folder(caption_prefix="my"), ["", ""])]),
        ("sks cat", [(folder(), ["", ""]), (folder("1_dog", "dog", is_reg=True), ["", "a dog"])]),
        ("sks cat", [(folder("x", None), SENTENCES)]),
        ("sks cat", [(folder("x", "other"), SENTENCES)]),
        ("sks", [(folder("x", None), TAGS)]),
        ("sks", [(folder("x", None, shuffle_caption=True), [f"1girl, {text}" for text in TAGS])]),
        ("sks, red", [(folder("x", None, keep_tokens=2), ["sks, red, a", "sks, red, b"])]),
        ("sks", [(folder("x", None, keep_tokens_separator="|||"), ["sks ||| a, b", "sks ||| c"])]),
        ("ohwx woman", [(folder("x", None), [f"photo of ohwx woman {place}" for place in ("at sea", "in bed", "by")])]),
        # nothing is certain
        ("", [(folder(), [""]), (folder("1_xyz dog", "xyz dog"), [""])]),
        ("", [(folder("x", None), [f"a photo of a {what}" for what in ("cat", "dog", "red car")])]),
        ("", [(folder("x", None), [f"a woman {what}" for what in ("sits", "stands", "is here")])]),
        ("", [(folder("x", None), ["masterpiece, 1girl, hat", "masterpiece, 1girl, sea", "masterpiece, 1girl, x"])]),
        ("", [(folder("x", None, keep_tokens=1), ["1girl, hat", "1girl, sea"])]),
        ("", [(folder("x", None, keep_tokens=1), ["anna, hat", "berta, sea"])]),
        ("", [(folder("x", None), ["a red car", "a red cat"])]),  # two may share a word by accident
        ("", [(folder("x", None), ["the very long sentence that is the same for all of them"] * 3)]),
        ("", [(folder("x", None, train_jsonl="x.jsonl"), ["remove the sofa", "remove the cat", "remove the dog"])]),
        ("", [(folder("x", None), ["", ""])]),
    ],
)  # fmt: skip
def test_what_is_certain_and_nothing_else(found, subsets):
    words, source = trigger_of(plan(*subsets), None)
    assert words == found
    assert bool(source) == bool(found)


def test_what_is_given_as_the_trigger_is_one():
    assert trigger_of(plan((folder(), [""])), "xyz") == ("xyz", "--trigger_word")


def test_answers_of_the_model_that_are_to_stay_have_no_say():
    kept = folder("1_others", "others", custom_attributes={"diff_output_preservation": True})
    assert trigger_of(plan((folder(), [""]), (kept, [""])), None)[0] == "sks cat"


@given(st.lists(st.text("abc ,.", min_size=1).filter(str.strip), min_size=1, max_size=5), st.integers(0, 3))
def test_a_trigger_is_in_every_caption(texts, keep_tokens):
    subset = folder("x", None)
    subset = replace(subset, captions=CaptionOptions(keep_tokens=keep_tokens))
    words, _ = trigger_of(plan((subset, texts)), None)
    for text in texts:
        assert all(word in text for word in words.replace(",", " ").split())


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 2)), max_size=12), st.integers(1, 50))
def test_the_sample_is_of_the_prompt_and_the_nearest_step(drawn, step):
    record = Record(samples=[Drawn(f"{i}.png", at, prompt) for i, (at, prompt) in enumerate(drawn)])
    prompts = ["a dog", "sks cat on a sofa", "sks cat"]
    for trigger, number in (("sks cat", 1), ("xyz", 0), ("", 0)):
        best = best_sample(record, prompts, trigger, step)
        of_training = [one for one in record.samples if one.step > 0]
        if best is None:
            assert not of_training
            continue
        alike = [one for one in of_training if one.prompt == number]
        assert best.prompt == number or not alike
        assert all(abs(best.step - step) <= abs(one.step - step) for one in alike or of_training)
