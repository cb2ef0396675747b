"""Rows: everything a record holds comes back, and what a damaged row holds is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from compose.errors import HubIndexError
from compose.hub_index import rows
from compose.hub_index.records import (
    AdapterRecord,
    AuditFinding,
    EmbeddingRecord,
    ExampleRecord,
    ScoreRecord,
    StatRecord,
)


def test_a_record_comes_back_whole(index, make_record, numbered) -> None:
    index.add_all(make_record(number) for number in range(5))
    for number in range(5):
        assert numbered.same(index.get(f"adapter-{number:07d}"), make_record(number))


def test_every_kind_of_field_survives(index) -> None:
    record = AdapterRecord(
        name="edge",
        sha256_weights="a" * 64,
        num_bytes=2**63 - 1,
        title="NUL \0 quote ' \" line\n ünïcode 日本 \U0001f600",
        summary="",
        tags=("b", "a", "Straße"),
        language=(),
        hyper={"list": [1, 2.5, None, True, {"x": "é"}], "": 0},
        scaling={"q_proj": 1e-300, "": -2},
        train_seed=None,
        examples=(ExampleRecord(input="\0", target=""), ExampleRecord(input="b"), ExampleRecord(input="a")),
        scores=(ScoreRecord(task="t", metric="m", value=-0.5), ScoreRecord(task="t", metric="m", value=1.0, seed=0)),
        stats=(StatRecord(module="m", sigma1=None, fro=0, energy1=None, spec_entropy=1, kurtosis=None, b_zero=True),),
        findings=(AuditFinding(rule="r", severity="high", detail="d", at="then"),),
        status="quarantined",
        reasons=("first", "second"),
        added_at="2026-01-01T00:00:00+00:00",
    )  # fmt: skip
    index.add(record)
    assert index.get("edge") == record


def test_times_that_are_empty_are_filled_in(index) -> None:
    finding = AuditFinding(rule="r", severity="low", detail="d")
    index.add(AdapterRecord(name="a", sha256_weights="a" * 64, findings=(finding,)))
    found = index.get("a")
    assert found.added_at.startswith("20")
    assert found.findings == (replace(finding, at=found.added_at),)


def test_vectors_of_another_encoder_of_that_name_are_refused(index, numbered) -> None:
    one = numbered.vector(1)
    index.add(AdapterRecord(name="a", sha256_weights="a" * 64, embeddings=(one,)))
    for change in ({"encoder_sha256": "c" * 64}, {"prompt": "Query: "}, {"vector": one.vector * 2}):
        with pytest.raises(HubIndexError, match="is not the one of the index"):
            index.add(AdapterRecord(name="b", sha256_weights="b" * 64, embeddings=(replace(one, **change),)))
    assert "b" not in index
    other = replace(one, kind="weights", prompt="")
    index.add(AdapterRecord(name="b", sha256_weights="b" * 64, embeddings=(other,)))
    assert index.get("b").embeddings == (other,)


@pytest.mark.parametrize(
    "damage",
    [
        "UPDATE adapter SET tags = 'no json'",
        "UPDATE adapter SET tags = '{}'",
        "UPDATE adapter SET scaling = '[]'",
        "UPDATE adapter SET num_bytes = 'many'",
        "UPDATE adapter SET name = '../up'",
        "UPDATE adapter SET sha256_weights = 'x'",
        "UPDATE module SET scaling = 'NaN'",
        "UPDATE score SET value = 9e999",
        "UPDATE audit SET severity = 'fine'",
        "UPDATE embedding SET vec = x'00'",
        "UPDATE embedding SET vec = 'text'",
    ],
)
def test_a_damaged_row_is_refused_and_found(index, make_record, damage: str) -> None:
    index.add(make_record(1))
    index._connection.execute(damage)
    with pytest.raises(HubIndexError):
        rows.read_adapter(index._connection, 1)
    assert index.check() != []


def test_children_of_many_rows_are_read_at_once(index, make_record) -> None:
    index.add_all(make_record(number) for number in range(4))
    found = rows.read_children(index._connection, "modules", [1, 3])
    assert found == {1: make_record(0).modules, 3: make_record(2).modules}


def test_an_embedding_of_many_entries_is_the_limit(index) -> None:
    with pytest.raises(HubIndexError, match="bytes of a vector"):
        EmbeddingRecord(encoder_id="e", encoder_sha256="a" * 64, kind="card", vector=b"\0" * 4 * 65_537)
