from __future__ import annotations

import math

import pytest
import torch

from compose.errors import BackendUnavailableError
from compose.kernels.mixture_lora import cpu, reference
from compose.kernels.mixture_lora.plan import MixturePlan
from compose.kernels.stack import LoraStack


@pytest.mark.parametrize("ranks", [(3, 0, 8, 1, 16), (4, 4, 4, 4, 4)], ids=str)
@pytest.mark.parametrize("strategy", ["select", "stacked"])
@pytest.mark.parametrize("active", [(2,), (0, 3), (0, 1, 2, 3, 4)], ids=str)
def test_every_dense_strategy_equals_the_reference(make_stack, active, strategy, ranks):
    stack, x = make_stack(ranks), torch.randn(6, 5, 13, dtype=torch.float64)
    base, gates = torch.randn(6, 5, 7, dtype=torch.float64), torch.zeros(5, dtype=torch.float64)
    gates[list(active)] = torch.randn(len(active), dtype=torch.float64)
    expected = reference.forward(x, stack, gates, None, base=base, combine="outputs")
    y = cpu.forward(x, stack, gates, None, base=base, combine="outputs", strategy=strategy)
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("ranks", [(3, 0, 8, 1, 16), (4, 4, 4, 4, 4)], ids=str)
@pytest.mark.parametrize(
    ("strategy", "lead"),
    [(s, lead) for s in ("rows", "stacked") for lead in ((), (6,), (6, 5))]
    + [(s, (6, 5)) for s in ("segments", "padded", "bag")],
    ids=str,
)
@pytest.mark.parametrize("unused", [False, True], ids=["all used", "with -1"])
def test_every_sparse_strategy_equals_the_reference_with_its_gradients(
    make_stack, same_gradients, strategy, lead, ranks, unused
):
    stack, x = make_stack(ranks, trained=True), torch.randn(6, 5, 13, dtype=torch.float64, requires_grad=True)
    base = torch.randn(6, 5, 7, dtype=torch.float64)
    gates = torch.randn(*lead, 3, dtype=torch.float64, requires_grad=True)
    indices = torch.randint(-1 if unused else 0, 5, (*lead, 3))
    leaves = (x, gates, stack.a_RD, stack.b_RO, stack.scaling_E)
    expected = reference.forward(x, stack, gates, indices, base=base, combine="outputs")
    y = cpu.forward(x, stack, gates, indices, base=base, combine="outputs", strategy=strategy)
    torch.testing.assert_close(y, expected)
    gradients = [torch.autograd.grad(result.square().sum(), leaves) for result in (y, expected)]
    same_gradients(*gradients, leaves)


def test_gathering_an_unused_place_reads_no_other_adapter(make_stack):
    stack = make_stack((2, 2, 1))
    stack.a_RD[0] = float("nan")  # the first row of adapter 0 fills unused places
    x, gates = torch.randn(2, 3, 13, dtype=torch.float64), torch.ones(2, 2, dtype=torch.float64)
    indices = torch.tensor([[1, -1], [2, -1]])
    y = cpu.forward(x, stack, gates, indices, base=None, combine="outputs", strategy="rows")
    assert y.isfinite().all()


def test_scatter_adds_repeated_indices_and_drops_unused_ones():
    dense = cpu.scatter(torch.tensor([[1.0, 2.0, 4.0]]), torch.tensor([[1, 1, -1]]), 3)
    torch.testing.assert_close(dense, torch.tensor([[0.0, 3.0, 0.0]]))


