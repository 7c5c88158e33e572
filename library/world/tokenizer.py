"""CLIP's tokenizer with a small vocabulary of its own."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import CLIPTokenizer

SPECIAL = {"bos_token": "<|startoftext|>", **dict.fromkeys(("eos_token", "unk_token", "pad_token"), "<|endoftext|>")}


def build(folder: Path, words: Sequence[str] = (), length: int = 77) -> CLIPTokenizer:
    """Writes and loads a byte-level CLIP tokenizer that has one token for each of these words, and a token a letter
    for all others.

    :param length: tokens of a prompt with start and end, the text encoder's positions
    """
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = _merges(words)
    tokens = [*letters, *(letter + "</w>" for letter in letters), *("".join(pair) for pair in merges)]
    tokens += [SPECIAL["bos_token"], SPECIAL["eos_token"]]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}), encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    settings = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, **SPECIAL}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings), encoding="utf-8")
    return CLIPTokenizer.from_pretrained(str(folder))


def _merges(words: Sequence[str]) -> list[tuple[str, str]]:
    """Byte pair encoding, trained until every word is one token.

    Equally frequent pairs are merged in the order of their letters' numbers, which are given here: left to itself, the
    trainer numbers a word's last letter differently in every run.
    """
    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    letters = sorted({letter for word in words for letter in (*word, word[-1] + "</w>")})
    trainer = trainers.BpeTrainer(
        vocab_size=10**6, end_of_word_suffix="</w>", show_progress=False, special_tokens=letters
    )
    tokenizer.train_from_iterator(words, trainer)
    return [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]]
