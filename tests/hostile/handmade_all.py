"""All 92 handmade cases, by group."""

from __future__ import annotations

from pathlib import Path

from tests.hostile.figures import Figures
from tests.hostile.handmade import Case, run_case
from tests.hostile.handmade_configs import CONFIGS
from tests.hostile.handmade_paths import PATHS
from tests.hostile.handmade_pickles import PICKLES
from tests.hostile.handmade_safetensors import SAFETENSORS
from tests.hostile.handmade_texts import TEXTS

GROUPS: dict[str, list[Case]] = {
    "safetensors": SAFETENSORS,
    "config": CONFIGS,
    "bin": PICKLES,
    "path": PATHS,
    "text": TEXTS,
}
CASES = {f"{group}: {case.name}": case for group, cases in GROUPS.items() for case in cases}


def run(folder: Path) -> Figures:
    """Run all of them; one that does not end as it must counts among the other exceptions."""
    figures = Figures("S1")
    for number, (name, case) in enumerate(CASES.items()):
        place = folder / str(number)
        place.mkdir()
        try:
            run_case(case, place, figures)
        except AssertionError as error:
            figures.other.append(f"{name}: {error}")
    return figures
