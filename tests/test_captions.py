"""Captions: what stays, what moves, what is dropped, how often; and what a user is told of them."""

from __future__ import annotations

import contextlib
import random
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data import captions
from library.data.remarks import Remarks
from library.models import clip, weighted
from library.options.rooms import CaptionOptions
from networks.deft_config import DeftError
from tests import small_models

TAGS = st.lists(st.text("abcdé日 _-", min_size=1, max_size=6).map(str.strip).filter(bool), min_size=1, max_size=8)
relaxed = settings(deadline=None, max_examples=150)  # other work slows single examples down
SEEDS = st.integers(0, 2**32)


def processed(caption: str, seed: int = 0, epoch: int = 1, step: int = 0, steps: int = 100, **options: Any) -> str:
    draw = random.Random(seed)
    return captions.process(caption, CaptionOptions(**options), epoch=epoch, step=step, steps=steps, random=draw)


def counted(times: int, caption: str, **options: Any) -> Counter[str]:
    """Of one random source, caption after caption."""
    draw, made = random.Random(1), CaptionOptions(**options)
    return Counter(captions.process(caption, made, epoch=1, step=0, steps=100, random=draw) for _ in range(times))


# --- what becomes of a caption ----------------------------------------------------------------------------------------


@relaxed
@given(st.text().filter(lambda text: "\n" not in text), SEEDS)
def test_without_options_a_caption_stays(caption, seed):
    draw = random.Random(seed)
    state = draw.getstate()
    assert captions.process(caption, CaptionOptions(), epoch=3, step=2, steps=9, random=draw) == caption
    assert draw.getstate() == state


@relaxed
@given(TAGS, st.integers(0, 9), SEEDS)
def test_shuffling_permutes_behind_the_kept_tags_alone(tags, kept, seed):
    found = processed(", ".join(tags), seed, shuffle_caption=True, keep_tokens=kept).split(", ")
    assert found[:kept] == tags[:kept]
    assert Counter(found) == Counter(tags)
    assert found == processed(", ".join(tags), seed, shuffle_caption=True, keep_tokens=kept).split(", ")


def test_shuffling_gives_every_order_equally_often():
    found = counted(6000, "a,b,c", shuffle_caption=True)
    assert len(found) == 6
    assert all(abs(number - 1000) < 150 for number in found.values())  # more than five standard deviations


@relaxed
@given(TAGS, TAGS, TAGS, SEEDS)
def test_the_separator_of_kept_tags(first, tags, last, seed):
    """Its second one ends what moves; a third one is a part of the last tags."""
    caption = " ||| ".join(", ".join(part) for part in (first, tags, last))
    options = {"shuffle_caption": True, "keep_tokens_separator": "|||", "caption_tag_dropout_rate": 0.3}
    found = processed(caption, seed, **options).split(", ")
    moved = found[len(first) : len(found) - len(last)]
    assert (found[: len(first)], found[len(found) - len(last) :]) == (first, last)
    assert Counter(moved) <= Counter(tags)
    two = processed(caption.rpartition(" ||| ")[0], seed, **options).split(", ")
    assert two == [*first, *moved]
    assert "|||" in processed(caption + " ||| z", seed, **options)


@relaxed
@given(TAGS, st.integers(0, 3), SEEDS)
def test_dropping_tags_invents_none_and_keeps_their_order(tags, kept, seed):
    tags = list(dict.fromkeys(tags))
    found = processed(", ".join(tags), seed, caption_tag_dropout_rate=0.5, keep_tokens=kept).split(", ")
    found = [tag for tag in found if tag]
    assert found[:kept] == tags[:kept]
    assert all(tags.index(a) < tags.index(b) for a, b in pairwise(found))


@pytest.mark.parametrize("rate", [0.05, 0.5, 0.9])
def test_rates_of_dropping(rate):
    times, deviation = 20_000, 5 * (rate * (1 - rate) * 20_000) ** 0.5
    assert abs(counted(times, "a cat", caption_dropout_rate=rate)[""] - rate * times) < deviation
    tags = counted(times, "a,b", caption_tag_dropout_rate=rate)
    for tag in "ab":
        left = sum(number for caption, number in tags.items() if tag in caption)
        assert abs(left - (1 - rate) * times) < deviation
    both = tags["a, b"] - (1 - rate) ** 2 * times  # each by itself
    assert abs(both) < 5 * ((1 - rate) ** 2 * times) ** 0.5


