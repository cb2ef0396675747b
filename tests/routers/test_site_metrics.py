"""Measures of a site against values worked out by hand."""

import math

import pytest
import torch

from compose.routers.site_metrics import cv2, mean_metrics, metrics_of, task_information
from compose.routers.site_sums import SCALARS, VECTORS, SiteSums, empty

LOG2 = math.log(2)


def sums(lines: list[dict], experts: int = 2, available: list[bool] | None = None) -> SiteSums:
    here = torch.tensor(available or [True] * experts)
    made = SiteSums("layers.0", 0, here, empty(len(lines) - 1, experts))
    for number, line in enumerate(lines):
        for name, value in line.items():
            if name in SCALARS:
                made.scalar(name)[number] = value
            else:
                made.vector(name)[number] = torch.tensor(value, dtype=torch.float64)
    return made


SURE = {name: [2.0, 2.0] for name in VECTORS} | {
    "decisions": 4, "entropy": 0.0, "active": 4, "kept": 4, "gate_sum": 4,
}  # fmt: skip


def test_sure_decisions_that_use_both_experts() -> None:
    found = metrics_of(sums([SURE]))
    assert (found.entropy, found.entropy_of_mean, found.information) == (0, pytest.approx(LOG2), pytest.approx(LOG2))
    assert found.utilisation == found.importance == found.load == found.dominant == (0.5, 0.5)
    assert (found.max_load, found.load_cv2, found.utilisation_cv2, found.importance_cv2) == (1, 0, 0, 0)
    assert (found.active, found.kept, found.gate_sum, found.dead) == (1, 1, 1, ())
    assert found.largest_entropy == pytest.approx(LOG2)
    assert (found.accuracy, found.label_share, found.switch_rate, found.task_information) == (None,) * 4


def test_undecided_decisions_carry_no_information() -> None:
    found = metrics_of(sums([{**SURE, "entropy": 4 * LOG2, "active": 8}]))
    assert found.entropy == pytest.approx(LOG2)
    assert found.information == pytest.approx(0, abs=1e-12)
    assert found.active == 2


def test_imbalance_and_the_dead() -> None:
    found = metrics_of(sums([{**SURE, "load": [3.0, 1.0], "chosen": [3.0, 1.0], "importance": [3.992, 0.008]}]))
    assert found.load == (0.75, 0.25)
    assert (found.max_load, found.load_cv2) == (1.5, 0.25)
    assert found.dead == ()
    assert found.importance_cv2 == pytest.approx(0.996**2)
    assert metrics_of(sums([{**SURE, "load": [3.981, 0.019]}])).dead == (1,)  # 0.00475 < 1 % of a half
    assert metrics_of(sums([{**SURE, "load": [3.979, 0.021]}])).dead == ()


def test_an_expert_that_is_not_here_is_neither_dead_nor_counted() -> None:
    line = {name: [2.0, 0.0, 2.0] for name in VECTORS} | {"decisions": 4}
    found = metrics_of(sums([line], 3, [True, False, True]))
    assert (found.dead, found.max_load, found.load_cv2) == ((), 1, 0)
    assert found.largest_entropy == pytest.approx(LOG2)


def test_labels_and_switches() -> None:
    line = {**SURE, "labelled": 4, "correct": 3, "label_share": 2.5, "pairs": 8, "switches": 2}
    found = metrics_of(sums([line]))
    assert (found.accuracy, found.label_share, found.switch_rate) == (0.75, 0.625, 0.25)


def test_a_task_and_all_tasks_together() -> None:
    lines = [
        {"decisions": 1, "load": [0.5, 0.5], "importance": [0.5, 0.5], "entropy": LOG2},
        {"decisions": 2, "load": [2.0, 0.0], "importance": [2.0, 0.0]},
        {"decisions": 2, "load": [0.0, 2.0], "importance": [0.0, 2.0]},
    ]
    made = sums(lines)
    assert metrics_of(made, 1).load == (1, 0)
    assert metrics_of(made, 1).task_information is None
    every = metrics_of(made)
    assert (every.decisions, every.load) == (5, (0.5, 0.5))
    assert every.entropy == pytest.approx(LOG2 / 5)
    assert every.task_information == pytest.approx(1)  # the unknown task's decision takes no part


@pytest.mark.parametrize(
    ("joint", "share"),
    [
        ([[3.0, 3.0], [1.0, 1.0]], 0.0),
        ([[3.0, 0.0], [0.0, 1.0]], 1.0),
        ([[1.0, 0.0], [0.5, 0.5]], (LOG2 + (0.75 * math.log(4 / 3) + 0.25 * math.log(4)) - 1.5 * LOG2) / LOG2),
        ([[1.0, 2.0]], None),
        ([[1.0, 2.0], [0.0, 0.0]], None),
    ],
    ids=["independent", "determined", "in-between", "one-task", "one-seen-task"],
)  # fmt: skip
def test_what_the_expert_says_of_the_task(joint, share) -> None:
    found = task_information(torch.tensor(joint, dtype=torch.float64))
    assert found == (None if share is None else pytest.approx(share, abs=1e-12))


def test_variation() -> None:
    assert cv2(torch.tensor([1.0, 1.0, 4.0])) == pytest.approx(0.5)
    assert cv2(torch.zeros(3)) is None
    assert cv2(torch.zeros(0)) is None


def test_nothing_counted_is_nothing_measured() -> None:
    found = metrics_of(sums([{}]))
    assert (found.decisions, found.entropy, found.information, found.max_load, found.dead) == (0, None, None, None, ())


def test_means_over_sites() -> None:
    one = metrics_of(sums([{**SURE, "load": [4.0, 0.0], "labelled": 2, "correct": 1}]))
    two = metrics_of(sums([{**SURE, "load": [4.0, 0.0], "entropy": 4 * LOG2}]))
    three = metrics_of(sums([SURE]))
    mean = mean_metrics([one, two])
    assert (mean.load, mean.entropy, mean.accuracy, mean.dead) == ((1, 0), pytest.approx(LOG2 / 2), 0.5, (1,))
    assert mean_metrics([one, two, three]).dead == ()
    assert mean_metrics([]) is None
