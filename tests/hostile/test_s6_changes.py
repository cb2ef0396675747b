"""S6: a file that changes while it is loaded ends no process, and what is loaded is what was hashed."""

import pytest

from tests.hostile.adapters import WEIGHTS_NAME, files_of, lora_tensors, write
from tests.hostile.changes import ACTIONS, MOMENTS, REPEATS, check_hash
from tests.hostile.loading import load
from tests.hostile.process import run_suite


def test_files_that_change_at_four_moments(tmpfs):
    figures = run_suite("s6", REPEATS, tmpfs)
    assert figures.signals == 0
    assert figures.other == []
    assert figures.cases == len(ACTIONS) * len(MOMENTS) * REPEATS == 800
    assert figures.refused >= 150  # what is cut, gone or under another header before it is read whole
    assert figures.accepted >= 400


def test_the_check_sees_a_value_that_is_not_the_hashed_one(tmpfs):
    files = files_of(lora_tensors())
    bank = load(write(tmpfs / "x", files))
    adapter = bank["x"]
    check_hash(adapter, files[WEIGHTS_NAME])
    adapter.targets["m.layers.0.q"].a[0, 0] += 1
    with pytest.raises(AssertionError, match="values and recorded hash differ"):
        check_hash(adapter, files[WEIGHTS_NAME])
