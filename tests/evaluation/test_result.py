"""Summaries over seeds, and the verdicts a reader must not miss."""

import json

import pytest

from compose.evaluation.result import (
    TOLD,
    Row,
    TaskScore,
    page_scores,
    row_from_json,
    summarise,
    task_means,
    verdicts,
)


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


def test_the_ratio_is_over_the_tasks_that_have_an_oracle() -> None:
    oracle = Row("oracle adapters", "reference", tasks={"a": TaskScore(0.8, 1.0)})
    router = Row("r", "router", tasks={"a": TaskScore(0.4, 1.0), "b": TaskScore(0.0, 1.0)})
    _, summary = summarise([oracle, router])
    assert (summary.exact, summary.ratio) == (pytest.approx(0.2), pytest.approx(0.5))


def test_what_is_told_the_task_is_no_rival() -> None:
    told = [row(f"r: {TOLD}", "ablation", 1.0), row("oracle adapters", "reference", 1.0)]
    assert verdicts([*told, *routers(0.5, 0.5, 0.5)]) == []


def test_a_router_is_compared_with_the_lora_of_its_size() -> None:
    loras = [row(f"one LoRA of rank {rank}", "baseline", 0.9, trained=10 * rank) for rank in (4, 1, 2)]

    def beaten_by(trained: int) -> str:
        (line,) = verdicts([*loras, *(row("r", "router", 0.5, seed=seed, trained=trained) for seed in range(3))])
        return line.split(":")[0]

    assert beaten_by(11) == "r does not beat one LoRA of rank 2"
    assert beaten_by(10) == "r does not beat one LoRA of rank 1"
    assert beaten_by(99) == "r does not beat one LoRA of rank 4"


def test_tasks_are_means_over_seeds() -> None:
    rows = [row("r", "router", 0.3), row("r", "router", 0.5, seed=1, loss=2.0), Row("r", "router", 2, skipped="x")]
    assert dict(task_means(rows, "r")) == {"a": pytest.approx((0.3, 1.5)), "b": pytest.approx((0.5, 1.5))}
    assert task_means(rows, "other") == []


def test_a_page_s_scores_name_the_router_and_its_ablations() -> None:
    names = {"base": "reference", "r": "router", f"r: {TOLD}": "ablation", "r: x": "ablation", "s": "router"}
    rows = [row(name, kind, 0.5) for name, kind in {**names, "s: x": "ablation"}.items()]
    assert list(page_scores(rows, "r")) == ["base", "router", f"oracle task gate ({TOLD})", "x", "s"]
