"""What the pictures of a router show: depths, majorities, the course of a training, warnings."""

import json
from pathlib import Path

import pytest
import torch

from compose.errors import ExamplesError
from compose.report.routing_data import (
    course_of,
    depth_metrics,
    depths,
    gradient_norm,
    read_history,
    strip_lines,
    warnings_of,
)
from compose.routers.metrics import RoutingMeter
from compose.routers.routing import Decisions
from compose.routers.token_strip import strip_of
from compose.routers.trace import GradientNorm, RoutingTrace

EXPERTS = ("math", "code", "prose")


def decisions(site: str, layer: int, gates: list[list[float]], task: int = 0) -> Decisions:
    values = torch.tensor(gates)
    ones = torch.ones(len(values), dtype=torch.bool)
    numbers = torch.full((len(values),), task)
    return Decisions(
        site, layer, values, values, values, ones, ones, numbers, numbers, torch.ones(3, dtype=torch.bool),
        rows_N=torch.zeros(len(values), dtype=torch.int64),
    )  # fmt: skip


def traced(*each: Decisions, tasks: tuple[str, ...] = ("sums", "poems"), **more) -> RoutingTrace:
    meter = RoutingMeter(EXPERTS, tasks)
    meter.update(each)
    trace = meter.trace()
    for name, value in more.items():
        object.__setattr__(trace, name, value)
    return trace


SURE = [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    ("sites", "labels"),
    [
        ([("model.layers.0.q", 0), ("model.layers.0.v", 0), ("model.layers.1.q", 1)], ["0", "1"]),
        ([("encoder.block.0.q", 0), ("decoder.block.0.q", 0)], ["encoder 0", "decoder 0"]),
        ([("model:model", -1)], ["model"]),
        ([("encoder:model", -1), ("decoder:model", -1)], ["encoder", "decoder"]),
        ([("model.layers.0:attention", 0), ("model.layers.0:feed_forward", 0)], ["0"]),
    ],
    ids=["layers", "two-stacks", "model", "two-models", "parts"],
)
def test_sites_are_grouped_by_depth(sites, labels) -> None:
    trace = traced(*(decisions(site, layer, SURE) for site, layer in sites))
    found = depths(trace)
    assert [depth.label for depth in found] == labels
    assert [site for depth in found for site in depth.sites] == [site for site, _ in sites]


def test_deep_models_are_taken_together() -> None:
    found = depths(traced(*(decisions(f"layers.{layer}.q", layer, SURE) for layer in range(100))))
    assert len(found) == 34
    assert [depth.label for depth in found[:2]] == ["0", "3"]
    assert sum(len(depth.sites) for depth in found) == 100


def test_a_depth_is_the_mean_of_its_sites() -> None:
    trace = traced(
        decisions("layers.0.q", 0, SURE), decisions("layers.0.v", 0, [[1.0, 0.0, 0.0]]),
        gradients={"layers.0.q": GradientNorm(6.0, 2)},
    )  # fmt: skip
    (depth,) = depths(trace)
    assert depth_metrics(trace, depth).load == pytest.approx((2 / 3, 1 / 6, 1 / 6))
    assert depth_metrics(trace, depth, "poems") is None
    assert gradient_norm(trace, depth) == 3.0
    assert gradient_norm(traced(decisions("layers.0.q", 0, SURE)), depth) is None


def test_a_strip_by_depth_takes_the_majority_of_its_sites() -> None:
    each = [
        decisions("layers.0.q", 0, [[0.6, 0.4, 0.0], [1.0, 0.0, 0.0]]),
        decisions("layers.0.v", 0, [[0.0, 0.9, 0.1], [1.0, 0.0, 0.0]]),
        decisions("layers.1.q", 1, [[0.0, 0.0, 1.0], [0.0, 0.0, 0.0]]),
    ]
    strip = strip_of(each, ["a", "b"], name="s")
    assert strip_lines(strip, traced(*each)) == [("0", [1, 0]), ("1", [2, -1])]
    assert strip_lines(strip, traced(each[0]))[1:] == [("layers.0.v", [1, 0]), ("layers.1.q", [2, -1])]


