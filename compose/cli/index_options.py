"""What the subcommands of ``compose index`` share: the file, and how adapters are shown."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compose.cli.options import INPUTS
from compose.errors import HubIndexError
from compose.report.plain import NONE

if TYPE_CHECKING:
    from compose.hub_index.records import AdapterRecord, AdapterSummary
    from compose.hub_index.store import Index

SCHEMA = 1
"""Version of the JSON that the subcommands print."""
REFUSED = 3
"""Exit code: an adapter was refused."""
FAILED = 1
"""Exit code: files are not what the index knows, or the index is damaged."""
DANGEROUS = "Dangerous options"
FILTERS = "Filters"

IndexPath = Annotated[
    Path | None,
    typer.Option(
        "--index",
        metavar="FILE",
        envvar="COMPOSE_INDEX",
        show_default=False,
        help="The index; adapters.db in your data folder by default.",
        rich_help_panel=INPUTS,
    ),
]
BaseFilter = Annotated[
    str | None,
    typer.Option("--base", metavar="MODEL", help="Base model: name or fingerprint.", rich_help_panel=FILTERS),
]
Task = Annotated[
    str | None,
    typer.Option("--task", metavar="NAME", help="A tag, a data set or a task with a score.", rich_help_panel=FILTERS),
]
Rank = Annotated[
    str | None,
    typer.Option("--rank", metavar="R|MIN-MAX", help="All its ranks lie in this range.", rich_help_panel=FILTERS),
]
License = Annotated[
    str | None, typer.Option("--license", metavar="NAME", help="As the card says it.", rich_help_panel=FILTERS)
]
Score = Annotated[
    str | None,
    typer.Option(
        "--score", metavar="TASK:METRIC>=VALUE", help="It has a score of at least so much.", rich_help_panel=FILTERS
    ),
]
Status = Annotated[str, typer.Option("--status", help="active, quarantined, removed or any.", rich_help_panel=FILTERS)]
Names = Annotated[
    list[str] | None, typer.Argument(metavar="[NAME]...", help="Adapters; all by default.", show_default=False)
]


def index_path(given: Path | None) -> Path:
    """Return the file that is meant."""
    from compose.hub_index.place import default_index

    return default_index() if given is None else given.expanduser()


def open_index(given: Path | None, *, write: bool = False, create: bool = False) -> Index:
    """Open the index that is meant.

    Raises:
        HubIndexError: There is none, or it cannot be opened.
    """
    from compose.hub_index.store import Index

    path = index_path(given)
    if not create and not path.exists():
        raise HubIndexError(f"{path}: no index there; make one with compose index add PATH, or give another --index")
    if create:
        path.parent.mkdir(parents=True, exist_ok=True)
    return Index.open(path, create=create, readonly=not write)


def filters(
    base: str | None, task: str | None, rank: str | None, licence: str | None, score: str | None, status: str
) -> dict[str, Any]:
    """Return the options as arguments of `compose.hub_index.search.Filters` and of a query.

    Raises:
        HubIndexError: A rank or a score that cannot be read.
    """
    return {
        "base": base,
        "task": task,
        "rank": _rank(rank),
        "license": licence,
        "min_score": _score(score),
        "status": status,
    }


def summary_row(one: AdapterSummary) -> list[str]:
    """Return the cells of an adapter in a list; see `SUMMARY_COLUMNS`."""
    ranks = str(one.rank_max) if one.rank_min == one.rank_max else f"{one.rank_min}-{one.rank_max}"
    about = one.title or one.summary.partition(". ")[0]
    return [
        one.name,
        one.base_id or NONE,
        one.peft_type or NONE,
        ranks if one.rank_max else NONE,
        one.license or NONE,
        one.status if one.path else f"{one.status}, no files",
        about[:60],
    ]


SUMMARY_COLUMNS = ("adapter", "base", "kind", ">rank", "licence", "status", "about")


def summary_json(one: AdapterSummary | AdapterRecord) -> dict[str, Any]:
    """Return an adapter's fields as JSON values; vectors are left out, only what they are is told."""
    found = asdict(one)
    found["sha256"] = one.sha256
    if "embeddings" in found:
        known = ("encoder_id", "encoder_sha256", "prompt", "kind", "dim")
        vectors = one.embeddings  # type: ignore[union-attr]
        found["embeddings"] = [{key: getattr(vector, key) for key in known} for vector in vectors]
    return {key: list(value) if isinstance(value, tuple) else value for key, value in found.items()}


def counted(words: Sequence[str]) -> str:
    """Return ``2 active, 1 refused`` for states in their order of first sight."""
    return ", ".join(f"{sum(word == one for word in words)} {one}" for one in dict.fromkeys(words)) or "none"


def _rank(text: str | None) -> tuple[int, int] | None:
    if text is None:
        return None
    low, dash, high = text.partition("-")
    if not low.isdecimal() or (dash and not high.isdecimal()):
        raise HubIndexError(f"--rank must be a number or LOWEST-HIGHEST, such as 8 or 4-16, got {text!r:.80}")
    return int(low), int(high) if dash else int(low)


def _score(text: str | None) -> tuple[str, str, float] | None:
    if text is None:
        return None
    name, sign, value = text.partition(">=")
    task, colon, metric = name.rpartition(":")
    try:
        number = float(value)
    except ValueError:
        number = None
    if not (sign and colon and task.strip() and metric.strip()) or number is None:
        raise HubIndexError(f"--score must be TASK:METRIC>=VALUE, such as 'gsm8k:exact_match>=0.4', got {text!r:.80}")
    return task.strip(), metric.strip(), number
