"""Vectors: exact cosine, and copies on disk that can be missing, stale or damaged but never change an answer."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest

from compose.errors import HubIndexError, UnknownNameError
from compose.hub_index import durable, vectors
from compose.hub_index.records import AdapterRecord, EmbeddingRecord
from compose.hub_index.store import Index

HASH = "a" * 64


def record(values: object, kind: str = "card") -> EmbeddingRecord:
    return EmbeddingRecord.from_array(values, encoder_id="e", encoder_sha256=HASH, kind=kind)


def add(index: Index, values: np.ndarray, base: str = "") -> None:
    start = len(index)
    index.add_all(
        AdapterRecord(name=f"a{start + number}", source="description", base_id=base, embeddings=(record(row),))
        for number, row in enumerate(values)
    )


def ranking(index: Index, query: object, **options: object) -> list[tuple[str, float]]:
    return [(hit.adapter.name, hit.cosine) for hit in index.query(vector=record(query), **options)]


def copies(index: Index) -> list[Path]:
    return sorted(index.path.with_name("hub.db.vectors").glob("*.npy"))


@pytest.fixture
def random_values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(300, 24)).astype(np.float32)


def test_cosines_are_those_of_float64(index, random_values) -> None:
    add(index, random_values)
    query = random_values[7] + 0.5 * random_values[8]
    wide = random_values.astype(np.float64)
    cosine = wide @ query / np.linalg.norm(wide, axis=1) / np.linalg.norm(query.astype(np.float64))
    hits = ranking(index, query, k=300)
    assert [name for name, _ in hits] == [f"a{row}" for row in np.argsort(-cosine, kind="stable")]
    np.testing.assert_allclose([value for _, value in hits], np.sort(cosine)[::-1], atol=1e-6, rtol=0)


def test_an_adapter_is_its_own_nearest_and_lengths_do_not_matter(index, random_values) -> None:
    scale = np.float32(10.0) ** np.arange(-30, 30)[:, None]
    add(index, random_values[:60] * scale.astype(np.float32))
    for row in (0, 31, 59):
        (name, cosine), *_ = ranking(index, random_values[row] * 1e-3, k=1)
        assert name == f"a{row}"
        assert cosine == pytest.approx(1.0, abs=1e-6)


def test_equal_vectors_come_in_the_order_they_were_added(index, random_values, monkeypatch) -> None:
    add(index, np.repeat(random_values[:2], 300, axis=0))
    wanted = [f"a{number}" for number in range(600)]
    assert [name for name, _ in ranking(index, random_values[0], k=600)][:300] == wanted[:300]
    assert [name for name, _ in ranking(index, random_values[0], k=10)] == wanted[:10]
    assert [name for name, _ in ranking(index, random_values[1], k=2)] == wanted[300:302]


def test_the_rest_of_a_ranking_is_sorted_only_when_asked_for(random_values) -> None:
    values = np.random.default_rng(1).integers(0, 50, 5000).astype(np.float32)
    matrix = vectors.Matrix(np.arange(5000), values[:, None])
    whole = list(vectors.best(matrix, record([1.0])))
    assert [row for row, _ in whole] == np.argsort(-values, kind="stable").tolist()


def test_k_beyond_what_is_there_gives_all(index, random_values) -> None:
    add(index, random_values[:3])
    assert len(ranking(index, random_values[0], k=50)) == 3


def test_only_adapters_of_the_base_are_compared_each_with_its_own_copy(index, random_values) -> None:
    add(index, random_values[:10], "one")
    add(index, random_values[10:20], "two")
    assert {name for name, _ in ranking(index, random_values[0], base="two")} == {f"a{row}" for row in range(10, 20)}
    assert len(copies(index)) == 1
    assert len(ranking(index, random_values[0], k=50)) == 20
    assert len(copies(index)) == 2


def test_a_copy_is_a_numpy_file_and_is_used_again(index, random_values, monkeypatch: pytest.MonkeyPatch) -> None:
    add(index, random_values)
    first = ranking(index, random_values[3])
    (path,) = copies(index)
    unit = np.load(path)
    np.testing.assert_allclose(np.linalg.norm(unit, axis=1), 1.0, atol=1e-6)
    monkeypatch.setattr(vectors, "_from_tables", lambda *_: pytest.fail("read from the tables"))
    with Index.open(index.path) as again:
        assert ranking(again, random_values[3]) == first


@pytest.mark.parametrize("change", ["add", "replace", "remove and sweep"])
def test_a_copy_of_other_vectors_is_not_used_and_goes(index, random_values, change: str) -> None:
    add(index, random_values[:20])
    ranking(index, random_values[3])
    (old,) = copies(index)
    with Index.open(index.path) as other:
        if change == "add":
            add(other, random_values[20:21])
        elif change == "replace":
            other.put_embeddings({"a3": [record(random_values[20])]})
        else:
            other.remove(["a3"])
            other.gc()
    nearest = ranking(index, random_values[20], k=1)[0]
    wanted = {"add": "a20", "replace": "a3"}.get(change)
    assert wanted is None or nearest == (wanted, pytest.approx(1.0, abs=1e-6))
    assert "a3" not in [name for name, _ in ranking(index, random_values[3], k=50)] or change != "remove and sweep"
    (new,) = copies(index)
    assert new != old


@pytest.mark.parametrize("place", [0, 20, 200, -5, -1])
def test_a_damaged_copy_is_made_again(index, random_values, place: int, caplog: pytest.LogCaptureFixture) -> None:
    add(index, random_values)
    first = ranking(index, random_values[3], k=300)
    (path,) = copies(index)
    whole = path.read_bytes()
    for damaged in (whole[:place] + bytes([whole[place] ^ 1]) + whole[place:][1:], whole[: len(whole) // 2], b""):
        path.write_bytes(damaged)
        with Index.open(index.path) as again:
            assert ranking(again, random_values[3], k=300) == first
        assert path.read_bytes() == whole


def test_a_copy_that_cannot_be_written_costs_time_not_the_answer(
    index, random_values, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    add(index, random_values)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(durable.os, "fsync", full)
    with caplog.at_level(logging.WARNING):
        assert ranking(index, random_values[3], k=1)[0][0] == "a3"
    assert "could not be written" in caplog.text
    assert copies(index) == []


def test_the_matrix_can_be_had_whole(index, random_values) -> None:
    add(index, random_values[:10], "one")
    index.update("a4", status="quarantined", reasons=["x"])
    names, unit = index.matrix("e", "card", "one")
    assert names == [f"a{row}" for row in range(10) if row != 4]
    wanted = np.delete(random_values[:10], 4, axis=0)
    np.testing.assert_allclose(unit, wanted / np.linalg.norm(wanted, axis=1, keepdims=True), atol=1e-6)
    with pytest.raises(UnknownNameError, match=r"unknown encoder 'e \(weights\)'"):
        index.matrix("e", "weights")
    assert index.matrix("e", "card", "nobody")[1].shape == (0, 24)


def test_a_vector_of_the_wrong_size_in_the_tables_is_an_error(index, random_values) -> None:
    add(index, random_values[:10])
    index._connection.execute("UPDATE embedding SET vec = x'0000803f' WHERE adapter_id = 3")
    with pytest.raises(HubIndexError, match="row 3 has not 24 entries; the index is damaged"):
        ranking(index, random_values[0])
