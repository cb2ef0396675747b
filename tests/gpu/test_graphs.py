"""CUDA graphs, torch.compile, autocast and torch's operator checks on the GPU; a soak on two streams."""

from __future__ import annotations

import pytest
import torch
from torch.library import opcheck

from compose.kernels.packed import op

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

EVERY_LAUNCH = (
    "rows",
    "rows, top 2",
    "dense, ids",
    "dense, gates",
    "dense, long, R > 128",
    "tiles, ids per example",
    "tiles, sorted",
    "tiles, sorted, top 2",
)


def _captured(call) -> tuple[torch.cuda.CUDAGraph, object]:
    """A graph of one call, warmed up on a side stream, and what the call returned."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = call()
    return graph, result


@pytest.mark.parametrize("name", EVERY_LAUNCH)
def test_a_replayed_graph_equals_an_eager_call_after_operands_changed_in_place(name, cases, make_problem):
    problem = make_problem(cases[name], torch.bfloat16)
    graph, y = _captured(problem.run)
    stack = problem.stack
    for seed in range(1, 4):
        other = make_problem(cases[name], torch.bfloat16, seed=seed)
        problem.x.copy_(other.x)
        problem.base.copy_(other.base)
        for mine, theirs in ((problem.ids, other.ids), (problem.gates, other.gates)):
            if mine is not None:
                mine.copy_(theirs)
        if seed > 1:  # one slot gets another adapter, of a lower rank
            a, b = stack.factors(3)
            a.normal_(std=0.02)
            b.normal_()
            a[5:].zero_()
            b[5:].zero_()
            stack.scaling_E[3] = float(seed)
            stack.index.ranks_E[3] = 5
        graph.replay()
        assert torch.equal(y, problem.run())


@pytest.mark.parametrize("name", ["rows", "dense, long, R > 128", "tiles, ids per example", "tiles, sorted, top 2"])
def test_a_training_step_can_be_captured(name, cases, make_problem):
    problem = make_problem(cases[name], torch.bfloat16).trained()
    leaves = list(problem.leaves().values())
    dy = torch.randn_like(problem.base)
    graph, found = _captured(lambda: torch.autograd.grad(problem.run(), leaves, dy))
    with torch.no_grad():
        problem.x.copy_(torch.randn_like(problem.x))
        problem.ids.copy_(problem.ids.flip(0))
    graph.replay()
    expected = torch.autograd.grad(problem.run(), leaves, dy)
    assert [torch.equal(one, two) for one, two in zip(found, expected, strict=True)] == [True] * len(leaves)


@pytest.mark.parametrize("name", ["rows", "dense, ids", "tiles, sorted"])
def test_autocast_equals_a_cast_by_hand(name, cases, make_problem):
    problem = make_problem(cases[name], torch.float32)
    leaves = problem.leaves()
    with torch.autocast("cuda", torch.bfloat16):
        y = problem.run()
    halves = {key: leaf.to(torch.bfloat16) if key in ("x", "a", "b", "base") else leaf for key, leaf in leaves.items()}
    by_hand = problem.with_leaves(halves).run()
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, by_hand)


@pytest.mark.filterwarnings("ignore")  # of the compiler about its own parts
@pytest.mark.parametrize("name", ["rows, top 2", "dense, ids", "dense, long, R > 128", "tiles, ids per example",
                                  "tiles, sorted, top 2"])  # fmt: skip
def test_compiled_without_a_break_it_computes_the_same(name, cases, make_problem, frobenius_error):
    problem = make_problem(cases[name], torch.bfloat16).trained()
    leaves = list(problem.leaves().values())

    def step(x, base, gates):
        given = {} if gates is None else {"gates": gates}
        return problem.run(x=x * 2, base=base, **given).float().relu()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True)
    operands = (problem.x, problem.base, problem.gates)
    y, expected = compiled(*operands), step(*operands)
    assert frobenius_error(y.detach(), expected.detach().double()) <= 1e-5
    dy = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(one, leaves, dy) for one in (y, expected))
    for got, want in zip(found, wanted, strict=True):
        assert frobenius_error(got, want.double()) <= 6e-3
    with torch.no_grad():
        assert frobenius_error(compiled(*operands), expected.detach().double()) <= 1e-5


@pytest.mark.parametrize("name", ["rows, top 2", "dense, ids", "tiles, ids per example", "tiles, sorted, top 2"])
def test_torch_accepts_both_operators(name, cases, make_problem, monkeypatch):
    calls = {}
    for operator in ("_packed_lora", "_packed_lora_backward"):
        original = getattr(op, operator)

        def spy(*args, original=original, operator=operator):
            calls[operator] = (original, args)
            return original(*args)

        monkeypatch.setattr(op, operator, spy)
    problem = make_problem(cases[name], torch.bfloat16).trained()
    torch.autograd.grad(problem.run(), list(problem.leaves().values()), torch.ones_like(problem.base))
    for operator, (original, args) in calls.items():
        opcheck(original, args, test_utils=("test_schema", "test_faketensor"))
        assert operator in ("_packed_lora", "_packed_lora_backward")
    assert len(calls) == 2


def _checked_calls(problems, expected, mismatches, times: int) -> None:
    """Call every problem ``times`` times and count results that differ by a bit."""
    for _ in range(times):
        for problem, wanted in zip(problems, expected, strict=True):
            mismatches.add_((problem.run() != wanted).sum())


def test_a_hundred_thousand_replayed_calls_on_two_streams_stay_right(cases, make_problem, watchdog):
    """Each stream replays its own graph while a third multiplies large matrices; every single result is compared."""
    names, times, replays = ("rows", "rows, top 2", "dense, ids", "tiles, sorted, top 2"), 25, 500
    runs = []
    for seed in (1, 2):
        problems = [make_problem(cases[name], torch.bfloat16, seed=seed) for name in names]
        expected = [problem.run() for problem in problems]
        mismatches = torch.zeros((), dtype=torch.int64, device="cuda")
        graph, _ = _captured(lambda args=(problems, expected, mismatches, times): _checked_calls(*args))
        runs.append((graph, mismatches, torch.cuda.Stream(), problems, expected))
    left, right = torch.randn(2, 4096, 4096, device="cuda", dtype=torch.bfloat16)
    product = torch.empty_like(left)
    third = torch.cuda.Stream()
    torch.cuda.synchronize()
    for turn in range(replays):
        for graph, _, stream, _, _ in runs:
            with torch.cuda.stream(stream):
                graph.replay()
        with torch.cuda.stream(third):
            torch.mm(left, right, out=product)
        if turn % 20 == 0:
            torch.cuda.synchronize()
    torch.cuda.synchronize()
    assert times * replays * len(names) * len(runs) >= 100_000
    assert [int(mismatches) for _, mismatches, *_ in runs] == [0, 0]
