"""S7: inputs that announce more memory than there is are refused before it is asked for, under a limit of 2 GiB."""

from tests.hostile.bombs import BOMBS, MOST_BYTES
from tests.hostile.process import run_suite


def test_twelve_bombs_are_refused_under_a_limit(tmpfs):
    figures = run_suite("s7", len(BOMBS), tmpfs)
    assert figures.signals == 0
    assert figures.other == []
    assert (figures.cases, figures.refused) == (12, 12)
    assert figures.extra_bytes < MOST_BYTES
