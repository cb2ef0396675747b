"""Summaries over seeds, and the verdicts a reader must not miss."""

import json

import pytest

from compose.evaluation.result import Row, TaskScore, row_from_json, summarise, verdicts


def row(name: str, kind: str, exact: float, *, seed: int = 0, loss: float = 1.0, **more) -> Row:
    tasks = {"a": TaskScore(exact - 0.1, loss), "b": TaskScore(exact + 0.1, loss)}
    return Row(name, kind, seed=seed, tasks=tasks, **more)


def test_a_summary_is_the_mean_over_tasks_and_then_seeds() -> None:
    rows = [row("oracle adapters", "reference", 0.8), row("r", "router", 0.3), row("r", "router", 0.5, seed=1)]
    oracle, router = summarise(rows)
    assert (oracle.exact, oracle.spread, oracle.seeds) == (pytest.approx(0.8), 0.0, 1)
    assert router.exact == pytest.approx(0.4)
    assert router.spread == pytest.approx(0.2 / 2**0.5)
    assert router.ratio == pytest.approx(0.5)


def test_rows_survive_json() -> None:
    one = row("r", "router", 0.5, trained=7, about="x")
    assert row_from_json(json.loads(json.dumps(one.to_json()))) == one


def routers(*exact: float) -> list[Row]:
    return [row("r", "router", value, seed=seed) for seed, value in enumerate(exact)]


def test_a_router_that_beats_nothing_is_told_so() -> None:
    lines = verdicts([row("uniform average", "reference", 0.5), *routers(0.4, 0.5, 0.6)])
    assert lines == ["r does not beat uniform average: exact match 0.500 against 0.500, loss 1.000 against 1.000"]


def test_a_lead_within_the_spread_is_none() -> None:
    rivals = [row("one LoRA of rank 4", "baseline", value, seed=seed) for seed, value in enumerate((0.45, 0.5, 0.55))]
    assert len(verdicts([*rivals, *routers(0.45, 0.55, 0.6)])) == 1
    assert verdicts([*rivals, *routers(0.8, 0.85, 0.9)]) == []


def test_random_gates_are_rivals_and_few_seeds_are_told() -> None:
    lines = verdicts([*routers(0.5), row("r: gates in random order", "ablation", 0.5, loss=0.9)])
    assert any("random order" in line for line in lines)
    assert any("fewer than 3" in line for line in lines)


def test_a_skipped_row_counts_nowhere() -> None:
    assert summarise([Row("r", "router", skipped="no tasks")]) == []
