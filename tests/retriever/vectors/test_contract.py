"""One contract for every vector backend."""

import numpy as np
import pytest

from compose.errors import ComposeError, DuplicateNameError, IncompatibleError, UnknownNameError

DIM = 12


def unit(count: int, seed: int = 0) -> np.ndarray:
    rows = np.random.default_rng(seed).standard_normal((count, DIM))
    return (rows / np.linalg.norm(rows, axis=1, keepdims=True)).astype(np.float32)


def names(count: int) -> list[str]:
    return [f"adapter/{number}" for number in range(count)]


def payloads(count: int) -> list[dict]:
    return [{"base": "llama" if number % 3 else "t5", "rank": number % 4, "free": number % 2 == 0}
            for number in range(count)]  # fmt: skip


def best(vectors: np.ndarray, queries: np.ndarray, k: int, rows: np.ndarray | None = None) -> list[list[str]]:
    """The definition: all cosines, sorted."""
    rows = np.arange(len(vectors)) if rows is None else rows
    order = np.argsort(-(queries @ vectors[rows].T), axis=1, kind="stable")[:, :k]
    return [[names(len(vectors))[row] for row in rows[line]] for line in order]


@pytest.fixture
def filled(contender):
    backend = contender[0](DIM)
    backend.add(names(60), unit(60), payloads(60))
    return backend


def test_every_vector_finds_itself_first(filled) -> None:
    hits = filled.search(unit(60), 1)
    assert [line[0] for line in hits.ids] == names(60)
    np.testing.assert_allclose(hits.scores, np.ones((60, 1)), atol=1e-5)


def test_the_closest_are_found_with_their_cosines_best_first(filled) -> None:
    queries = unit(5, seed=1)
    hits = filled.search(queries, 7)
    assert [list(line) for line in hits.ids] == best(unit(60), queries, 7)
    np.testing.assert_allclose(hits.scores, -np.sort(-(queries @ unit(60).T), axis=1)[:, :7], atol=1e-5)
    assert hits.scores.dtype == np.float32


def test_more_than_there_are_gives_all(filled) -> None:
    hits = filled.search(unit(2, seed=1), 500)
    assert [sorted(line) for line in hits.ids] == [sorted(names(60))] * 2
    assert hits.scores.shape == (2, 60)


def test_nothing_in_nothing_out(contender) -> None:
    backend = contender[0](DIM)
    assert len(backend) == 0
    assert backend.search(unit(2), 3).ids == ((), ())
    backend.add([], np.zeros((0, DIM), np.float32))
    backend.add(names(3), unit(3))
    assert backend.search(np.zeros((0, DIM), np.float32), 3).ids == ()
    assert len(backend) == 3


@pytest.mark.parametrize("where", [{"base": "t5"}, {"base": "llama", "rank": 1}, {"free": True}, {"rank": 0}, {}])
def test_a_filter_keeps_what_matches(filled, where) -> None:
    rows = np.array([n for n, one in enumerate(payloads(60)) if where.items() <= one.items()])
    assert list(filled.filter(where)) == [names(60)[row] for row in rows]
    queries = unit(4, seed=2)
    assert [list(line) for line in filled.search(queries, 4, where).ids] == best(unit(60), queries, 4, rows)


def test_a_filter_that_nothing_matches_finds_nothing(filled) -> None:
    for where in ({"base": "gpt2"}, {"license": "mit"}, {"rank": "1"}):
        assert filled.search(unit(2), 3, where).ids == ((), ())
        assert filled.filter(where) == ()


@pytest.mark.parametrize("gone", [[3, 40], list(range(30))])
def test_deleted_vectors_are_gone_and_can_come_back(filled, gone) -> None:
    filled.delete([names(60)[row] for row in gone])
    left = np.setdiff1d(np.arange(60), gone)
    assert len(filled) == len(left)
    queries = unit(4, seed=3)
    assert [list(line) for line in filled.search(queries, 5).ids] == best(unit(60), queries, 5, left)
    assert set(filled.filter({})) == {names(60)[row] for row in left}
    filled.add(["adapter/3"], unit(1, seed=9), [{"base": "new"}])
    assert filled.search(unit(1, seed=9), 1).ids == (("adapter/3",),)
    assert filled.filter({"base": "new"}) == ("adapter/3",)


def test_vectors_can_be_added_after_a_search(filled) -> None:
    filled.search(unit(1), 1)
    filled.add(["late"], unit(1, seed=5))
    assert filled.search(unit(1, seed=5), 1).ids == (("late",),)
    assert len(filled) == 61


def test_a_filter_used_before_sees_what_was_added_and_deleted_since(filled) -> None:
    filled.search(unit(1), 1, {"base": "t5"})
    filled.add(["late"], unit(1, seed=5), [{"base": "t5"}])
    assert filled.search(unit(1, seed=5), 1, {"base": "t5"}).ids == (("late",),)
    filled.delete(["late"])
    assert filled.search(unit(1, seed=5), 1, {"base": "t5"}).ids != (("late",),)


def test_a_persisted_backend_comes_back(contender, filled, tmp_path) -> None:
    filled.delete(["adapter/7"])
    again = contender[1](filled.persist(tmp_path / "v"))
    queries = unit(6, seed=4)
    before, after = filled.search(queries, 5), again.search(queries, 5)
    assert after.ids == before.ids
    np.testing.assert_allclose(after.scores, before.scores, atol=1e-6)
    assert again.filter({"base": "t5"}) == filled.filter({"base": "t5"})
    with pytest.raises(DuplicateNameError):
        filled.persist(tmp_path / "v")
    assert filled.persist(tmp_path / "v", overwrite=True) == tmp_path / "v"


def test_what_does_not_fit_is_refused_and_nothing_is_added(filled) -> None:
    with pytest.raises(DuplicateNameError, match="adapter/5"):
        filled.add(["new", "adapter/5"], unit(2, seed=6))
    with pytest.raises(DuplicateNameError):
        filled.add(["new", "new"], unit(2, seed=6))
    with pytest.raises(IncompatibleError, match="unit rows"):
        filled.add(["new"], 2 * unit(1))
    with pytest.raises(IncompatibleError, match="unit rows"):
        filled.add(["new"], np.full((1, DIM), np.nan, np.float32))
    with pytest.raises(IncompatibleError, match="shape"):
        filled.add(["new"], np.ones((1, DIM + 1), np.float32))
    with pytest.raises(IncompatibleError, match="give one each"):
        filled.add(["new"], unit(2))
    with pytest.raises(ComposeError, match="payload field"):
        filled.add(["new"], unit(1), [{"score": 0.5}])
    assert len(filled) == 60


def test_wrong_searches_are_refused(filled) -> None:
    with pytest.raises(ComposeError, match="k must be at least 1"):
        filled.search(unit(1), 0)
    with pytest.raises(IncompatibleError, match="queries must be unit rows"):
        filled.search(3 * unit(1), 1)
    with pytest.raises(ComposeError, match="payload field"):
        filled.search(unit(1), 1, {"a.b": "c"})
    with pytest.raises(UnknownNameError, match="adapter/99"):
        filled.delete(["adapter/1", "adapter/99"])
    assert len(filled) == 60


def test_exact_backends_agree_on_larger_sets(exact_contender) -> None:
    backend = exact_contender[0](DIM)
    backend.add(names(500), unit(500))
    queries = unit(20, seed=8)
    assert [list(line) for line in backend.search(queries, 10).ids] == best(unit(500), queries, 10)
