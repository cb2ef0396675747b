"""Whether the files of an index are still those it knows: every file hashed again and compared with the record."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple

from compose.errors import HubIndexError
from compose.hub_index.durable import file_sha256
from compose.hub_index.records import AdapterSummary
from compose.hub_index.search import Filters

if TYPE_CHECKING:
    from compose.hub_index.store import Index

_FILES = {"compeft": ("adapter_model.compeft.safetensors", "compeft_config.json")}
_PEFT_FILES = ("adapter_model.safetensors", "adapter_config.json")


class Verified(NamedTuple):
    """One adapter after its files were hashed again.

    Attributes:
        name: Of the adapter.
        state: ``"ok"``, ``"changed"``, ``"missing"``, or ``"description"``: there are no files to hash.
        detail: Which file, and what is wrong with it.
    """

    name: str
    state: Literal["ok", "changed", "missing", "description"]
    detail: str = ""


def verify(
    index: Index, names: Iterable[str] | None = None, *, on_adapter: Callable[[Verified], None] | None = None
) -> list[Verified]:
    """Hash the files of adapters again; nothing is parsed and nothing is written.

    Args:
        index: An open index.
        names: Which adapters; all that are not removed by default.
        on_adapter: Called with each as it is done.

    Raises:
        UnknownNameError: No such adapter.
    """
    if names is None:
        chosen: list[AdapterSummary] = [one for one in index.ls(Filters(status="any")) if one.status != "removed"]
    else:
        chosen = [_summary(index, name) for name in dict.fromkeys(names)]
    found = []
    for one in chosen:
        found.append(_verify(index, one))
        if on_adapter is not None:
            on_adapter(found[-1])
    return found


def files_of(adapter_format: str) -> tuple[str, str]:
    """Return the names of the weight file and of the configuration in an adapter's folder."""
    return _FILES.get(adapter_format, _PEFT_FILES)


def _summary(index: Index, name: str) -> AdapterSummary:
    record = index.get(name)
    kept = {field: getattr(record, field) for field in AdapterSummary.__dataclass_fields__}
    return AdapterSummary(**kept)


def _verify(index: Index, one: AdapterSummary) -> Verified:
    if not one.path:
        return Verified(one.name, "description")
    folder = index.folder_of(one)
    for file, wanted in zip(files_of(one.format), (one.sha256_weights, one.sha256_config), strict=True):
        problem = _problem(folder / file, wanted) if wanted else None
        if problem is not None:
            return Verified(one.name, *problem)
    return Verified(one.name, "ok")


def _problem(path: Path, wanted: str) -> tuple[Literal["changed", "missing"], str] | None:
    if not path.exists():
        return "missing", f"{path} is not there; add the adapter again, or remove it"
    try:
        found = file_sha256(path)
    except HubIndexError as error:
        return "changed", str(error)
    if found == wanted:
        return None
    return (
        "changed",
        f"{path} has SHA-256 {found[:16]}..., the index knows {wanted[:16]}...; add it again with --replace",
    )
