"""A training that is ended, by a state, a signal or a kill, and goes on: the same file as undisturbed."""

from __future__ import annotations

import json
import os
import random
import re
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from library.training import state
from library.training.record import Record
from networks.deft_config import DeftError
from tests.conftest import ROOT, arguments, in_two_processes
from tests.processes import EXACT, code_of, start

pytestmark = pytest.mark.usefixtures("fresh_accelerator")

SCRIPT = str(ROOT / "train_network_deft.py")


def train_of_34_steps(model_folder, photos, folder, **changes) -> list[str]:
    """Five pictures, of which an epoch of 34 batches is made, with dropout, so that layers draw random numbers too."""
    for number, path in zip((7, 7, 7, 7, 6), sorted(photos.glob("*.jpg")), strict=True):
        target = photos.parent / f"{number}_sks cat {path.stem}"
        target.mkdir(exist_ok=True)
        path.rename(target / path.name)
    return arguments(model_folder, photos, folder, **options(**changes))


def options(**changes):
    return {"learning_rate": 1e-3, "network_dropout": 0.1, "lr_scheduler": "cosine", "max_train_steps": 12} | changes


def run(arguments: list[str], anew: bool = False) -> None:
    """In a process of its own.

    :param anew: with a hash seed of its own, too
    """
    with tempfile.TemporaryDirectory() as folder:
        told = Path(folder) / "errors.txt"
        words = [SCRIPT, *arguments]
        if anew:
            with open(told, "w") as errors:
                code = subprocess.run([sys.executable, *words], cwd=ROOT, env=EXACT, stderr=errors).returncode
        else:
            code = code_of(start(words, errors=told))
        assert code == 0, told.read_text(errors="replace")[-3000:]


def tensors(folder: Path, name: str = "cat") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def assert_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    assert [key for key in one if not torch.equal(one[key], other[key])] == []


BITS_8 = ("AdamW8bit", "PagedAdamW8bit", "PagedAdamW32bit", "PagedLion8bit", "SGDNesterov8bit")
OPTIMIZERS = {
    "AdamW": {},
    "Prodigy": {"optimizer_type": "Prodigy", "learning_rate": 1, "optimizer_args": ["use_bias_correction=True"]},
    "AdamWScheduleFree": {"optimizer_type": "AdamWScheduleFree", "lr_scheduler": "constant"},
    "AdamW fused": {"optimizer_args": ["fused=True"]},  # whose losses are read late
    **{name: {"optimizer_type": name, "network_dim": 16, "network_args": ["conv_dim=16"]} for name in BITS_8},
}


@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_resumed_in_the_middle_of_an_epoch_bit_for_bit(model_folder, photos, tmp_path, name):
    if name in BITS_8:
        pytest.importorskip("bitsandbytes", minversion="0.50", reason="older ones need CUDA for everything")
    out = tmp_path / "out"
    given = train_of_34_steps(model_folder, photos, tmp_path, save_every_n_steps=7, save_state=True, **OPTIMIZERS[name])
    run(given)
    undisturbed = tensors(out)
    assert json.loads((out / "cat-step00000007-state" / state.FILE).read_text())["batches"] == 7
    (out / "cat.safetensors").unlink()
    run([*given, "--resume", str(out / "cat-step00000007-state")], anew=name == "AdamW")
    assert_equal(tensors(out), undisturbed)


def test_resumed_across_epochs_with_accumulated_batches_and_a_last_epoch_that_is_not_whole(
    model_folder, photos, tmp_path
):
    """Five pictures in batches of two, two batches a step: 2 steps an epoch, the second of one picture."""
    changes = options(train_batch_size=2, gradient_accumulation_steps=2, save_every_n_epochs=2, save_state=True)
    given = arguments(model_folder, photos, tmp_path, **changes | {"max_train_steps": 7})
    run(given)
    undisturbed, out = tensors(tmp_path / "out"), tmp_path / "out"
    assert json.loads((out / "cat-000002-state" / state.FILE).read_text())["step"] == 4
    run([*given, "--resume", str(out / "cat-000002-state")])
    assert_equal(tensors(out), undisturbed)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
