"""S1: handmade hostile inputs, each refused with a reason and a next step, or harmless and then right."""

import pytest

from tests.hostile.figures import Figures
from tests.hostile.handmade import run_case
from tests.hostile.handmade_configs import CONFIGS
from tests.hostile.handmade_paths import PATHS
from tests.hostile.handmade_pickles import PICKLES
from tests.hostile.handmade_safetensors import SAFETENSORS
from tests.hostile.handmade_texts import TEXTS

CASES = {
    f"{group}: {case.name}": case
    for group, cases in {
        "safetensors": SAFETENSORS, "config": CONFIGS, "bin": PICKLES, "path": PATHS, "text": TEXTS,
    }.items()
    for case in cases
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_a_hostile_input_is_refused_or_harmless(name, tmp_path):
    run_case(CASES[name], tmp_path, Figures("S1"))


def test_there_are_as_many_cases_as_the_plan_says():
    counts = [len(group) for group in (SAFETENSORS, CONFIGS, PICKLES, PATHS, TEXTS)]
    assert counts == [34, 24, 8, 16, 10]
    assert len(CASES) == 92
