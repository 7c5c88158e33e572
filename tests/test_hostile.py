"""Damaged files: every reader says in one line what is wrong. `python -m tests.fuzz` reads as many as one likes."""

from __future__ import annotations

import collections

import pytest

from tests import fuzz


@pytest.mark.parametrize("part", range(4))
def test_damaged_files_are_read_or_refused_in_one_line(part, tmp_path):
    counted = collections.Counter(fuzz.outcomes(100 * part, 100, tmp_path))
    assert all(counted[reader, "refused"] for reader in fuzz.readers())
    assert counted["formats", "read"] > 0
    assert counted["checkpoint", "read"] > 0
