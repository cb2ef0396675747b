from __future__ import annotations

import pytest
import torch

from compose.errors import BackendUnavailableError
from compose.kernels.grouped_lora import cpu, reference
from compose.kernels.grouped_lora.plan import plan_groups
from compose.kernels.stack import LoraStack

STRATEGIES = ["rows", "stacked", "segments", "padded", "bag"]
LOW_PRECISION = [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)]


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("equal_scaling", [False, True], ids=["scalings differ", "equal scalings"])
@pytest.mark.parametrize("strategy", STRATEGIES)
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


@pytest.mark.parametrize("strategy", STRATEGIES)
@pytest.mark.parametrize("shape", [(6,), (6, 5)], ids=["rows", "tokens"])
def test_every_strategy_has_the_gradients_of_the_reference(make_stack, same_gradients, shape, strategy):
    stack = make_stack(trained=True)
    x, ids = torch.randn(6, 5, 13, dtype=torch.float64, requires_grad=True), torch.randint(-1, 5, shape)
    leaves = (x, stack.a_RD, stack.b_RO, stack.scaling_E)
    expected = torch.autograd.grad(reference.forward(x, stack, ids, base=None).square().sum(), leaves)
    y = cpu.forward(x, stack, ids, base=None, plan=plan_groups(ids), strategy=strategy)
    same_gradients(torch.autograd.grad(y.square().sum(), leaves), expected, leaves)


@pytest.mark.parametrize("strategy", ["single", *STRATEGIES])
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


def _exact(stack: LoraStack) -> LoraStack:
    """The same numbers in float64, as leaves of their own."""
    a, b, scaling = (t.detach().double().requires_grad_() for t in (stack.a_RD, stack.b_RO, stack.scaling_E))
    return LoraStack(a, b, scaling, stack.ranks)


@pytest.mark.parametrize(("dtype", "bound"), LOW_PRECISION, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("expanded", [False, True], ids=["gradient", "expanded gradient"])
@pytest.mark.parametrize("ranks", [(3, 0, 8, 1, 16), (3, 3, 3, 3, 3), (8, 8, 8, 8, 8)], ids=str)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "grouped_mm"])
@pytest.mark.parametrize(
    "ids",
    [[0, 2, -1, 2, 4, 3], [4, 4, 4, 4, 4, 0], [[1, 1, 0, 2, 2]] * 3 + [[-1, 4, 4, 3, -1]] * 3],
    ids=["rows", "one takes most", "tokens"],
)
def test_every_strategy_in_low_precision_has_the_results_and_gradients_of_float64(
    make_stack, ids, strategy, ranks, expanded, dtype, bound
):
    stack = make_stack(ranks, 16, 24, dtype=dtype, trained=True)
    ids, exact = torch.tensor(ids), _exact(stack)
    x = torch.randn(6, 5, 16).to(dtype).requires_grad_()
    double = x.detach().double().requires_grad_()
    y = cpu.forward(x, stack, ids, base=None, plan=plan_groups(ids), strategy=strategy)
    expected = reference.forward(double, exact, ids, base=None)
    assert (y - expected).norm() <= bound * expected.norm()
    seed = torch.randn(6, 5, 24).to(dtype)
    losses = [t.sum() if expanded else (t * seed.to(t.dtype)).sum() for t in (y, expected)]
    got = torch.autograd.grad(losses[0], (x, stack.a_RD, stack.b_RO, stack.scaling_E))
    wanted = torch.autograd.grad(losses[1], (double, exact.a_RD, exact.b_RO, exact.scaling_E))
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine - theirs).norm() <= bound * theirs.norm()


@pytest.mark.parametrize(("dtype", "bound"), LOW_PRECISION, ids=["float32", "bfloat16"])
@pytest.mark.parametrize("ranks", [(3, 0, 8, 1, 16), (8, 8, 8, 8, 8)], ids=str)
@pytest.mark.parametrize("strategy", [*STRATEGIES, "grouped_mm", None])
@pytest.mark.parametrize(
    "ids", [[0, 2, -1, 2, 4, 3], [0, 0, 2, 2, 3, 4], [[4, 1, 0, 2, 2]] * 6], ids=["rows", "in order", "tokens"]
)
def test_without_gradients_every_strategy_equals_float64_and_base_is_its_callers(
    make_stack, ids, strategy, ranks, dtype, bound
):
    stack, ids = make_stack(ranks, 16, 16, dtype=dtype), torch.tensor(ids)
    plan = plan_groups(ids)
    x, base = torch.randn(6, 5, 16).to(dtype), torch.randn(6, 5, 16).to(dtype)
    kept = base.clone()
    expected = reference.forward(x.double(), _exact(stack), ids, base=base.double())
    for _ in range(2):  # the second call runs what the first prepared
        y = cpu.forward(x, stack, ids, base=base, plan=plan, strategy=strategy)
        assert (y - expected).norm() <= bound * expected.norm()
        torch.testing.assert_close(base, kept, rtol=0, atol=0)
    y = cpu.forward(x, stack, ids, base=base, plan=plan, strategy=strategy, reuse_base=True)
    assert (y - expected).norm() <= bound * expected.norm()
    fewer = cpu.forward(
        x[:, :2],
        stack,
        ids if ids.dim() == 1 else ids[:, :2],
        base=None,
        plan=plan_groups(ids if ids.dim() == 1 else ids[:, :2]),
        strategy=strategy,
    )
    assert (fewer - (expected - kept)[:, :2]).norm() <= bound * expected.norm()


