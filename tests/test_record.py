"""What a training remembers of itself: thin where it is long, whole where it goes on."""

from __future__ import annotations

import math

from hypothesis import given
from hypothesis import strategies as st

import train_network_deft
from library.training.record import POINTS, Curve, Drawn, Record, Saved
from tests.conftest import arguments


@given(st.integers(1, 20 * POINTS))
def test_a_long_curve_is_kept_evenly_and_to_its_end(steps):
    curve = Curve()
    for step in range(1, steps + 1):
        curve.add(step, step / 2)
    assert len(curve.steps) < 2 * POINTS
    assert len(curve.steps) >= min(steps, POINTS) - 1
    assert steps - curve.steps[-1] < curve.every
    assert {b - a for a, b in zip(curve.steps, curve.steps[1:], strict=False)} <= {curve.every}
    assert curve.values == [step / 2 for step in curve.steps]


def test_what_is_not_finite_is_no_point_of_a_curve():
    record = Record()
    record.log({"loss": math.nan, "rate": 1.0, "size": math.inf}, 1)
    assert list(record.curves) == ["rate"]


def test_a_record_comes_back_and_a_damaged_one_is_told(tmp_path, caplog):
    record = Record(samples=[Drawn("sample/ä.png", 3, 0)])
    record.log({"loss/average": 0.1}, 3)
    for step in (3, 4, 3):
        record.saved(Saved(f"cat-{step}.safetensors", step, 1))
    record.write(tmp_path)
    assert Record.read(tmp_path) == record
    assert [one.step for one in record.files] == [4, 3]
    for content in ("", "[]", "{}", '{"curves": 3, "files": [], "samples": []}', "[" * 100_000):
        (tmp_path / "record.json").write_text(content)
        caplog.clear()
        assert Record.read(tmp_path) == Record()
        assert "record.json" in caplog.text


def test_a_training_that_goes_on_has_the_whole_record(model_folder, photos, tmp_path, fresh_accelerator):
    changes = {"max_train_steps": 2, "save_every_n_steps": 1, "save_state": True}
    given = arguments(model_folder, photos, tmp_path, **changes)
    assert train_network_deft.main(given) == 0
    whole = Record.read(tmp_path / "out" / "cat-state")
    assert whole.curves["loss/current"].steps == [1, 2]
    state = tmp_path / "out" / "cat-step00000001-state"
    assert [one.name for one in Record.read(state).files] == ["cat-step00000001.safetensors"]
    assert train_network_deft.main([*given, "--resume", str(state), "--output_name", "on"]) == 0
    again = Record.read(tmp_path / "out" / "on-state")
    assert again.curves["loss/current"].steps == [1, 2]
