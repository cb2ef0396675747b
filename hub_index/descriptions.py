"""Adapters by description: a JSONL file with one adapter per line, whether its weights are here, elsewhere or nowhere.

A line has ``name`` and any of ``title``, ``summary``, ``base``, ``task_type``, ``license``, ``language``, ``tags``,
``datasets``, ``examples``, ``scores``, ``hyper``, ``created_at``, ``repo_id``, ``revision``, and ``path``: the
adapter's folder, relative to the file and below its folder. A line with ``path`` takes the adapter in and says more
about it; one whose name is in the index changes what is said about that adapter; any other is a description alone:
found by queries, never opened.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from compose.errors import ComposeError, HubIndexError, unknown_name
from compose.hub_index.ingest import Options, Outcome, examine, outcome_of, store
from compose.hub_index.records import AdapterRecord, ExampleRecord, ScoreRecord, check_adapter_name
from compose.hub_index.sources import Candidate
from compose.text.jsonl import BadLineError, Line, read_jsonl

if TYPE_CHECKING:
    from compose.hub_index.store import Index

_TEXTS = {"title": "title", "summary": "summary", "base": "base_id", "task_type": "task_type", "license": "license"}
_TEXTS |= {"created_at": "created_at", "repo_id": "repo_id", "revision": "revision"}
_LISTS = ("language", "tags", "datasets")
_KEYS = ("name", "path", *_TEXTS, *_LISTS, "examples", "scores", "hyper")
_CARD_FIELDS = frozenset({"title", "summary", "tags", "datasets"})


class Description(NamedTuple):
    """One line.

    Attributes:
        name: Of the adapter.
        line: Where it stands.
        fields: Of its record.
        folder: The adapter's, None for a description alone.
    """

    name: str
    line: Line
    fields: Mapping[str, Any]
    folder: Path | None


def read_descriptions(path: Path) -> list[Description]:
    """Return the lines of a file.

    Raises:
        ExamplesError: Missing or empty; or bad lines, all of them, each with file and number.
    """
    seen: dict[str, Line] = {}

    def parse(record: Mapping[str, Any], line: Line) -> Description:
        try:
            found = _description(record, line)
        except HubIndexError as error:
            raise BadLineError(str(error)) from None
        if found.name in seen:
            raise BadLineError(f"adapter {found.name!r} is also in line {seen[found.name].number}")
        seen[found.name] = line
        return found

    return read_jsonl([path], parse, fields="'name' and what it does")


def add_descriptions(
    index: Index, path: Path, options: Options, *, on_adapter: Callable[[Outcome], None] | None = None
) -> list[Outcome]:
    """Take in a JSONL file of descriptions; nothing is written before all its lines are sound.

    Lines without a folder are written in one transaction; then every folder as by `compose.hub_index.ingest`.

    Raises:
        ExamplesError: Bad lines, all of them.
    """
    lines = read_descriptions(path)
    records, outcomes = [], dict[str, Outcome]()
    for one in lines:
        if one.folder is None:
            record, state = _described(index, one)
            records.append(record)
            outcomes[one.name] = Outcome(one.name, record.status, str(one.line), record.reasons, notes=(state,))  # type: ignore[arg-type]
    if records:
        index.add_all(records, replace=True)
    for one in lines:
        if one.folder is not None:
            outcomes[one.name] = _add_folder(index, one, options, path.resolve().parent)
        if on_adapter is not None:
            on_adapter(outcomes[one.name])
    return [outcomes[one.name] for one in lines]


def _description(record: Mapping[str, Any], line: Line) -> Description:
    if strange := [key for key in record if key not in _KEYS]:
        raise BadLineError(unknown_name("field", str(strange[0])[:80], _KEYS))
    if not isinstance(record.get("name"), str):
        raise BadLineError(f"'name' must be a text, got {record.get('name')!r:.80}")
    name = check_adapter_name(record["name"])
    fields: dict[str, Any] = {field: record[key] for key, field in _TEXTS.items() if key in record}
    fields |= {key: _texts(key, record[key]) for key in _LISTS if key in record}
    if "examples" in record:
        fields["examples"] = tuple(_example(item) for item in _list("examples", record["examples"]))
    if "scores" in record:
        fields["scores"] = tuple(_score(item) for item in _list("scores", record["scores"]))
    if "hyper" in record:
        fields["hyper"] = record["hyper"] if isinstance(record["hyper"], dict) else None
    AdapterRecord(name=name, source="description", **fields)  # checks the values
    return Description(name, line, fields, _folder(record["path"], line) if "path" in record else None)


def _folder(value: Any, line: Line) -> Path:
    """Return the folder of a relative path below the file's own."""
    parts = Path(value).parts if isinstance(value, str) and "\0" not in value else ()
    if not parts or ".." in parts or Path(value).is_absolute():
        raise BadLineError(f"'path' must be a folder below that of this file, without '..', got {value!r:.120}")
    folder = line.file.resolve().parent / value
    if not folder.is_dir() or not folder.resolve().is_relative_to(line.file.resolve().parent):
        raise BadLineError(f"'path' {value!r:.120}: no such folder below that of this file")
    return folder.resolve()


def _texts(key: str, value: Any) -> tuple[str, ...]:
    listed = [value] if isinstance(value, str) else value
    if not isinstance(listed, list) or not all(isinstance(item, str) for item in listed):
        raise BadLineError(f"{key!r} must be a list of texts, got {value!r:.80}")
    return tuple(listed)


def _list(key: str, value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise BadLineError(f"{key!r} must be a list, got {value!r:.80}")
    return value


def _example(item: Any) -> ExampleRecord:
    """Read ``"text"``, or an object with ``input`` and maybe ``target`` (or ``output``, as in files of examples)."""
    if isinstance(item, str):
        return ExampleRecord(input=item)
    keys = item.keys() if isinstance(item, dict) else set()
    if "input" not in keys or not keys <= {"input", "target", "output"} or {"target", "output"} <= keys:
        raise BadLineError(f"an example is a text, or has 'input' and maybe 'target' or 'output', got {item!r:.80}")
    return ExampleRecord(input=item["input"], target=item.get("target", item.get("output", "")))


def _score(item: Any) -> ScoreRecord:
    try:
        return ScoreRecord(**item)
    except TypeError:
        raise BadLineError(f"a score has task, metric, value and maybe split, n, harness, got {item!r:.80}") from None


def _described(index: Index, one: Description) -> tuple[AdapterRecord, str]:
    """Return the record a line without a folder stands for, and what it is to the index."""
    if one.name not in index:
        return AdapterRecord(name=one.name, source="description", **one.fields), "known by description alone"
    return _changed(index.get(one.name), one.fields), "changed what is said about it"


def _changed(record: AdapterRecord, fields: Mapping[str, Any]) -> AdapterRecord:
    """Return the record with other fields; vectors made of what changed do not stay."""
    changed = {key for key, value in fields.items() if getattr(record, key) != value}
    stale = {"card"} if changed & _CARD_FIELDS else set()
    stale |= {"examples"} if "examples" in changed else set()
    kept = tuple(one for one in record.embeddings if one.kind not in stale)
    return replace(record, **{**fields, "embeddings": kept})


def _add_folder(index: Index, one: Description, options: Options, root: Path) -> Outcome:
    assert one.folder is not None  # noqa: S101 - asked for by the caller
    try:
        record, notes = examine(index, Candidate(one.folder, root), one.name, options)
        return store(index, _changed(record, one.fields), str(one.line), notes, replace=options.replace)
    except ComposeError as error:
        return outcome_of(error, str(one.line), one.name)