def test_history_is_read(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 2.0, "entropy": 1.0, "load": [0.5, 0.25, 0.25], "stage": "router"},
        {"stage": "other"},
        {"step": 2, "loss": float("nan"), "entropy": None, "load": {"code": 1.0}},
        {"step": 3, "loss": 1.0, "load": []},
    ]
    (tmp_path / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    course = read_history(tmp_path / "history.jsonl", EXPERTS)
    assert course.loss == ((1, 2.0), (3, 1.0))
    assert course.entropy == ((1, 1.0),)
    assert course.load == {"math": ((1, 0.5),), "code": ((1, 0.25), (2, 1.0)), "prose": ((1, 0.25),)}
    assert course_of([], EXPERTS) == ((), (), {})


def test_bad_history_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ExamplesError, match="no such file"):
        read_history(tmp_path / "none.jsonl", EXPERTS)
    (tmp_path / "bad.jsonl").write_text('{"step": 1, "load": [1.0]}\n{\n')
    with pytest.raises(ExamplesError, match=r"bad\.jsonl:1.*1 numbers, there are 3 experts[\s\S]*bad\.jsonl:2"):
        read_history(tmp_path / "bad.jsonl", EXPERTS)


def test_a_healthy_router_has_no_warnings() -> None:
    trace = traced(decisions("layers.0.q", 0, SURE, 0), decisions("layers.1.q", 1, [[0.9, 0.1, 0.0], *SURE[1:]], 1))
    assert warnings_of(trace, {"router": 0.8, "none_r64": 0.7, "oracle": 0.9}) == []


@pytest.mark.parametrize(
    ("gates", "wanted"),
    [
        ([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.1, 0.9, 0.0]], "dead at every site (below 1 % of the even share"),
        ([[1.0, 0.01, 0.01]] * 3, "at 1 of 1 sites a single expert has over 95 %"),
        ([[0.34, 0.33, 0.33]] * 3, "as good as uniform"),
        ([[0.6, 0.2, 0.2]] * 3, "hardly depend on the input"),
        ([[0.2, 0.0, 0.0], [0.0, 0.2, 0.0], [0.0, 0.0, 0.2]], "add up to 0.200 on average"),
    ],
    ids=["dead", "collapsed", "uniform", "constant", "weak"],
)  # fmt: skip
def test_what_is_wrong_is_said(gates, wanted) -> None:
    found = warnings_of(traced(decisions("layers.0.q", 0, gates)))
    assert any(wanted in text for text in found), found


def test_experts_dead_at_some_sites() -> None:
    trace = traced(decisions("layers.0.q", 0, SURE), decisions("layers.1.q", 1, [*SURE[:2]]))
    assert "1 of 2 sites have dead experts" in warnings_of(trace)


def test_experts_that_do_not_tell_tasks_apart() -> None:
    trace = traced(decisions("layers.0.q", 0, SURE, 0), decisions("layers.0.q", 0, SURE, 1))
    assert any("nothing about the task" in text for text in warnings_of(trace))


def test_a_router_that_is_beaten_is_reported() -> None:
    found = warnings_of(
        traced(decisions("layers.0.q", 0, SURE)), {"router": 0.5, "none_r64": 0.5, "random": 0.4, "oracle": 1.0}
    )
    assert found == ["the router (0.500) does not beat none_r64 (0.500)"]


def test_experts_that_are_alike_are_named() -> None:
    cosines = ((1.0, 0.99, None), (0.99, 1.0, None), (None, None, None))
    found = warnings_of(traced(decisions("layers.0.q", 0, SURE), cosines=cosines))
    assert found == ["experts that are nearly the same, by the cosine of their deltas: math and code (0.990)"]


def test_nothing_counted_is_said() -> None:
    assert warnings_of(RoutingTrace(experts=EXPERTS)) == [
        "nothing was counted: no decision of this trace is in its sums"
    ]