def test_what_a_forward_needs_is_prepared_once_per_number_of_tokens(make_stack, monkeypatch):
    calls = []
    prepare = cpu._forward
    monkeypatch.setattr(cpu, "_forward", lambda *args: calls.append(args[-1]) or prepare(*args))
    stack, ids = make_stack(), torch.tensor([2, 0, 4])
    plan = plan_groups(ids)
    for tokens in (5, 5, 2, 5):
        x = torch.randn(3, tokens, 13, dtype=torch.float64)
        y = cpu.forward(x, stack, ids, base=None, plan=plan)
        torch.testing.assert_close(y, reference.forward(x, stack, ids, base=None))
    assert calls == [15, 6]
    trained = make_stack(trained=True)
    with torch.no_grad():
        for _ in range(2):  # nothing is kept that training may change
            cpu.forward(torch.randn(3, 13, dtype=torch.float64), trained, ids, base=None, plan=plan)
    assert calls == [15, 6, 3, 3]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_widths_that_grouped_mm_refuses_run_by_other_strategies(make_stack, dtype):
    stack = make_stack((3, 3, 3), 130, 130, dtype=dtype)
    x, ids = torch.randn(6, 130).to(dtype), torch.tensor([0, 1, 2, 0, 1, -1])
    plan = plan_groups(ids)
    with pytest.raises(BackendUnavailableError, match="rows of 130"):
        cpu.forward(x, stack, ids, base=None, plan=plan, strategy="grouped_mm")
    expected = reference.forward(x.double(), _exact(stack), ids, base=None)
    for strategy in (*STRATEGIES, None):
        y = cpu.forward(x, stack, ids, base=None, plan=plan, strategy=strategy)
        assert (y - expected).norm() <= 2e-2 * expected.norm()


def test_stacks_of_equal_ranks_share_a_layout_and_a_new_length_replaces_it(make_stack, monkeypatch):
    calls = []
    sort = cpu.sort_tokens
    monkeypatch.setattr(cpu, "sort_tokens", lambda *args, **kwargs: calls.append(1) or sort(*args, **kwargs))
    ids = torch.tensor([2, 0, 4])
    plan, first, second = plan_groups(ids), make_stack(), make_stack(width=9)
    for stack, tokens in ((first, 5), (first, 5), (second, 5), (first, 2)):
        x = torch.randn(3, tokens, stack.a_RD.shape[1], dtype=torch.float64)
        y = cpu.forward(x, stack, ids, base=None, plan=plan, strategy="segments")
        torch.testing.assert_close(y, reference.forward(x, stack, ids, base=None))
    assert len(calls) == 2
    assert len(plan.layouts) == 1


@pytest.mark.parametrize(
    ("ranks", "ids", "tokens", "dtype", "expected"),
    [
        ((8,) * 32, [5] * 32, 1, torch.float32, "single"),
        ((8,) * 32, [-1] * 32, 1, torch.float32, "none"),
        ((0, 8), [0] * 4, 1, torch.float32, "none"),
        ((8,) * 32, list(range(32)), 1, torch.float32, "rows"),
        ((8,) * 32, list(range(32)), 64, torch.float32, "rows"),
        ((1,) * 32, [0, 1] * 64, 1, torch.float32, "stacked"),
        ((64,) * 4, list(range(4)) * 512, 1, torch.float64, "segments"),
        ((16,) * 64, list(range(64)) * 16, 1, torch.bfloat16, "padded"),
    ],
    ids=["one adapter", "none", "rank 0", "decode", "prompt", "few rank rows", "float64", "bfloat16"],
)
@pytest.mark.parametrize("tiles", [True, False], ids=["AMX", "no AMX"])
def test_the_policy_picks_the_measured_winner(make_stack, monkeypatch, tiles, ranks, ids, tokens, dtype, expected):
    monkeypatch.setattr(cpu.policy, "multiplies_in_tiles", lambda: tiles)
    stack = make_stack(ranks, width=256, out=256, dtype=dtype)
    plan = plan_groups(torch.tensor(ids))
    assert cpu.choose(stack, plan, tokens * len(ids), training=False) == expected


def test_training_is_ranked_by_its_own_costs(make_stack, monkeypatch):
    asked = []
    fastest = cpu.policy.fastest
    monkeypatch.setattr(
        cpu.policy, "fastest", lambda *args, training: asked.append(training) or fastest(*args, training=training)
    )
    ids, x = torch.tensor([2, 0, 4]), torch.randn(3, 13, dtype=torch.float64)
    stack, plan = make_stack(), plan_groups(ids)
    cpu.forward(x, stack, ids, base=None, plan=plan)
    cpu.forward(x.requires_grad_(), stack, ids, base=None, plan=plan)
    with torch.no_grad():
        cpu.forward(x, stack, ids, base=None, plan=plan)
    trained = make_stack(trained=True)
    for _ in range(2):
        cpu.forward(x, trained, ids, base=None, plan=plan)
    assert asked == [False, True, True]  # and each was asked once
