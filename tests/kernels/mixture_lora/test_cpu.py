from __future__ import annotations

import pytest
import torch

from compose.kernels.mixture_lora import cpu, reference


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
    [(s, lead) for s in ("gather", "scatter") for lead in ((), (6,), (6, 5))] + [("pairs", (6, 5))],
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
    y = cpu.forward(x, stack, gates, indices, base=None, combine="outputs", strategy="gather")
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


@pytest.mark.parametrize(
    ("adapters", "shape", "tokens", "expected"),
    [
        (32, (2,), 64, "gather"),
        (3, (2,), 64, "scatter"),
        (8, (32, 1, 2), 32, "scatter"),
        (200, (32, 1, 2), 32, "gather"),
        (32, (32, 1, 2), 2048, "gather"),
        (8, (8, 64, 2), 512, "scatter"),
        (32, (32, 64, 1), 2048, "pairs"),
    ],
    ids=str,
)
def test_the_sparse_policy_picks_the_measured_winner(make_stack, adapters, shape, tokens, expected):
    stack = make_stack((8,) * adapters, width=256, out=256, dtype=torch.float32)
    assert cpu.choose_sparse(stack, torch.ones(shape), tokens) == expected
