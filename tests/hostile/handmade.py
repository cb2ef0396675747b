"""What a handmade case is, and the one way all of them are run."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from compose.bank import Bank
from compose.errors import ComposeError
from tests.hostile.figures import Figures, snapshot
from tests.hostile.loading import load

MOST_SECONDS = 1.0
MOST_BYTES = 64 * 2**20

_STEP = re.compile(
    r"\b(again|allowed|correct|choose|convert|fix|give|must|only|pass|put|quotes|rename|retrain|run|save|separate|supported|"
    r"target the|use|write)\b|more than the limit",
    re.IGNORECASE,
)


class Case(NamedTuple):
    """One handmade input.

    Attributes:
        name: What is wrong with it.
        make: Writes it into an empty folder and returns what is to be opened.
        reason: What the refusal must say (a regular expression); empty where the input is harmless and accepted.
        run: Opens it.
        check: Of what an accepted input gave, that it is right.
    """

    name: str
    make: Callable[[Path], Path]
    reason: str
    run: Callable[[Path], object] = load
    check: Callable[[Bank], None] | None = None


def run_case(case: Case, folder: Path, figures: Figures) -> None:
    """Run a case in an empty folder and raise an AssertionError where it is not refused, or accepted, as it must be.

    The refusal is a `ComposeError` that says why and what is allowed or to do next; a case takes at most
    `MOST_SECONDS` of CPU time and `MOST_BYTES`; no file is made, changed or removed.
    """
    path = case.make(folder)
    before = snapshot(folder)
    single, found = Figures(case.name), []
    error = single.case(case.name, lambda: found.append(case.run(path)), memory=True)
    figures.add(single)
    assert snapshot(folder) == before, f"{case.name}: files changed"
    assert not single.other, single.other
    if case.reason:
        assert isinstance(error, ComposeError), f"{case.name}: accepted"
        assert re.search(case.reason, str(error)), f"{case.name}: {error}"
        assert _STEP.search(str(error)), f"{case.name}: no next step in {error}"
        assert len(str(error)) < 4000, f"{case.name}: a message of {len(str(error))} characters"
    else:
        assert error is None, f"{case.name}: {error}"
        if case.check is not None:
            (bank,) = found
            assert isinstance(bank, Bank)
            case.check(bank)
    assert single.cpu_s <= MOST_SECONDS, f"{case.name}: {single.cpu_s:.2f} s"
    assert single.extra_bytes <= MOST_BYTES, f"{case.name}: {single.extra_bytes / 2**20:.0f} MiB"