@pytest.mark.parametrize(
    ("gates", "expected"),
    [
        (torch.zeros(20), "none"),
        (torch.eye(20)[3], "select"),
        (torch.arange(20) % 2 * 1.0, "select"),
        (torch.ones(20), "stacked"),
        (torch.ones(4, 1, 20), "stacked"),
        (torch.eye(20)[3].requires_grad_(), "stacked"),
    ],
    ids=["all zero", "one", "half", "all", "per row", "trained"],
)
def test_zero_gates_are_skipped_where_that_is_exact_and_pays(make_stack, gates, expected):
    stack = make_stack((4,) * 20)
    assert cpu.choose_dense(stack, cpu.active_gates(stack, gates)) == expected


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)], ids=str)
@pytest.mark.parametrize("ranks", [(3, 0, 8, 1, 16), (3,) * 5, (8,) * 5], ids=str)
@pytest.mark.parametrize("strategy", ["rows", "stacked", "segments", "grouped_mm", "padded", "bag"])
@pytest.mark.parametrize("chosen", [1, 2])
def test_every_strategy_in_low_precision_has_the_results_and_gradients_of_float64(
    make_stack, chosen, strategy, ranks, dtype, bound
):
    """Adapters named twice, -1, rank 0, and the expanded gradient of a sum."""
    stack = make_stack(ranks, 16, 24, dtype=dtype, trained=True)
    x, gates = torch.randn(6, 5, 16).to(dtype).requires_grad_(), torch.rand(6, 5, chosen, requires_grad=True)
    indices = torch.randint(-1, 4, (6, 5, chosen))
    indices[0] = 2
    leaves = [x, gates, stack.a_RD, stack.b_RO, stack.scaling_E]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    y = cpu.forward(x, stack, gates, indices, base=None, combine="outputs", strategy=strategy)
    expected = reference.forward(
        exact[0], LoraStack(*exact[2:], ranks), exact[1], indices, base=None, combine="outputs"
    )
    assert (y - expected).norm() <= bound * expected.norm()
    for mine, theirs in zip(
        torch.autograd.grad(y.sum(), leaves), torch.autograd.grad(expected.sum(), exact), strict=True
    ):
        assert (mine - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize("strategy", ["rows", "stacked", "segments", "grouped_mm", "padded", "bag", None])
def test_tokens_that_choose_nothing_get_base(make_stack, strategy):
    stack, base = make_stack((8, 0), 16, 24, dtype=torch.float32), torch.randn(2, 3, 24)
    indices = torch.tensor([-1, 1]).expand(2, 3, 2)
    x, gates = torch.randn(2, 3, 16), torch.rand(2, 3, 2)
    y = cpu.forward(x, stack, gates, indices, base=base, combine="outputs", strategy=strategy)
    torch.testing.assert_close(y, base)


def test_widths_that_grouped_mm_refuses_run_by_other_strategies(make_stack):
    stack = make_stack((3, 3, 3), 130, 130, dtype=torch.float32)
    operands = (torch.randn(2, 3, 130), stack, torch.rand(2, 3, 2), torch.randint(0, 3, (2, 3, 2)))
    with pytest.raises(BackendUnavailableError, match="rows of 130"):
        cpu.forward(*operands, base=None, combine="outputs", strategy="grouped_mm")
    y = cpu.forward(*operands, base=None, combine="outputs")
    x, _, gates, indices = operands
    exact = LoraStack(stack.a_RD.double(), stack.b_RO.double(), stack.scaling_E, stack.ranks)
    expected = reference.forward(x.double(), exact, gates.double(), indices, base=None, combine="outputs")
    assert (y - expected).norm() <= 2e-6 * expected.norm()  # a float32 sum may differ from another one by more


@pytest.mark.parametrize(
    ("adapters", "shape", "tokens", "expected"),
    [
        (32, (2,), 64, {"rows"}),
        (3, (2,), 64, {"stacked"}),
        (2, (32, 1, 1), 32, {"stacked"}),
        (200, (32, 1, 2), 32, {"rows"}),
        (32, (32, 1, 2), 2048, {"rows"}),
        (2, (8, 16, 1), 128, {"stacked", "bag"}),
        (64, (32, 64, 1), 2048, {"segments", "grouped_mm", "padded"}),
    ],
    ids=str,
)
def test_the_sparse_policy_picks_what_was_fast_when_measured(make_stack, adapters, shape, tokens, expected):
    stack = make_stack((8,) * adapters, width=1024, out=1024, dtype=torch.float32)
    indices = torch.arange(math.prod(shape)).reshape(shape) % adapters
    assert cpu.choose_sparse(stack, indices, tokens, training=False) in expected


def test_factors_that_are_kept_are_ranked_by_the_costs_of_kept_ones(make_stack, monkeypatch):
    asked = []
    monkeypatch.setattr(cpu.policy, "fastest", lambda op, *args, **kwargs: asked.append(op) or "rows")
    stack, x = make_stack((2,) * 40, dtype=torch.float64), torch.randn(3, 13, dtype=torch.float64)
    gates, indices = torch.rand(3, 2, dtype=torch.float64), torch.randint(0, 40, (3, 2))
    for plan in (None, MixturePlan()):
        cpu.forward(x, stack, gates, indices, base=None, combine="outputs", plan=plan)
    assert asked == ["mixture", "grouped"]
