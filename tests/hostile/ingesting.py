"""Adapters taken into an index, as ``compose index add`` takes them: refusals become exceptions again."""

from __future__ import annotations

from pathlib import Path

from compose.errors import AdapterFormatError
from compose.hub_index.ingest import Options, Outcome, add_tree
from compose.hub_index.search import Filters
from compose.hub_index.store import Index


def add(folder: Path, *, home: Path | None = None, allow_pickle: bool = False) -> Outcome:
    """Take a folder into a new index in ``home``, or beside it, and return what became of it.

    Raises:
        AdapterFormatError: It is refused.
    """
    home = folder.parent / f"{folder.name}-index" if home is None else home
    home.mkdir(exist_ok=True)
    with Index.open(home / "hub.db", create=True) as index:
        outcomes = add_tree(index, folder, Options(allow_pickle=allow_pickle))
        known = [one.name for one in index.ls(Filters(status="any"))]
    if refused := [outcome for outcome in outcomes if outcome.state == "refused"]:
        assert known == [], f"refused, and in the index: {known}"
        raise AdapterFormatError("; ".join(reason for outcome in refused for reason in outcome.reasons))
    assert known == [outcomes[0].name]
    return outcomes[0]


def add_pickled(folder: Path) -> Outcome:
    """Take a folder with pickled weights into an index, with ``--allow-pickle``."""
    return add(folder, allow_pickle=True)
