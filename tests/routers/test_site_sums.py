"""Sums of one site by hand: what a decision adds, what is left out, and who dominates."""

import math

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.routing import Decisions
from compose.routers.site_sums import SCALARS, VECTORS, SiteSums, dominant_expert, gate_shares, sums_of

PROBS = torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.9, 0.0], [0.2, 0.2, 0.6], [1.0, 0.0, 0.0]])
GATES = torch.tensor([[0.5, 0.25, 0.0], [0.0, 0.9, 0.0], [0.0, -0.2, 0.6], [1.0, 0.0, 0.0]])


def decisions(**changes) -> Decisions:
    lines = len(changes.get("gates_NE", GATES))
    values = {
        "site": "layers.0", "layer": 0, "logits_NE": PROBS.log(), "probs_NE": PROBS, "gates_NE": GATES,
        "real_N": torch.ones(lines, dtype=torch.bool), "response_N": torch.ones(lines, dtype=torch.bool),
        "tasks_N": torch.full((lines,), -1), "labels_N": torch.full((lines,), -1),
        "available_E": torch.ones(3, dtype=torch.bool),
    }  # fmt: skip
    return Decisions(**{**values, **changes})


def scalars(sums: SiteSums, line: int = 0) -> dict[str, float]:
    return {name: float(sums.scalar(name)[line]) for name in SCALARS}


def test_every_sum_by_hand() -> None:
    given = decisions(labels_N=torch.tensor([0, 0, -1, 0]), rows_N=torch.tensor([0, 0, 0, 1]))
    sums = sums_of(given, num_tasks=0, over="real")
    entropies = [
        1.5 * math.log(2),
        -0.1 * math.log(0.1) - 0.9 * math.log(0.9),
        -0.4 * math.log(0.2) - 0.6 * math.log(0.6),
    ]
    expected = {
        "decisions": 4, "entropy": sum(entropies), "active": 2 + 1 + 2 + 1, "kept": 0.75 + 0.9 + 0.8 + 1,
        "gate_sum": 0.75 + 0.9 + 0.4 + 1, "labelled": 3, "correct": 2, "label_share": 2 / 3 + 0 + 1,
        "pairs": 2, "switches": 2,
    }  # fmt: skip
    assert scalars(sums) == pytest.approx(expected, abs=1e-6)
    vectors = {
        "importance": [1.8, 1.35, 0.85], "load": [2 / 3 + 1, 1 / 3 + 1 + 0.25, 0.75], "chosen": [2, 3, 1],
        "dominant": [2, 1, 1],
    }  # fmt: skip
    for name in VECTORS:
        assert sums.vector(name)[0].tolist() == pytest.approx(vectors[name], abs=1e-6), name


def test_padding_is_not_read() -> None:
    padded = decisions(
        probs_NE=torch.cat([PROBS, torch.full((2, 3), math.nan)]),
        gates_NE=torch.cat([GATES, torch.full((2, 3), math.nan)]),
        real_N=torch.tensor([True] * 4 + [False] * 2),
    )
    found, wanted = (sums_of(given, num_tasks=0, over="real") for given in (padded, decisions()))
    assert torch.equal(found.sums_LC, wanted.sums_LC)


def test_the_response_alone() -> None:
    given = decisions(response_N=torch.tensor([False, True, True, False]), rows_N=torch.zeros(4, dtype=torch.int64))
    found = scalars(sums_of(given, num_tasks=0, over="response"))
    assert (found["decisions"], found["pairs"], found["switches"]) == (2, 1, 1)
    every = scalars(sums_of(given, num_tasks=0, over="real"))
    assert (every["decisions"], every["pairs"]) == (4, 1)  # switches are of the response in any case


def test_tasks_stand_on_their_own_lines() -> None:
    given = decisions(tasks_N=torch.tensor([1, 0, 1, -1]))
    sums = sums_of(given, num_tasks=2, over="real")
    assert sums.scalar("decisions").tolist() == [1, 1, 2]
    assert sums.vector("dominant").tolist() == [[1, 0, 0], [0, 1, 0], [1, 0, 1]]
    assert sums_of(given, num_tasks=0, over="real").scalar("decisions").tolist() == [4]
    with pytest.raises(IncompatibleError, match="task number 1, but 1 tasks"):
        sums_of(given, num_tasks=1, over="real")


def test_a_label_without_an_expert_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="expert label 3, but there are 3 experts"):
        sums_of(decisions(labels_N=torch.tensor([0, 3, -1, 0])), num_tasks=0, over="real")


def test_experts_that_are_not_here_take_no_part() -> None:
    gates = torch.tensor([[0.5, 9.0, 0.5], [0.0, 9.0, 0.2]])  # an always-on expert has a gate, and is not routed
    given = decisions(
        gates_NE=gates, probs_NE=gates, logits_NE=gates, available_E=torch.tensor([True, False, True]),
        labels_N=torch.tensor([1, 2]),
    )  # fmt: skip
    sums = sums_of(given, num_tasks=0, over="real")
    assert sums.vector("load")[0].tolist() == [0.5, 0, 1.5]
    assert sums.vector("importance")[0].tolist() == [0.5, 0, 1.5]
    assert scalars(sums)["labelled"] == 1  # the first line's label does not exist here
    assert scalars(sums)["correct"] == 1
    assert scalars(sums)["active"] == 3


def test_the_first_of_equal_experts_dominates_and_none_where_all_gates_are_zero() -> None:
    given = decisions(gates_NE=torch.tensor([[0.0, 0.4, 0.4], [0.0, 0.0, 0.0], [-0.5, 0.4, 0.0], [0.3, 0.3, 0.3]]))
    assert dominant_expert(given).tolist() == [1, -1, 0, 0]
    torch.testing.assert_close(gate_shares(given).sum(-1), torch.tensor([1, 0, 1, 1], dtype=torch.float64))
    assert sums_of(given, num_tasks=0, over="real").vector("dominant")[0].tolist() == [2, 1, 0]


def test_what_is_not_finite_is_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"layers\.0: .* not finite"):
        sums_of(decisions(gates_NE=GATES * math.nan), num_tasks=0, over="real")


def test_no_decisions_at_all() -> None:
    nothing = decisions(
        gates_NE=GATES[:0], probs_NE=GATES[:0], logits_NE=GATES[:0], rows_N=torch.zeros(0, dtype=torch.int64)
    )
    assert sums_of(nothing, num_tasks=2, over="real").sums_LC.abs().sum() == 0


def test_sums_add_and_survive_json() -> None:
    given = decisions(tasks_N=torch.tensor([1, 0, 1, -1]))
    sums = sums_of(given, num_tasks=3, over="real")
    twice = sums.added(sums)
    assert torch.equal(twice.sums_LC, 2 * sums.sums_LC)
    back = SiteSums.from_json(twice.to_json(("a", "b", "c")), ("a", "b", "c"))
    assert torch.equal(back.sums_LC, twice.sums_LC)
    assert [line["task"] for line in twice.to_json(("a", "b", "c"))["sums"]] == [None, "a", "b"]
    with pytest.raises(IncompatibleError, match="different experts"):
        sums.added(sums._replace(available_E=torch.tensor([True, True, False])))
