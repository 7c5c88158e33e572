"""Signals at every stage of a training: nothing learnt is lost by the first one, and what is printed is true."""

from __future__ import annotations

import ctypes
import os
import shlex
import signal
import sys
from pathlib import Path

import pytest
from safetensors.torch import load_file

import train_network_deft
from library.training import state
from library.training.interrupts import Interrupted, how_to_go_on
from library.training.loop import TrainingLoop
from library.training.samples import Samples
from library.training.saves import Saves
from library.training.validation import Validation
from networks import deft_io
from tests.conftest import arguments, in_two_processes
from tests.test_resume import assert_equal

CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}
if hasattr(signal, "SIGHUP"):
    CODES[signal.SIGHUP] = 129


@pytest.fixture(autouse=True)
def _signals_end_a_test_alone():
    def fail(number, frame):
        raise AssertionError(f"signal {number} is not held")

    before = {number: signal.signal(number, fail) for number in CODES}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def signal_at(monkeypatch):
    """Sends signals to this process whenever a method begins, or ends."""

    def arrange(owner, name: str, *numbers: int, behind: bool = False, only: int = 0):
        """:param only: which call, from 1; all of them otherwise"""
        method, calls = getattr(owner, name), []

        def wrapped(*args, **kwargs):
            calls.append(name)
            now = not only or len(calls) == only
            for number in numbers if now and not behind else ():
                signal.raise_signal(number)
            found = method(*args, **kwargs)
            for number in numbers if now and behind else ():
                signal.raise_signal(number)
            return found

        monkeypatch.setattr(owner, name, wrapped)

    return arrange


def said(capsys) -> list[str]:
    """Without the bar of the steps."""
    return [line for line in capsys.readouterr().err.split("\n") if line and "steps:" not in line]


def saved_step(out: Path) -> int:
    (folder,) = out.glob("cat-step*-state")
    return state.read(str(folder))[0].step


@pytest.mark.parametrize("number", CODES)
def test_before_the_first_step_one_line_and_the_end(run, tmp_path, signal_at, capsys, number):
    signal_at(train_network_deft.prepare, "read_pictures", number)
    assert run() == CODES[number]
    assert said(capsys)[-1] == "interrupted before the first step: nothing had been trained yet"
    assert "Traceback" not in capsys.readouterr().err
    assert not list(tmp_path.glob("out/*"))


@pytest.mark.parametrize("number", CODES)
def test_while_the_last_file_is_written_it_becomes_whole(run, tmp_path, signal_at, capsys, number):
    assert run(output_name="undisturbed") == 0
    signal_at(deft_io, "write_hashed", number)
    capsys.readouterr()
    assert run() == 0
    assert not [line for line in said(capsys) if "interrupted" in line]
    assert_equal(
        load_file(tmp_path / "out" / "cat.safetensors"), load_file(tmp_path / "out" / "undisturbed.safetensors")
    )


def test_twice_while_the_last_file_is_written_names_what_there_is(run, tmp_path, signal_at, capsys):
    out = tmp_path / "out"
    signal_at(os, "fsync", signal.SIGTERM, signal.SIGINT, only=3)  # behind the first save and its page
    assert run(save_every_n_steps=2, save_state=True) == 130
    state_before = out / "cat-state"  # which is written before the adapter
    assert said(capsys)[-1] == (
        f"ended at once; last good save: {out / 'cat-step00000002.safetensors'}; --resume {state_before} goes on"
    )
    assert not (out / "cat.safetensors").exists()
    assert not list(out.glob(".*"))
    load_file(out / "cat-step00000002.safetensors")
    assert run(resume=state_before) == 0
    assert (out / "cat.safetensors").is_file()


def test_twice_before_anything_is_saved(run, tmp_path, signal_at, capsys):
    signal_at(TrainingLoop, "_update", signal.SIGINT, signal.SIGINT)
    assert run() == 130
    assert said(capsys)[-1] == "ended at once; last good save: none"
    assert [path.name for path in tmp_path.glob("out/*")] == ["cat.html"]