def test_dropping_every_few_epochs():
    found = [processed("a", epoch=epoch, caption_dropout_every_n_epochs=3, caption_prefix="x") for epoch in range(1, 8)]
    assert found == ["x a", "x a", "", "x a", "x a", "", "x a"]
    assert processed("a", caption_dropout_rate=1.0, caption_prefix="x") == ""


@relaxed
@given(st.lists(st.text("abc é", max_size=4), min_size=2, max_size=4), SEEDS)
def test_a_wildcard_is_one_of_its_alternatives(words, seed):
    found = processed(f"{{{{x}}}} {{{'|'.join(words)}}}, {{{'|'.join(words)}}}!", seed, enable_wildcard=True)
    assert found in {f"{{x}} {a}, {b}!" for a in words for b in words}


def test_lines_and_wildcards_are_equally_frequent():
    found = counted(9000, "one {a|b|c}\ntwo {a|b|c}\nthree {a|b|c}", enable_wildcard=True)
    assert len(found) == 9
    assert all(abs(number - 1000) < 150 for number in found.values())


@pytest.mark.parametrize("caption", ["{}", "{", "}", "a } b {", "{{}}", "a|b"])
def test_braces_that_are_no_wildcards(caption):
    assert processed(caption, enable_wildcard=True) == caption.replace("{{", "{").replace("}}", "}")


def test_one_line_without_wildcards():
    assert processed("a {b|c}\nd") == "a {b|c}"


def test_prefix_suffix_and_secondary_separator():
    options = {"caption_prefix": "sks,", "caption_suffix": ", end", "secondary_separator": ";;"}
    assert processed("a;;b", **options) == "sks, a,b , end"
    found = {processed("a;;b, c", seed, shuffle_caption=True, keep_tokens=1, **options) for seed in range(40)}
    assert len(found) == 6  # the two tags of one stay together
    assert all(caption.startswith("sks, ") and "a,b" in caption for caption in found)


@relaxed
@given(TAGS, st.integers(1, 50), st.integers(0, 60), st.integers(0, 4))
def test_tags_grow_in_number_while_warming_up(tags, steps, step, least):
    caption = ", ".join(tags)
    options = {"token_warmup_step": steps, "token_warmup_min": least}
    here, later = (processed(caption, step=at, **options).split(", ") for at in (step, step + 1))
    assert here == [""] or tags[: len(here)] == here
    assert len([tag for tag in later if tag]) >= len([tag for tag in here if tag]) or least > len(tags)
    if step == 0:
        assert len([tag for tag in here if tag]) == min(least, len(tags))
    if step >= steps:
        assert here == tags


def test_a_share_of_the_steps_is_that_many_steps():
    for step in range(60):
        share, number = (processed("a,b,c,d,e", step=step, steps=99, token_warmup_step=asked) for asked in (0.5, 49))
        assert share == number
    assert processed("a,b", step=0, steps=99, token_warmup_step=0.001) == "a,b"  # none at all


def test_which_captions_vary():
    assert not CaptionOptions(caption_prefix="x", keep_tokens=3, secondary_separator=";;").changing
    for options in ({"shuffle_caption": True}, {"enable_wildcard": True}, {"token_warmup_step": 0.1},
                    {"caption_dropout_rate": 0.1}, {"caption_tag_dropout_rate": 0.1},
                    {"caption_dropout_every_n_epochs": 2}):  # fmt: skip
        assert CaptionOptions(**options).changing == list(options)


# --- files ------------------------------------------------------------------------------------------------------------


def test_files_are_read_by_lines(tmp_path):
    file, remarks = tmp_path / "a.txt", Remarks()
    file.write_bytes("\ufeff\r\n a cat, \u2028here \r\n\r\nb\rc\n".encode())
    assert captions.read(file, CaptionOptions(), remarks) == "a cat, \u2028here"
    assert [line.startswith("1 caption (") and "of several lines" in line for line in remarks.lines()] == [True]
    remarks = Remarks()
    assert captions.read(file, CaptionOptions(enable_wildcard=True), remarks) == "a cat, \u2028here\nb\nc"
    assert not remarks.lines()


