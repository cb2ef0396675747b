"""JSONL: what goes out comes in again, every bad line is named, and an import is all or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from compose.errors import DuplicateNameError, HubIndexError
from compose.hub_index.exchange import export_jsonl, import_jsonl, line_of, record_of
from compose.hub_index.records import AdapterRecord, ExampleRecord
from compose.hub_index.search import Filters
from compose.hub_index.store import Index

ANY = Filters(status="any")


@pytest.fixture
def filled(index, make_record) -> Index:
    index.add_all(make_record(number) for number in range(12))
    index.update(make_record(1).name, status="quarantined", reasons=["norm"])
    index.add(
        AdapterRecord(
            name="edge", sha256_weights="e" * 64, title="line\nfeed \u2028 ünïcode \0", hyper={"a": [1, {"b": None}]},
            examples=(ExampleRecord(input="{}\r\n"),), train_seed=0, rank_max=3, scaling={"x": 1},
        )
    )  # fmt: skip
    return index


@pytest.fixture
def other(tmp_path: Path):
    with Index.open(tmp_path / "other.db", create=True) as opened:
        yield opened


def test_an_index_survives_the_trip(filled, other, tmp_path: Path) -> None:
    path = tmp_path / "x.jsonl"
    assert export_jsonl(filled, path) == 13
    assert len(path.read_bytes().split(b"\n")) == 14
    assert {one.state for one in import_jsonl(other, path)} == {"added"}
    assert list(other.records(ANY)) == list(filled.records(ANY))
    export_jsonl(other, tmp_path / "y.jsonl")
    assert (tmp_path / "y.jsonl").read_bytes() == path.read_bytes()
    assert {one.state for one in import_jsonl(other, path)} == {"present"}


def test_a_line_says_its_schema_and_hash_and_leaves_out_what_is_empty(make_record) -> None:
    line = json.loads(line_of(AdapterRecord(name="a", sha256_weights="a" * 64)))
    assert line["schema"] == 1
    assert line["adapter"] == {"name": "a", "sha256_weights": "a" * 64}
    assert record_of(json.loads(line_of(make_record(3)))) == make_record(3)


def test_filters_choose_and_removed_ones_stay(filled, tmp_path: Path, make_record) -> None:
    filled.remove([make_record(2).name])
    assert export_jsonl(filled, tmp_path / "x.jsonl") == 12
    assert export_jsonl(filled, tmp_path / "x.jsonl", Filters()) == 11
    assert export_jsonl(filled, tmp_path / "x.jsonl", Filters(base="organisation/base-3")) == 2
    with pytest.raises(HubIndexError, match="no adapter to export"):
        export_jsonl(filled, tmp_path / "x.jsonl", Filters(base="nobody"))
    assert len((tmp_path / "x.jsonl").read_text().splitlines()) == 2
    assert sorted(file.name for file in tmp_path.glob(".*")) == []


def changed(line: bytes, change: Callable[[dict], None]) -> bytes:
    """Return the line with a changed adapter and the hash that fits it."""
    from compose.hub_index.exchange import _digest

    whole = json.loads(line)
    change(whole["adapter"])
    whole["sha256"] = _digest(whole["adapter"])
    return json.dumps(whole).encode() + b"\n"


BAD_LINES = {
    "not JSON": (lambda line: b"{", "not valid JSON"),
    "not UTF-8": (lambda line: b'{"a": "\xff"}', "not valid JSON"),
    "a list": (lambda line: b"[]", "expected an object"),
    "no schema": (lambda line: b"{}", "'schema' must be 1, got None"),
    "newer": (lambda line: line.replace(b'"schema":1', b'"schema":2'), "'schema' must be 1, got 2; it is newer"),
    "schema true": (lambda line: line.replace(b'"schema":1', b'"schema":true'), "'schema' must be 1"),
    "no adapter": (lambda line: b'{"schema": 1}', "'adapter' must be an object"),
    "one byte": (lambda line: line.replace(b"LORA", b"LORB"), "the line was changed or cut"),
    "cut": (lambda line: line[:-40], "not valid JSON"),
    "NaN": (lambda line: line.replace(b'"scaling":{"":2.0}', b'"scaling":{"":NaN}'), "holds what JSON cannot"),
    "surrogate": (lambda line: line.replace(b"LORA", rb"\ud800"), "holds what JSON cannot"),
    "deep": (lambda line: b'{"schema":1,"sha256":"","adapter":{"hyper":' + b"[" * 9000 + b"]" * 9000 + b"}}", "not v"),
    "unknown field": (lambda line: changed(line, lambda one: one.update(power=9)), "unknown fields 'power' of"),
    "unknown part": (lambda line: changed(line, lambda one: one["modules"][0].update(x=1)), "unknown fields 'x' of"),
    "no name": (lambda line: changed(line, lambda one: one.pop("name")), "AdapterRecord needs 'name'"),
    "bad name": (lambda line: changed(line, lambda one: one.update(name="../up")), "adapter name must be"),
    "wrong type": (lambda line: changed(line, lambda one: one.update(num_bytes="9")), "num_bytes must be a whole"),
    "text for list": (lambda line: changed(line, lambda one: one.update(tags="a")), "tags must be a tuple"),
    "list for object": (lambda line: changed(line, lambda one: one.update(hyper=[])), "hyper must be a mapping"),
    "parts are text": (lambda line: changed(line, lambda one: one.update(modules="ab")), "'modules' must be a list"),
    "no base64": (lambda line: changed(line, lambda one: one["embeddings"][0].update(vector="*")), "must be base64"),
    "zeros": (lambda line: changed(line, lambda one: one["embeddings"][0].update(vector="AAAAAA==")), "not all zero"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_LINES)
def test_a_bad_line_is_refused_by_number(other, tmp_path: Path, make_record, name: str) -> None:
    make, message = BAD_LINES[name]
    path = tmp_path / "x.jsonl"
    bad = make(line_of(make_record(2)))
    path.write_bytes(line_of(make_record(1)) + b"\n" + bad.rstrip(b"\n") + b"\n" + line_of(make_record(3)))
    with pytest.raises(HubIndexError, match=rf"x\.jsonl:3: .*{message}"):
        import_jsonl(other, path)
    assert len(other) == 0


def test_all_bad_lines_are_told_at_once(other, tmp_path: Path, make_record) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(
        b"{}\n" + line_of(make_record(1)) + b"nonsense\n" + line_of(replace(make_record(2), name=make_record(1).name))
    )
    with pytest.raises(HubIndexError) as caught:
        import_jsonl(other, path)
    assert [line.split(": ")[0][-2:] for line in str(caught.value).splitlines()] == [":1", ":3", ":4"]
    assert "is also in line 2" in str(caught.value)


def test_a_taken_name_is_refused_by_number_and_nothing_comes_in(other, tmp_path: Path, make_record) -> None:
    path = tmp_path / "x.jsonl"
    path.write_bytes(b"".join(line_of(make_record(number)) for number in range(4)))
    other.add(AdapterRecord(name=make_record(2).name, sha256_weights="f" * 64))
    with pytest.raises(
        DuplicateNameError, match=rf"x\.jsonl:3: the index has another adapter named '{make_record(2).name}'"
    ):
        import_jsonl(other, path)
    assert len(other) == 1
    assert [one.state for one in import_jsonl(other, path, replace=True)] == ["added", "added", "replaced", "added"]


def test_vectors_of_another_encoder_are_refused_and_nothing_comes_in(
    other, tmp_path: Path, make_record, numbered
) -> None:
    other.add(
        AdapterRecord(name="mine", sha256_weights="f" * 64, embeddings=(replace(numbered.vector(0), prompt="mine"),))
    )
    path = tmp_path / "x.jsonl"
    path.write_bytes(line_of(make_record(1, entries=0)) + line_of(make_record(2)))
    with pytest.raises(HubIndexError, match="is not the one of the index"):
        import_jsonl(other, path)
    assert len(other) == 1


@pytest.mark.parametrize("content", [None, b"", b"\n\n"])
def test_a_file_without_lines_is_refused(other, tmp_path: Path, content: bytes | None) -> None:
    if content is not None:
        (tmp_path / "x.jsonl").write_bytes(content)
    with pytest.raises(HubIndexError, match=r"no such file|'schema', 'sha256' and 'adapter'"):
        import_jsonl(other, tmp_path / "x.jsonl")