@pytest.mark.skipif(os.name == "nt", reason="signals are sent otherwise there")
def test_a_signal_saves_and_prints_the_command_that_goes_on(model_folder, photos, tmp_path, number, code):
    given = train_of_34_steps(model_folder, photos, tmp_path, max_train_steps=40)
    run([*given, "--output_name", "undisturbed"])
    told = tmp_path / "told.txt"
    child = start([SCRIPT, *given], errors=told)
    wait_until(lambda: told.exists() and "avr_loss" in told.read_text())
    os.kill(child.pid, number)
    assert code_of(child, 60) == code
    last = told.read_text().strip().splitlines()[-1]
    (folder,) = (tmp_path / "out").glob("cat-step*-state")
    assert (tmp_path / "out" / f"{folder.name.removesuffix('-state')}.safetensors").is_file()
    words = shlex.split(last)
    assert words[-2:] == ["--resume", str(folder)]
    subprocess.run([sys.executable, *words[1:]], cwd=ROOT, env=EXACT, check=True, capture_output=True)
    assert_equal(tensors(tmp_path / "out"), tensors(tmp_path / "out", "undisturbed"))


def wait_until(condition, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


KILLS = int(os.environ.get("DEFT_KILLS", "3"))  # docs/trainer.md: 20 were tried


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL there")
def test_killed_at_random_moments_every_file_is_whole_and_every_state_goes_on(model_folder, photos, tmp_path):
    out, rng = tmp_path / "out", random.Random(0)
    saving = {"save_every_n_steps": 1, "save_state": True, "save_last_n_steps": 3, "network_dim": 16}
    given = train_of_34_steps(model_folder, photos, tmp_path, **saving)
    run([*given, "--output_name", "undisturbed"])
    for _ in range(KILLS):
        for path in out.glob("cat*"):
            subprocess.run(["rm", "-r", str(path)], check=True)
        child = start([SCRIPT, *given])
        wait_until(lambda: any(out.glob("cat-step*-state")))
        time.sleep(rng.uniform(0, 2))
        child.kill()
        child.join()
        for file in out.glob("cat*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(file).values())
        states = sorted(folder for folder in out.iterdir() if re.fullmatch(r"cat-step\d+-state", folder.name))
        assert states
        (out / "cat.safetensors").unlink(missing_ok=True)
        run([*given, "--resume", str(states[-1])])
        assert_equal(tensors(out), tensors(out, "undisturbed"))


SAVE_AND_GO_ON = """
import sys
import train_network_deft as trainer
sys.exit(trainer.main(sys.argv[1:]))
"""


def test_resumed_in_two_processes(model_folder, photos, tmp_path, monkeypatch):
    """Nine batches of one epoch in two processes: five each, the last one filled up."""
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    out, extra = tmp_path / "out", {"mixed_precision": "no", "save_every_n_steps": 3, "save_state": True}
    given = arguments(model_folder, photos, tmp_path, **options(**extra, max_train_steps=7))
    in_two_processes(tmp_path, SAVE_AND_GO_ON, *given)
    undisturbed = tensors(out)
    in_two_processes(tmp_path, SAVE_AND_GO_ON, *given, "--resume", str(out / "cat-step00000003-state"))
    assert_equal(tensors(out), undisturbed)


RECORD = """
import json, os, sys
import train_network_deft as trainer
losses = []
before = trainer.TrainingLoop._after_step
def and_note(self):
    before(self)
    batches = list(self.recent_losses)[-self.options.gradient_accumulation_steps :]
    losses.append(sum(batches) / len(batches))
trainer.TrainingLoop._after_step = and_note
code = trainer.main(sys.argv[2:])
if os.environ.get("RANK", "0") == "0":
    json.dump(losses, open(sys.argv[1], "w"))
sys.exit(code)
"""


def test_one_process_and_two_have_the_same_losses(model_folder, photos, tmp_path):
    """For the same global batch, of one after the other or side by side; four pictures, so that all steps have two."""
    next(photos.glob("*_5.jpg")).unlink()
    common = {"learning_rate": 1e-3, "max_train_steps": 6, "noise_offset": 0.05}
    given = {
        number: arguments(
            model_folder, photos, tmp_path, **common, gradient_accumulation_steps=2 // number, output_name=f"{number}"
        )
        for number in (1, 2)
    }
    script = tmp_path / "one.py"
    script.write_text(f"import sys\nsys.path.insert(0, {str(ROOT)!r})\n{RECORD}", encoding="utf-8")
    assert code_of(start([str(script), str(tmp_path / "1.json"), *given[1]])) == 0
    in_two_processes(tmp_path, RECORD, str(tmp_path / "2.json"), *given[2])
    one, two = (json.loads((tmp_path / f"{number}.json").read_text()) for number in (1, 2))
    assert len(one) == 6
    assert one == pytest.approx(two, rel=1e-5)


def test_files_of_old_saves_go(model_folder, photos, tmp_path):
    import train_network_deft

    steps = {"max_train_steps": 13, "save_every_n_steps": 3, "save_last_n_steps": 6, "save_last_n_steps_state": 3}
    epochs = {"save_every_n_epochs": 1, "save_last_n_epochs": 1, "save_state": True}
    assert train_network_deft.main(arguments(model_folder, photos, tmp_path, **steps, **epochs)) == 0
    names = sorted(
        path.name.removeprefix("cat").removesuffix(".safetensors")
        for path in (tmp_path / "out").iterdir()
        if path.suffix != ".html"
    )
    assert names == ["", "-000002", "-000002-state", "-state", "-step00000006", "-step00000009", "-step00000009-state",
                     "-step00000012", "-step00000012-state"]  # fmt: skip


@pytest.mark.parametrize("broken", ["no folder", "a file of sd-scripts", "other network"])
def test_states_that_do_not_fit_are_refused_in_a_line(model_folder, photos, tmp_path, capsys, broken):
    import train_network_deft

    changes = {"max_train_steps": 2, "save_every_n_steps": 1, "save_state": True}
    assert train_network_deft.main(arguments(model_folder, photos, tmp_path, **changes)) == 0
    folder = tmp_path / "out" / "cat-step00000001-state"
    if broken == "no folder":
        folder = tmp_path / "nowhere"
    elif broken == "a file of sd-scripts":
        (folder / state.FILE).write_text('{"current_epoch": 1, "current_step": 1}')
    else:
        changes["network_dim"] = 8
    capsys.readouterr()
    assert train_network_deft.main(arguments(model_folder, photos, tmp_path, **changes, resume=folder)) == 2
    message = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]
    assert len(message) == 1
    assert "--resume" in message[0]


@pytest.mark.skipif(os.name == "nt", reason="no limit of file sizes there")
def test_a_state_that_cannot_be_written_leaves_the_one_before(tmp_path):
    """Files that end at 64 KiB stand for a full disk: for safetensors, for torch, and for Python."""
    import resource

    from accelerate import Accelerator

    accelerator, folder = Accelerator(cpu=True), tmp_path / "a-state"
    setting = state.Setting(1, 1, 5, "1", "a hash", 1, "torch.optim.AdamW")
    large, small = torch.nn.Linear(200, 200), torch.nn.Linear(2, 2)
    accelerator.prepare_model(small)
    optimizer = accelerator.prepare(torch.optim.AdamW(small.parameters()))
    state.write(folder, state.Position(3, 1, 3, [0.5]), setting, Record(), accelerator)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for part in ("model", "optimizer", "position"):
        if part == "model":
            accelerator._models = [large]
        elif part == "optimizer":
            accelerator._models = [small]
            optimizer.state[small.weight] = {"large": large.weight.detach()}
        else:
            optimizer.state.clear()
        position = state.Position(4, 1, 4, [0.5] * (10000 if part == "position" else 1))
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, hard))
        try:
            with pytest.raises(DeftError, match="a-state: not saved"):
                state.write(folder, position, setting, Record(), accelerator)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert state.read(str(folder)) == (state.Position(3, 1, 3, [0.5]), setting)
        assert [path.name for path in tmp_path.iterdir()] == ["a-state"]


