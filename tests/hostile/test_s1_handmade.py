"""S1: handmade hostile inputs, each refused with a reason and a next step, or harmless and then right."""

import pytest

from tests.hostile.figures import Figures
from tests.hostile.handmade import run_case
from tests.hostile.handmade_all import CASES, GROUPS


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_input_is_refused_or_harmless(name, tmp_path):
    run_case(CASES[name], tmp_path, Figures("S1"))


def test_there_are_as_many_cases_as_the_plan_says():
    assert {group: len(cases) for group, cases in GROUPS.items()} == {
        "safetensors": 34, "config": 24, "bin": 8, "path": 16, "text": 10,
    }  # fmt: skip
    assert len(CASES) == 92
