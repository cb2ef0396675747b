"""S4: nothing that an adapter, a base model, an encoder or a recipe brings along is run."""

import subprocess
import sys

import pytest

from tests.hostile.audit_hook import GADGETS
from tests.hostile.handmade_pickles import MARK
from tests.hostile.process import ENTRY, run_suite


def test_20_canaries_stay_silent(tmpfs):
    figures = run_suite("s4", 20, tmpfs)
    assert figures.signals == 0
    assert figures.other == []
    assert (figures.cases, figures.refused) == (20, 16)  # four are harmless: fields and files that nothing looks at


@pytest.fixture(scope="module")
def heard(tmp_path_factory):
    """What the hook hears of every gadget where nobody takes care: gadget -> events."""
    folder = tmp_path_factory.mktemp("gadgets")
    done = subprocess.run(
        [sys.executable, "-P", str(ENTRY), "--gadgets"], cwd=folder, capture_output=True, text=True, check=True
    )
    lines = [line.split("\t") for line in done.stdout.splitlines() if "\t" in line]
    return dict(lines), folder


@pytest.mark.parametrize("gadget", sorted(GADGETS))
def test_the_hook_hears_a_gadget_that_is_loaded(gadget, heard):
    events, folder = heard
    assert events[gadget] not in ("", "{}")
    assert (folder / MARK).exists()