@pytest.mark.parametrize(
    ("content", "told"),
    [
        (b"", "empty"),
        (b" \n\t\r\n", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        ("a".encode("utf-16"), "UTF-8"),
        (b"\xff\xfe\xff", "UTF-8"),
    ],
)
def test_files_that_are_no_captions(tmp_path, content, told):
    file = tmp_path / "a.txt"
    file.write_bytes(content)
    with pytest.raises(DeftError, match=told) as error:
        captions.read(file, CaptionOptions(), Remarks())
    assert str(file) in str(error.value)


def test_where_captions_are_looked_for():
    assert captions.beside(Path("a_b/c_d.png"), ".txt") == [Path("a_b/c_d.txt")]
    assert captions.beside(Path("x/c_1_2_3_4.png"), ".cap") == [Path("x/c_1_2_3_4.cap"), Path("x/c.cap")]
    assert captions.beside(Path("a.b.png"), ".txt") == [Path("a.b.txt")]


# --- what is told -----------------------------------------------------------------------------------------------------

SHUFFLED = CaptionOptions(shuffle_caption=True)
TOLD = [
    (SHUFFLED, ["a, b"], []),
    (CaptionOptions(), ["a, b", "c"], []),
    (replace(SHUFFLED, keep_tokens=2), ["a, b", "c"], ["keep_tokens=2: no caption has more tags"]),
    (replace(SHUFFLED, keep_tokens=1), ["a, b", "c"], []),
    (CaptionOptions(keep_tokens=1), ["a, b"], ["keep_tokens=1: has no effect"]),
    (replace(SHUFFLED, keep_tokens_separator="|||"), ["a, b"], ["keep_tokens_separator=|||: no caption has it"]),
    (CaptionOptions(keep_tokens_separator="|||"), ["a ||| b"], ["keep_tokens_separator=|||: stays in the captions"]),
    (replace(SHUFFLED, secondary_separator=","), ["a, b"], ["secondary_separator=,: is caption_separator too"]),
    (replace(SHUFFLED, secondary_separator=";;"), ["a, b"], ["secondary_separator=;;: no caption has it"]),
    (SHUFFLED, ["a b", "c"], ["caption_separator=,: no caption has it"]),
    (CaptionOptions(), ["a\nb", "c"], ["1 caption ('a / b') of several lines"]),
    (CaptionOptions(enable_wildcard=True, caption_prefix="x", caption_suffix="y"), ["a\nb"],
     ["caption_prefix: ", "caption_suffix: "]),
    (CaptionOptions(enable_wildcard=True), ["{a|b}", "{{a}} b"], []),
    (CaptionOptions(enable_wildcard=True), ["{a|b", "a}", "{a|{b|c}}"], ["3 captions ('{a|b') with a brace"]),
    (CaptionOptions(), ["a {b|c}"], ["1 caption ('a {b|c}') with something like {a|b}"]),
]  # fmt: skip


@pytest.mark.parametrize(("options", "given_captions", "wanted"), TOLD)
def test_what_is_told(options, given_captions, wanted):
    found = captions.problems(options, given_captions)
    assert len(found) == len(wanted)
    assert all(line.startswith(begin) and "\n" not in line for line, begin in zip(found, wanted, strict=True))


def test_weights_across_tags_are_told():
    assert not captions.problems(SHUFFLED, ["(a, b:1.2), c"])
    assert not captions.problems(SHUFFLED, ["(a:1.2), (b), c"], weighted=True)
    assert "within ( )" in captions.problems(SHUFFLED, ["(a, b:1.2), c"], weighted=True)[0]


def test_an_empty_separator_is_refused_where_it_splits():
    assert not captions.problems(CaptionOptions(caption_separator=""), ["a"])
    for options in ({"shuffle_caption": True}, {"token_warmup_step": 1}, {"caption_tag_dropout_rate": 0.1}):
        with pytest.raises(DeftError, match="caption_separator"):
            captions.problems(CaptionOptions(caption_separator="", **options), ["a"])


# --- weights ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("caption", "wanted"),
    [
        ("", [("", 1)]),
        ("a cat", [("a cat", 1)]),
        ("a (cat)", [("a ", 1), ("cat", 1.1)]),
        ("(cat:1.3) [dog]", [("cat", 1.3), (" ", 1), ("dog", 1 / 1.1)]),
        ("((a:2) b:.5)!", [("a", 1), (" b", 0.5), ("!", 1)]),
        ("([a])", [("a", 1)]),
        (r"\(a\) \[b\] \\", [("(a) [b] \\", 1)]),
        ("(a [b", [("a ", 1.1), ("b", 1)]),
        ("a) b] :2) a:b", [("a) b] :2) a:b", 1)]),
        ("(a:-1)(b:+2)", [("a", -1), ("b", 2)]),
        ("[a:2]", [("a:2", 1 / 1.1)]),
    ],
)
def test_weights_of_texts(caption, wanted):
    found = weighted.parse(caption)
    assert [text for text, _ in found] == [text for text, _ in wanted]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in wanted])


