from __future__ import annotations

import pytest
import torch

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack


def test_row_coefficients_repeat_each_gate_times_its_scaling(make_stack):
    stack = make_stack((2, 0, 1))
    gates = torch.tensor([[1.0, 5.0, 3.0], [2.0, 7.0, -1.0]])
    s = stack.scaling_E.tolist()
    expected = torch.tensor([[s[0], s[0], 3 * s[2]], [2 * s[0], 2 * s[0], -s[2]]])
    torch.testing.assert_close(stack.row_coefficients(gates), expected)


def test_row_coefficients_of_equal_ranks_are_those_of_picked_columns(make_stack):
    stack = make_stack((3, 3))
    gates = torch.randn(2, 4, 2, dtype=torch.float64, requires_grad=True)
    expected = (gates * stack.scaling_E.double()).index_select(-1, stack.index.adapter_R)
    found = stack.row_coefficients(gates)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    assert found.is_contiguous()
    seed = torch.randn(2, 4, 6, dtype=torch.float64)
    torch.testing.assert_close(*(torch.autograd.grad((c * seed).sum(), gates)[0] for c in (found, expected)))


def test_index_tells_owner_position_and_rows():
    stack = LoraStack(torch.zeros(3, 2), torch.zeros(3, 2), torch.ones(3), (2, 0, 1))
    assert stack.offsets == (0, 2, 2, 3)
    assert stack.index.adapter_R.tolist() == [0, 0, 2]
    assert stack.index.position_R.tolist() == [0, 1, 0]
    assert stack.index.table_Er.tolist() == [[0, 1], [0, 0], [2, 2], [0, 0]]
    assert stack.index.valid_Er.tolist() == [[True, True], [False, False], [True, False], [False, False]]


def test_factors_are_views_of_one_adapter(make_stack):
    stack = make_stack((2, 0, 1))
    a, b = stack.factors(2)
    torch.testing.assert_close(a, stack.a_RD[2:])
    torch.testing.assert_close(b, stack.b_RO[2:])
    assert a.data_ptr() == stack.a_RD[2:].data_ptr()


def test_versions_change_with_an_in_place_write_and_are_absent_where_nothing_may_be_cached(make_stack):
    stack = make_stack()
    before = stack.versions()
    stack.b_RO.mul_(2.0)
    assert before is not None
    assert stack.versions() != before
    assert make_stack(trained=True).versions() is None
    with torch.inference_mode():
        assert make_stack().versions() is None


def test_cast_is_kept_until_a_factor_is_written_to(make_stack):
    stack = make_stack()
    first = stack.cast(torch.float32)
    assert stack.cast(torch.float32) is first
    assert stack.cast(torch.float64) is stack
    stack.a_RD.mul_(2.0)
    torch.testing.assert_close(stack.cast(torch.float32).a_RD, 2 * first.a_RD)


def test_cast_of_trained_factors_passes_gradients(make_stack):
    stack = make_stack(trained=True)
    stack.cast(torch.float32).a_RD.sum().backward()
    torch.testing.assert_close(stack.a_RD.grad, torch.ones_like(stack.a_RD))


def test_an_empty_stack_is_allowed():
    stack = LoraStack(torch.zeros(0, 4), torch.zeros(0, 3), torch.ones(2), (0, 0))
    assert (stack.num_adapters, stack.num_rows, stack.max_rank) == (2, 0, 0)
    assert stack.row_coefficients(torch.ones(5, 2)).shape == (5, 0)


def test_ranks_that_do_not_add_up_are_refused():
    with pytest.raises(IncompatibleError, match="give 5 rows"):
        LoraStack(torch.zeros(4, 2), torch.zeros(4, 2), torch.ones(2), (3, 2))


def test_gates_are_spread_by_a_product_as_by_picking_columns(make_stack):
    stack, gates = make_stack((2, 0, 3)), torch.randn(2, 4, 3)
    spread = stack.spread()
    assert spread is not None
    assert not spread.complete
    picked = (gates * stack.scaling_E).index_select(-1, stack.index.adapter_R)
    torch.testing.assert_close(stack.row_coefficients(gates), picked)
    wide = torch.cat([torch.full((2, 4, 1), 7.0), gates], -1)  # gates of no adapter come to nothing
    torch.testing.assert_close(torch.nn.functional.linear(wide, spread.wide), picked)


@pytest.mark.parametrize(
    ("ranks", "scalings", "even"),
    [((2, 2), (0.5, 0.5), (2, 0.5)), ((2, 2), (0.5, 1.0), None), ((2, 1), (0.5, 0.5), None), ((3,), (2.0,), (3, 2.0))],
)
def test_adapters_that_are_all_alike_are_known(ranks, scalings, even):
    rows = sum(ranks)
    stack = LoraStack(torch.zeros(rows, 4), torch.zeros(rows, 4), torch.tensor(scalings), ranks)
    assert stack.spread().even == even


def test_a_new_scaling_is_noticed_and_a_trained_one_gets_its_gradient(make_stack):
    stack, gates = make_stack((2, 1)), torch.ones(3, 2)
    before = stack.row_coefficients(gates)
    stack.scaling_E.mul_(2)
    torch.testing.assert_close(stack.row_coefficients(gates), 2 * before)
    stack.scaling_E.requires_grad_(True)
    assert stack.spread() is None
    (gradient,) = torch.autograd.grad(stack.row_coefficients(gates).sum(), stack.scaling_E)
    assert gradient.tolist() == [6.0, 3.0]


def test_gates_are_not_rounded_by_autocast(make_stack):
    stack, gates = make_stack((2, 1)), torch.randn(3, 2)
    want = stack.row_coefficients(gates)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(stack.row_coefficients(gates), want, rtol=0, atol=0)


def test_an_index_made_in_inference_mode_serves_training_too():
    with torch.inference_mode():
        a, b = torch.zeros(3, 4).clone(), torch.zeros(3, 4).clone()
    with torch.inference_mode():
        stack = LoraStack(a, b, torch.ones(2), (2, 1))
    assert not any(tensor.is_inference() for tensor in stack.index)
