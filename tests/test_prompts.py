"""Prompts files: sd-scripts' text, JSON and TOML, and everything that could end a training checked before it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from library.models.family import Family
from library.prompts import Prompt, read_prompts
from networks.deft_config import DeftError


def read(tmp_path: Path, name: str, text: str) -> list[Prompt]:
    (tmp_path / name).write_text(text, encoding="utf-8")
    return read_prompts(str(tmp_path / name), (64, 32))


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        ("a cat", {"text": "a cat", "width": 64, "height": 32}),
        ("a well--made cat --n blurry, bad --d 5", {"text": "a well--made cat", "negative": "blurry, bad", "seed": 5}),
        ("x --w 128 --h 256 --l 7.5 --s 28", {"width": 128, "height": 256, "guidance": 7.5, "steps": 28}),
        ("x --W 128 --D 18446744073709551615", {"width": 128, "seed": 2**64 - 1}),
        ("a\u2028b\x85c", {"text": "a\u2028b\x85c"}),
    ],
)
def test_lines(tmp_path, line, expected):
    (prompt,) = read(tmp_path, "p.txt", f"\ufeff# not this\r\n\r\n{line}\r\n")
    assert {key: getattr(prompt, key) for key in expected} == expected


ONE = Prompt("a cat", "blurry", 128, 64, 5, 4.0, 20)
TWO = Prompt("a dog", "", 64, 32, None, None, 30)


def test_the_three_formats_say_the_same(tmp_path):
    """Keys and the place of `subset` as sd-scripts' `load_prompts` (commit 48d368fa) reads them."""
    line = "a cat --n blurry --w 128 --h 64 --d 5 --l 4 --s 20"
    table = {"prompt": "a cat", "negative_prompt": "blurry", "width": 128, "height": 64, "seed": 5, "scale": 4.0,
             "sample_steps": 20}  # fmt: skip
    assert read(tmp_path, "p.txt", f"{line}\na dog\n") == [ONE, TWO]
    assert read(tmp_path, "p.json", json.dumps([table, "a dog"])) == [ONE, TWO]
    assert read(tmp_path, "q.json", json.dumps([line, {"prompt": "a dog", "enum": 1}])) == [ONE, TWO]
    shared = '[prompt]\nnegative_prompt = "blurry"\nwidth = 128\nheight = 64\nscale = 4\nsample_steps = 20\nseed = 1\n'
    subsets = '[[prompt.subset]]\nprompt = "a cat"\nseed = 5\n[[prompt.subset]]\nprompt = "a dog"\nwidth = 8\n'
    found = read(tmp_path, "p.toml", shared + subsets)
    assert found == [ONE, Prompt("a dog", "blurry", 8, 64, 1, 4.0, 20)]


def test_what_is_not_used_of_sd_scripts_options_is_told(tmp_path, caplog):
    read(tmp_path, "p.txt", "a cat --ss euler_a --fs 3\na dog --ss euler_a")
    assert caplog.messages == [f"--sample_prompts {tmp_path / 'p.txt'}: flow_shift not used; other models have them"]


WRONG = {
    "a cat --s 1001": "--s 1001 must be from 1 to 1000, in 'a cat'",
    "a cat --s 0": "--s 0 must be from 1 to 1000",
    "a cat --d 18446744073709551616": "--d 18446744073709551616 must be from 0 to 2^64 - 1",
    "a cat --d 12345678901234567890123": "must be from 0 to 2^64 - 1",
    "a cat --d -1": "--d -1 must be from 0",
    "a cat --d": "--d  is no number",
    "a cat --d one": "--d one is no number in 'a cat'",
    "a cat --w 100": "--w and --h must be multiples of 8",
    "a cat --h 0": "--w and --h must be multiples of 8",
    "a cat --l nan": "--l nan must be a number",
    "a cat --g inf": "--g inf must be a number",
    "a cat --q 5": "unknown option --q in 'a cat --q 5'",
}


@pytest.mark.parametrize("line", WRONG)
def test_wrong_lines(tmp_path, line):
    with pytest.raises(DeftError) as error:
        read(tmp_path, "p.txt", line)
    assert WRONG[line] in str(error.value)
    assert "p.txt" in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("p.json", "[", "p.json: no JSON"),
        ("p.json", '{"prompt": "a"}', "has to be a list"),
        ("p.json", '[{"promt": "a"}]', "unknown key 'promt' (did you mean 'prompt'?)"),
        ("p.json", '[{"width": 64}]', "no prompt in {'width': 64}"),
        ("p.json", '[{"prompt": "a", "width": [1]}]', "--w [1] is no number"),
        ("p.json", "[]", "no prompts in it"),
        ("p.toml", "= =", "p.toml: no TOML"),
        ("p.toml", "[prompt]\nprompt = 'a'", "needs [[prompt.subset]] tables"),
        (
            "p.toml",
            "[prompt]\n[[prompt.subset]]\nprompt = 'a'\nseed = 99999999999999999999",
            "--d 99999999999999999999 must be",
        ),
        ("p.txt", "# nothing", "no prompts in it"),
        ("p.jsonl", "a cat", "only .txt, .json, .toml files are read"),
        ("p.json", "[" * 100000, "p.json: no JSON"),
        ("p.json", '[{"prompt": ["a", "b"]}]', "prompt = ['a', 'b'] is no text"),
        ("p.json", '[{"prompt": "a", "negative_prompt": false}]', "negative_prompt = False is no text"),
        ("p.json", '[{"prompt": "a", "width": 64.5}]', "--w 64.5 is no number"),
        ("p.json", '[{"prompt": "a", "width": true}]', "width = True is no number"),
        ("p.toml", "width = 64\n[prompt]\n[[prompt.subset]]\nprompt = 'a'", "'width' has to stand in [prompt]"),
        ("p.txt", "a --w 80000000", "multiples of 8 from 8 to 16384"),
    ],
)
def test_wrong_files(tmp_path, name, text, message):
    with pytest.raises(DeftError) as error:
        read(tmp_path, name, text)
    assert message in str(error.value)


def test_a_sample_that_fails_is_reported_and_training_goes_on(run, tmp_path, monkeypatch, caplog):
    prompts = tmp_path / "p.txt"
    prompts.write_text("a cat --w 64 --h 64 --s 1 --d 1\na dog --w 64 --h 64 --s 1 --d 2\n")
    draw = Family.draw

    def out_of_memory(model, prompt, *rest):
        if prompt.text == "a cat":
            raise RuntimeError("out of memory\nand more")
        return draw(model, prompt, *rest)

    monkeypatch.setattr(Family, "draw", out_of_memory)
    assert run(max_train_steps=1, sample_prompts=prompts, sample_every_n_steps=1) == 0
    assert len([line for line in caplog.messages if line.endswith("not drawn (out of memory)")]) == 1
    assert [path.name.rsplit("_", 1)[1] for path in (tmp_path / "out" / "sample").iterdir()] == ["2.png"]
    assert (tmp_path / "out" / "cat.safetensors").is_file()
