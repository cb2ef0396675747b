from __future__ import annotations

import pytest
import torch

from compose.kernels.grouped_lora import cpu, reference
from compose.kernels.grouped_lora.plan import plan_groups


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("equal_scaling", [False, True], ids=["scalings differ", "equal scalings"])
@pytest.mark.parametrize("strategy", ["rows", "stacked", "segments"])
@pytest.mark.parametrize("shape", [(6,), (6, 5)], ids=["rows", "tokens"])
def test_every_strategy_equals_the_reference(make_stack, shape, strategy, equal_scaling, trained):
    stack = make_stack(trained=trained, equal_scaling=equal_scaling)
    x, base = torch.randn(6, 5, 13, dtype=torch.float64), torch.randn(6, 5, 7, dtype=torch.float64)
    ids = torch.randint(-1, 5, shape)
    expected = reference.forward(x, stack, ids, base=base)
    plan = plan_groups(ids)
    for given in (base, None):  # the second call meets what the first gathered
        y = cpu.forward(x, stack, ids, base=given, plan=plan, strategy=strategy)
        torch.testing.assert_close(y, expected if given is not None else expected - base)


@pytest.mark.parametrize("strategy", ["rows", "stacked", "segments"])
@pytest.mark.parametrize("shape", [(6,), (6, 5)], ids=["rows", "tokens"])
def test_every_strategy_has_the_gradients_of_the_reference(make_stack, same_gradients, shape, strategy):
    stack = make_stack(trained=True)
    x, ids = torch.randn(6, 5, 13, dtype=torch.float64, requires_grad=True), torch.randint(-1, 5, shape)
    leaves = (x, stack.a_RD, stack.b_RO, stack.scaling_E)
    expected = torch.autograd.grad(reference.forward(x, stack, ids, base=None).square().sum(), leaves)
    y = cpu.forward(x, stack, ids, base=None, plan=plan_groups(ids), strategy=strategy)
    same_gradients(torch.autograd.grad(y.square().sum(), leaves), expected, leaves)


@pytest.mark.parametrize("strategy", ["single", "rows", "stacked", "segments"])
@pytest.mark.parametrize("changed", ["a_RD", "b_RO", "scaling_E"])
def test_what_a_plan_keeps_is_dropped_when_a_factor_is_written_to(make_stack, strategy, changed):
    stack, ids = make_stack(), torch.tensor([2, 2, 2])
    x, plan = torch.randn(3, 13, dtype=torch.float64), plan_groups(ids)
    before = cpu.forward(x, stack, ids, base=None, plan=plan, strategy=strategy)
    getattr(stack, changed).mul_(3.0)
    after = cpu.forward(x, stack, ids, base=None, plan=plan, strategy=strategy)
    torch.testing.assert_close(after, 3.0 * before)


def test_factors_are_gathered_once_per_plan_and_stack(make_stack, monkeypatch):
    calls = []
    gather = cpu._GATHER["rows"]
    monkeypatch.setitem(cpu._GATHER, "rows", lambda *args: calls.append(1) or gather(*args))
    stack, ids = make_stack(), torch.tensor([2, 0, 4])
    x, plan = torch.randn(3, 13, dtype=torch.float64), plan_groups(ids)
    for _ in range(3):
        cpu.forward(x, stack, ids, base=None, plan=plan, strategy="rows")
    assert len(calls) == 1
    cpu.forward(x, make_stack(), ids, base=None, plan=plan, strategy="rows")
    assert len(calls) == 2


def test_a_plan_lets_go_of_a_stack_that_is_gone(make_stack):
    stack, ids = make_stack(), torch.tensor([2, 0, 4])
    plan = plan_groups(ids)
    cpu.forward(torch.randn(3, 13, dtype=torch.float64), stack, ids, base=None, plan=plan, strategy="rows")
    assert len(plan.gathered) == 1
    del stack
    assert len(plan.gathered) == 0


def test_factors_that_begin_to_be_trained_get_their_gradients_through_an_old_plan(make_stack):
    stack, ids = make_stack(), torch.tensor([2, 0, 4])
    x, plan = torch.randn(3, 13, dtype=torch.float64), plan_groups(ids)
    cpu.forward(x, stack, ids, base=None, plan=plan, strategy="rows")
    stack.a_RD.requires_grad_()
    cpu.forward(x, stack, ids, base=None, plan=plan, strategy="rows").sum().backward()
    assert stack.a_RD.grad is not None
    assert stack.a_RD.grad[3:11].abs().min() > 0


@pytest.mark.parametrize("first", ["inference", "training"])
def test_inference_mode_and_training_can_share_a_plan(make_stack, first):
    stack, ids = make_stack(), torch.tensor([2, 0, 4])
    x, plan = torch.randn(3, 13, dtype=torch.float64), plan_groups(ids)
    expected = reference.forward(x, stack, ids, base=None)

    def infer() -> None:
        with torch.inference_mode():
            torch.testing.assert_close(cpu.forward(x, stack, ids, base=None, plan=plan, strategy="rows"), expected)

    def train() -> None:
        leaf = x.clone().requires_grad_()
        cpu.forward(leaf, stack, ids, base=None, plan=plan, strategy="rows").sum().backward()
        assert leaf.grad is not None

    for step in (infer, train) if first == "inference" else (train, infer):
        step()


@pytest.mark.parametrize(
    ("ranks", "ids", "tokens", "expected"),
    [
        ((8,) * 32, [5] * 32, 1, "single"),
        ((8,) * 32, [-1] * 32, 1, "none"),
        ((0, 8), [0] * 4, 1, "none"),
        ((8,) * 32, list(range(32)), 1, "rows"),
        ((8,) * 32, list(range(32)), 64, "rows"),
        ((1,) * 32, [0, 1] * 16, 1, "stacked"),
        ((8,) * 32, list(range(32)) * 64, 1, "segments"),
    ],
    ids=["one adapter", "none", "rank 0", "decode", "prompt", "few rank rows", "many entries"],
)
def test_the_policy_picks_the_measured_winner(make_stack, ranks, ids, tokens, expected):
    stack = make_stack(ranks, width=256, out=256, dtype=torch.float32)
    plan = plan_groups(torch.tensor(ids))
    assert cpu.choose(stack, plan, tokens * len(ids), cached=True) == expected
