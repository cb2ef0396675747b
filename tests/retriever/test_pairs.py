from collections import Counter

from compose.retriever.pairs import distinct_batches, draw_pairs

TEXTS = {"a": ["a1", "a2", "a3"], "b": ["b1", "b2"], "c": ["c1", "c2", "c3", "c4"]}


def test_a_pair_is_two_different_inputs_of_one_task() -> None:
    pairs = draw_pairs(TEXTS, rounds=5, seed=0)
    for anchor, positive, task in zip(*pairs, strict=True):
        assert anchor != positive
        assert {anchor, positive} <= set(TEXTS[task])
    assert Counter(pairs.tasks) == {"a": 5, "b": 5, "c": 10}
    assert len(set(zip(pairs.anchors, pairs.positives, strict=True))) > 10


def test_draws_depend_on_the_seed_alone() -> None:
    assert draw_pairs(TEXTS, 3, seed=1) == draw_pairs(dict(reversed(TEXTS.items())), 3, seed=1)
    assert draw_pairs(TEXTS, 3, seed=1) != draw_pairs(TEXTS, 3, seed=2)
    tasks = list("aabbbcccdd")
    assert distinct_batches(tasks, 3, seed=1) == distinct_batches(tasks, 3, seed=1)
    assert distinct_batches(tasks, 3, seed=1) != distinct_batches(tasks, 3, seed=2)


def test_no_task_stands_twice_in_a_batch_and_no_row_in_two() -> None:
    tasks = [f"t{n % 7}" for n in range(100)] + ["big"] * 15
    batches = distinct_batches(tasks, 5, seed=0)
    for batch in batches:
        assert 2 <= len(batch) <= 5
        assert len({tasks[row] for row in batch}) == len(batch)
    rows = [row for batch in batches for row in batch]
    assert len(rows) == len(set(rows))
    assert len(rows) >= 110


def test_few_tasks_make_small_batches() -> None:
    batches = distinct_batches(["a"] * 6 + ["b"] * 6, 64, seed=0)
    assert [len(batch) for batch in batches] == [2] * 6


def test_rows_without_another_task_are_left_out() -> None:
    assert [len(batch) for batch in distinct_batches(["a"] * 6 + ["b"], 4, seed=0)] == [2]
    assert distinct_batches(["a"] * 6, 4, seed=0) == []