@pytest.mark.parametrize("during", [(Samples, "_draw"), (Validation, "measure"), (Saves, "at_step")], ids=str)
def test_beside_the_steps_it_waits_for_the_next_one(run, photos, tmp_path, signal_at, capsys, during):
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1\n")
    drawn = {"sample_prompts": tmp_path / "p.txt", "sample_every_n_steps": 2}
    signal_at(*during, signal.SIGINT, only=2 if during[1] == "at_step" else 1)
    changes = {"max_train_steps": 9, "validation_split": 0.2, "validate_every_n_steps": 2, **drawn}
    assert run(**changes) == 130
    assert saved_step(tmp_path / "out") == 3
    assert (tmp_path / "out" / "cat-step00000003.safetensors").is_file()
    assert shlex.split(said(capsys)[-1])[-2:] == ["--resume", str(tmp_path / "out" / "cat-step00000003-state")]


def test_in_a_step_it_ends_before_what_takes_long(run, tmp_path, signal_at):
    """A shutdown waits for seconds; a picture may take longer."""
    (tmp_path / "p.txt").write_text("a cat --w 64 --h 64 --s 1 --d 1\n")
    signal_at(TrainingLoop, "_randoms", signal.SIGTERM, only=2)
    assert run(max_train_steps=9, sample_prompts=tmp_path / "p.txt", sample_every_n_steps=1) == 143
    assert saved_step(tmp_path / "out") == 2
    assert len(list((tmp_path / "out" / "sample").iterdir())) == 1


def test_it_counts_where_all_processes_know_of_it(run, tmp_path, signal_at):
    """One that comes after they have agreed would end this process alone, and the others wait for it for ever."""
    signal_at(TrainingLoop, "_agree_on", signal.SIGTERM, behind=True, only=1)
    assert run(max_train_steps=9) == 143
    assert saved_step(tmp_path / "out") == 2


@pytest.mark.skipif(not hasattr(signal, "SIGHUP"), reason="no such signal")
def test_a_terminal_that_is_closed_is_one_signal(run, tmp_path, signal_at):
    """The system and the shell send one each; a shutdown sends more."""
    signal_at(TrainingLoop, "_randoms", signal.SIGHUP, signal.SIGHUP, signal.SIGTERM, signal.SIGHUP, only=2)
    assert run(max_train_steps=9) == 129
    assert saved_step(tmp_path / "out") == 2


def test_under_nohup_a_closed_terminal_is_nothing(run, tmp_path, signal_at):
    before = signal.signal(signal.SIGTERM, signal.SIG_IGN)
    try:
        signal_at(TrainingLoop, "_randoms", signal.SIGTERM)
        assert run() == 0
    finally:
        signal.signal(signal.SIGTERM, before)


IN_ONE_OF_TWO = """
import os, signal
import train_network_deft as trainer
agree = trainer.TrainingLoop._agree_on
def and_signal(self, loss):
    found = agree(self, loss)
    if os.environ["RANK"] == "1" and self.position.step == 1:
        signal.raise_signal(signal.SIGTERM)
    return found
trainer.TrainingLoop._agree_on = and_signal
sys.exit(trainer.main(sys.argv[1:]) != 143)
"""


def test_a_signal_to_one_process_ends_both_at_the_same_step(model_folder, photos, tmp_path):
    in_two_processes(tmp_path, IN_ONE_OF_TWO, *arguments(model_folder, photos, tmp_path, max_train_steps=9))
    assert saved_step(tmp_path / "out") == 3
    told = [(tmp_path / f"errors{rank}.txt").read_text() for rank in range(2)]
    assert [text.count("--resume") for text in told] == [1, 0]