def test_a_training_that_ended_within_an_epoch_goes_on_as_if_it_had_been_longer(model_folder, photos, tmp_path):
    """Five steps of an epoch of eight, and seven more."""
    next(photos.glob("*_5.jpg")).unlink()
    photos.rename(photos.parent / "2_sks cat")
    given = arguments(model_folder, photos, tmp_path, learning_rate=1e-3, max_train_steps=12, output_name="long")
    run(given)
    short = [*given, "--output_name", "cat", "--max_train_steps", "5", "--save_state_on_train_end"]
    run(short)
    run([*short, "--max_train_steps", "12", "--resume", str(tmp_path / "out" / "cat-state")])
    assert_equal(tensors(tmp_path / "out"), tensors(tmp_path / "out", "long"))


def trained(model_folder, photos, tmp_path, **changes) -> int:
    import train_network_deft

    return train_network_deft.main(arguments(model_folder, photos, tmp_path, **changes))


def errors(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if line.startswith("error")]


def test_what_a_state_decides_and_what_is_new_is_told(model_folder, photos, tmp_path, capsys, caplog):
    common = {"learning_rate": 1e-3, "network_dim": 4}
    assert trained(model_folder, photos, tmp_path, **common, save_state_on_train_end=True) == 0
    common |= {"resume": tmp_path / "out" / "cat-state", "max_train_steps": 4}
    caplog.clear()
    assert trained(model_folder, photos, tmp_path, **common) == 0
    assert not [line for line in caplog.messages if "->" in line]
    common["learning_rate"] = 1e-4
    assert (
        trained(model_folder, photos, tmp_path, **common, network_alpha=2, lr_scheduler="linear", output_name="other")
        == 0
    )
    told = [line.split("-state: ")[1] for line in caplog.messages if "->" in line]
    assert told == ["network_alpha 1.0 -> 2.0, lr_scheduler constant -> linear: taking effect from here on",
                    "learning_rate 0.001 -> 0.0001: without effect, the state's is kept"]  # fmt: skip
    capsys.readouterr()
    common["pretrained_model_name_or_path"] = "nowhere"  # told before it is loaded
    assert trained(model_folder, photos, tmp_path, **common, optimizer_type="SGDNesterov") == 2
    (line,) = errors(capsys)
    assert "saved with the optimizer torch.optim.AdamW, not torch.optim.SGD" in line


