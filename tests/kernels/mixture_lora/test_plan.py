"""Plans: the same result with and without one, kept only while nothing it was made from has changed."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.mixture_lora import cpu
from compose.kernels.mixture_lora.op import MixturePlan, mixture_lora
from compose.kernels.mixture_lora.plan import keeps

CASES = {
    "parameters, whole batch": ("parameters", (5,), None),
    "parameters, per row": ("parameters", (3, 5), None),
    "sparse, whole batch": ("outputs", (1,), 1),
    "sparse, per row": ("outputs", (1, 1), 1),
}


def call(case, stack, tokens=4, dtype=torch.float64):
    combine, shape, chosen = CASES[case]
    gates = torch.randn(shape, dtype=dtype)
    indices = None if chosen is None else torch.randint(0, 5, shape)
    rows = shape[0] if len(shape) == 2 else 3
    x = torch.randn(rows, tokens, 13, dtype=dtype)
    return lambda plan: mixture_lora(x, stack, gates, indices, combine=combine, plan=plan, backend="cpu"), gates


@pytest.mark.parametrize("tokens", [1, 4])
@pytest.mark.parametrize("case", CASES)
def test_a_plan_changes_nothing_and_notices_writes(make_stack, case, tokens) -> None:
    stack = make_stack((8, 8, 8, 8, 8))
    run, gates = call(case, stack, tokens)
    plan = MixturePlan()
    torch.testing.assert_close(run(plan), run(None))
    torch.testing.assert_close(run(plan), run(None))
    for changed in (gates, stack.a_RD, stack.b_RO, stack.scaling_E):
        changed.mul_(1.7)
        torch.testing.assert_close(run(plan), run(None))


def test_indices_written_in_place_are_noticed_and_lines_are_shared_by_equal_ranks(make_stack) -> None:
    first, second = make_stack(), make_stack(width=9)
    gates, indices, plan = (
        torch.randn(3, 2, dtype=torch.float64),
        torch.tensor([[0, 3], [4, -1], [1, 2]]),
        MixturePlan(),
    )
    for stack, width in ((first, 13), (second, 9)):
        x = torch.randn(3, 4, width, dtype=torch.float64)
        for _ in range(2):
            found = cpu.forward(x, stack, gates, indices, base=None, combine="outputs", plan=plan, strategy="rows")
            torch.testing.assert_close(found, mixture_lora(x, stack, gates, indices, backend="reference"))
            indices.copy_(indices.flip(0))
    assert len(plan.lines) == 1


@pytest.mark.parametrize("case", ["parameters, whole batch", "parameters, per row", "sparse, whole batch"])
def test_a_second_call_makes_nothing_anew(make_stack, case, monkeypatch) -> None:
    stack, plan = make_stack((8, 8, 8, 8, 8)), MixturePlan()
    run, _ = call(case, stack)
    first = run(plan)
    (kept,) = plan.kept.values()
    kept.factors.b.zero_()  # only what is kept was changed, so a call that uses it returns zeros
    assert first.any()
    assert not run(plan).any()


def test_one_plan_serves_both_ways_to_combine(make_stack) -> None:
    stack, plan, gates = make_stack(), MixturePlan(), torch.randn(5, dtype=torch.float64)
    x = torch.randn(3, 4, 13, dtype=torch.float64)
    for combine in ("outputs", "parameters", "outputs"):
        found = mixture_lora(x, stack, gates, combine=combine, plan=plan, backend="cpu")
        torch.testing.assert_close(found, mixture_lora(x, stack, gates, combine=combine, backend="reference"))


def test_what_is_trained_or_larger_than_the_stack_is_not_kept(make_stack) -> None:
    stack, gates, plan = make_stack(), torch.randn(3, 5), MixturePlan()
    assert keeps(plan, stack, gates, stack.num_rows)
    assert not keeps(None, stack, gates, 1)
    assert not keeps(plan, stack, gates, stack.num_rows + 1)
    assert not keeps(plan, stack, gates.clone().requires_grad_(), 1)
    assert not keeps(plan, make_stack(trained=True), gates, 1)
    with torch.inference_mode():
        inferred = torch.randn(3, 5)
    assert not keeps(plan, stack, inferred, 1)
