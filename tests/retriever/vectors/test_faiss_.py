import json

import numpy as np
import pytest

from compose.errors import AdapterFormatError, ComposeError
from compose.retriever.vectors import opening
from compose.retriever.vectors.faiss_ import INDEX_FILE, FaissVectors
from compose.retriever.vectors.opening import chosen_backend, new_vectors, open_vectors
from compose.retriever.vectors.table import FACTS_FILE


def unit(count: int, dim: int = 8) -> np.ndarray:
    rows = np.random.default_rng(0).standard_normal((count, dim))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def filled(count: int = 300, **options) -> FaissVectors:
    backend = FaissVectors(8, **options)
    backend.add([str(number) for number in range(count)], unit(count))
    return backend


def test_auto_is_exact_until_there_are_many(monkeypatch) -> None:
    monkeypatch.setattr("compose.retriever.vectors.faiss_.APPROXIMATE_FROM", 350)
    backend = filled()
    backend.search(unit(1), 1)
    assert backend._made == "flat"
    backend.add([f"more {number}" for number in range(60)], unit(60))
    backend.search(unit(1), 1)
    assert backend._made == "ivf"
    assert backend._index.nlist == 360 // 39


def test_a_few_deleted_vectors_are_hidden_and_a_fifth_rebuilds() -> None:
    backend = filled(100, kind="hnsw")
    backend.search(unit(1), 1)
    index = backend._index
    backend.delete([str(number) for number in range(20)])
    assert backend._index is index
    assert "5" not in backend.search(unit(100), 80).ids[5]
    backend.delete(["20"])
    assert backend._index is None
    assert backend.search(unit(100), 1).ids[50] == ("50",)
    assert backend._index.ntotal == 79


def test_a_selective_filter_is_searched_exactly() -> None:
    backend = FaissVectors(8, kind="hnsw", search_width=1)
    backend.add(
        [str(n) for n in range(300)], unit(300), [{"base": "rare" if n % 30 == 0 else "common"} for n in range(300)]
    )
    assert set(backend.search(unit(1), 10, {"base": "rare"}).ids[0]) == {str(n) for n in range(0, 300, 30)}


def test_options_come_back(tmp_path) -> None:
    folder = filled(kind="ivf", probes=3, lists=5).persist(tmp_path / "v")
    again = open_vectors(folder)
    assert isinstance(again, FaissVectors)
    assert again._options["probes"] == 3
    assert again._index.nlist == 5


def test_an_index_of_another_table_is_refused(tmp_path) -> None:
    folder, other = filled().persist(tmp_path / "v"), filled(20).persist(tmp_path / "w")
    (folder / INDEX_FILE).write_bytes((other / INDEX_FILE).read_bytes())
    with pytest.raises(AdapterFormatError, match="holds 20 vectors of 8 entries, the table 300 of 8"):
        open_vectors(folder)


def test_options_that_the_backend_does_not_have_are_refused(tmp_path) -> None:
    folder = filled().persist(tmp_path / "v")
    facts = json.loads((folder / FACTS_FILE).read_text())
    (folder / FACTS_FILE).write_text(json.dumps({**facts, "options": {"tree": 3}}))
    with pytest.raises(AdapterFormatError, match="do not fit the backend"):
        open_vectors(folder)
    (folder / FACTS_FILE).write_text(json.dumps({**facts, "ids": facts["ids"][1:], "payloads": facts["payloads"][1:]}))
    with pytest.raises(AdapterFormatError, match="do not belong together"):
        open_vectors(folder)
    (folder / FACTS_FILE).write_text(json.dumps({**facts, "version": 9}))
    with pytest.raises(AdapterFormatError, match="version 1"):
        open_vectors(folder)


def test_unknown_kinds_are_refused() -> None:
    with pytest.raises(ComposeError, match="auto, flat, ivf or hnsw"):
        FaissVectors(8, kind="tree")


def test_many_vectors_take_faiss_and_without_it_numpy_says_so(monkeypatch, caplog) -> None:
    assert chosen_backend(199_999) == "numpy"
    assert chosen_backend(200_000) == "faiss"
    assert isinstance(new_vectors(8, 10**6), FaissVectors)
    monkeypatch.setattr(opening.importlib.util, "find_spec", lambda name: None)
    assert chosen_backend(200_000) == "numpy"
    assert "adapter-compose[ann]" in caplog.text