def test_without_a_state_what_is_saved_is_told():
    ended = Interrupted(signal.SIGINT, None, "last good save: a.safetensors")
    assert how_to_go_on(ended, []) == "interrupted; the state could not be saved; last good save: a.safetensors"


WORDS = ["--network_args", "a=x y", 'b="1"', "c=it's", "d=", "--output_dir", r"C:\my photos" + "\\", r"\\server\a\\",
         "e=a&b|c", "--resolution", "512,768", 'f=\\"', "$HOME", "*.png", "Katze\u00e9"]  # fmt: skip


def test_the_command_survives_a_posix_shell(monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["my tools/train_network_deft.py"])
    ended = Interrupted(signal.SIGINT, tmp_path / "a state", "")
    given = ["--resume", "old state", *WORDS, "--resume=older"]
    line = how_to_go_on(ended, given, windows=False).split("\n")[1]
    expected = ["python", "my tools/train_network_deft.py", *WORDS, "--resume", str(tmp_path / "a state")]
    assert shlex.split(line) == expected


def test_the_command_survives_windows(monkeypatch):
    monkeypatch.setattr(sys, "argv", [r"C:\my tools\train_network_deft.py"])
    ended = Interrupted(signal.SIGINT, Path("a state"), "")
    line = how_to_go_on(ended, WORDS, windows=True).split("\n")[1]
    expected = ["python", r"C:\my tools\train_network_deft.py", *WORDS, "--resume", "a state"]
    assert arguments_of_windows(line) == expected
    assert '"e=a&b|c"' in line  # what cmd and PowerShell would take for their own
    assert '"512,768"' in line


def arguments_of_windows(line: str) -> list[str]:
    """By the rules of Microsoft's C runtime: 2n backslashes before a quote are n, one more makes the quote a letter;
    by Windows itself, where there is one."""
    if os.name == "nt":
        number = ctypes.c_int()
        parse = ctypes.windll.shell32.CommandLineToArgvW  # type: ignore[attr-defined]
        parse.restype = ctypes.POINTER(ctypes.c_wchar_p)
        return list(parse(line, ctypes.byref(number))[: number.value])
    found, word, quoted, begun, i = [], "", False, False, 0
    while i < len(line):
        slashes = len(line[i:]) - len(line[i:].lstrip("\\"))
        i += slashes
        letter = line[i : i + 1]
        begun = begun or bool(slashes)
        if letter == '"':
            word += "\\" * (slashes // 2) + '"' * (slashes % 2)
            quoted ^= slashes % 2 == 0
            begun = True
        else:
            word += "\\" * slashes
            if letter == " " and not quoted:
                found += [word] if begun else []
                word, begun = "", False
            elif letter:
                word, begun = word + letter, True
        i += 1
    return [*found, word] if begun else found


LAUNCHED = {
    "accelerate": ({}, "accelerate launch --multi_gpu --num_processes 4"),
    "torchrun on CPUs": (
        {"ACCELERATE_USE_CPU": "True"},
        "env ACCELERATE_USE_CPU=true torchrun --nproc_per_node 4",
    ),
    "two machines": (
        {"LOCAL_WORLD_SIZE": "2", "GROUP_RANK": "1", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
        "accelerate launch --multi_gpu --num_processes 4 --num_machines 2 --machine_rank 1 --main_process_ip 10.0.0.1 "
        "--main_process_port 29500",
    ),
}


@pytest.mark.parametrize("how", LAUNCHED)
def test_the_command_starts_as_many_processes(monkeypatch, how):
    more, begins = LAUNCHED[how]
    for name, value in {"WORLD_SIZE": "4", "LOCAL_WORLD_SIZE": "4", **more}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(sys, "argv", ["train.py"])
    line = how_to_go_on(Interrupted(signal.SIGINT, Path("s"), ""), ["--seed", "1"], windows=False).split("\n")[1]
    assert line == f"{begins} train.py --seed 1 --resume s"