@pytest.mark.parametrize("file", ["model.safetensors", "optimizer.bin", "custom_checkpoint_0.pkl"])
def test_a_file_of_a_state_that_is_cut_off_is_named(model_folder, photos, tmp_path, capsys, file):
    assert trained(model_folder, photos, tmp_path, max_train_steps=1, save_state_on_train_end=True) == 0
    folder = tmp_path / "out" / "cat-state"
    (folder / file).write_bytes((folder / file).read_bytes()[:-100])
    assert trained(model_folder, photos, tmp_path, max_train_steps=2, resume=folder) == 2
    (line,) = errors(capsys)
    assert f"--resume {folder / file}: cannot be read" in line


@pytest.mark.parametrize("length", [{"max_train_steps": 3}, {"max_train_epochs": 1}])
def test_a_state_with_nothing_left_to_train(model_folder, photos, tmp_path, capsys, length):
    """Three pictures, so that three steps are an epoch; without a file of that state, it is still to be made."""
    for path in photos.glob("*_[45].*"):
        path.unlink()
    option, out = f"--{next(iter(length))} {next(iter(length.values()))}", tmp_path / "out"
    given = {**length, "resume": out / "cat-state"}
    assert trained(model_folder, photos, tmp_path, max_train_steps=3, save_state_on_train_end=True) == 0
    undisturbed = tensors(out)
    assert trained(model_folder, photos, tmp_path, **given) == 2
    (line,) = errors(capsys)
    assert line.startswith(f"error: {option}")
    assert "nothing is left to train" in line
    assert "give more than 3 steps" in line
    os.utime(out / "cat.safetensors", (0, 0))  # as if it were there from before the state
    assert trained(model_folder, photos, tmp_path, **given) == 0
    assert_equal(tensors(out), undisturbed)
    (out / "cat.safetensors").unlink()
    assert trained(model_folder, photos, tmp_path, **given) == 0
    assert_equal(tensors(out), undisturbed)
    assert trained(model_folder, photos, tmp_path, max_train_steps=4, save_state_on_train_end=True) == 0
    assert trained(model_folder, photos, tmp_path, **given) == 2
    (line,) = errors(capsys)
    assert line.startswith(f"error: {option}")
    assert "was saved at step 4, beyond 3" in line