@relaxed
@given(st.text("ab ()[]\\:12.", max_size=30))
def test_any_caption_has_weights_or_a_reason(caption):
    if re.search(r":[+-]?([.\d]*\.[.\d]*\.[.\d]*|\.)\)", caption):
        with contextlib.suppress(DeftError):  # unless no bracket is open
            weighted.parse(caption)
        return
    found = weighted.parse(caption)
    assert found
    assert all(a[1] != b[1] for a, b in pairwise(found))
    assert set("".join(text for text, _ in found)) <= set(caption)


@relaxed
@given(st.text("abc ,é", max_size=30))
def test_a_caption_without_brackets_has_no_weights(caption):
    assert weighted.parse(caption) == [(caption, 1.0)]


def test_a_weight_that_is_no_number():
    with pytest.raises(DeftError, match=r"--weighted_captions: 1\.2\.3 in '\(cat:1\.2\.3\)'"):
        weighted.parse("(cat:1.2.3)")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return small_models.tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.mark.parametrize("length", [None, 150, 225])
def test_weights_lie_at_their_tokens(tokenizer, length):
    """A letter is a token."""
    reader = clip.Reader(tokenizer, tokenizer.eos_token_id, 77, length, weighted=True)
    plain = clip.Reader(tokenizer, tokenizer.eos_token_id, 77, length)
    text = "x" * 70 + "(y" + "y" * 99 + ":1.5)z"
    weights = reader.weights([text, ""])
    assert (weights.shape, weights.dtype) == ((2, reader.length + 2), torch.float32)
    wanted = [1.0] * 71 + [1.5] * 100 + [1.0] * 100
    wanted = wanted[: reader.length + 1] + [1.0] * (reader.length + 2)
    assert weights[0].tolist() == wanted[: reader.length + 2]
    assert (weights[1] == 1).all()
    assert plain.weights([text]) is None
    assert torch.equal(reader.tokens(["a cat"]), plain.tokens(["a cat"]))
    rest, read = reader.beyond(text)
    assert read == reader.length
    assert rest.replace(" ", "") == ("x" * 70 + "y" * 100 + "z")[read:]  # a text of another weight is another word
    assert plain.beyond("x" * 400 + ":1.5)")[0].endswith("5 )")


def test_states_are_multiplied_by_their_weights():
    hidden = torch.randn(2, 5, 3, requires_grad=True)
    weights = torch.tensor([[1, 1.3, 0.0, 1, 1], [1, 1, 1, -2, 1]])
    found = clip.weighed(hidden, weights)
    assert torch.equal(found, hidden * weights[..., None])
    found.sum().backward()
    assert torch.equal(hidden.grad, weights[..., None].expand_as(hidden))
    assert clip.weighed(hidden, None) is hidden
    assert clip.weighed(hidden.half(), weights).dtype == torch.float16


def test_texts_are_cleaned_before_they_are_read():
    assert clip.cleaned(" “A\u00a0Cat’s”  ﬁt ＡＢ &amp; Ã© \ufeff\n") == '"a cat\'s" fit ab & é'
    assert clip.cleaned("a plain caption, (x:1.2)") == "a plain caption, (x:1.2)"
