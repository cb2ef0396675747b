from __future__ import annotations

import pytest
import torch

from compose.kernels.lowrank import add_lowrank_, lowrank

SHARED, PER_ROW = (4, 5), (2, 4, 5)


def _operands(factors: tuple[int, ...], c_shape: tuple[int, ...], trained: str) -> list[torch.Tensor]:
    """x (2, 3, 5), a, b (.., 4, 6), c, base (2, 3, 6); ``trained`` names those that need a gradient."""
    shapes = {"x": (2, 3, 5), "a": factors, "b": (*factors[:-1], 6), "c": c_shape, "y": (2, 3, 6)}
    return [torch.randn(shape, dtype=torch.float64, requires_grad=name in trained) for name, shape in shapes.items()]


@pytest.mark.parametrize("trained", ["x", "a", "b", "c", "y", "xc", "ab", "xabcy"])
@pytest.mark.parametrize("c_shape", [(4,), (2, 1, 4), (2, 3, 4), (1,)], ids=str)
@pytest.mark.parametrize("factors", [SHARED, PER_ROW], ids=["shared", "per-row"])
def test_gradients_equal_numerical_ones_for_every_set_of_trained_operands(factors, c_shape, trained):
    assert torch.autograd.gradcheck(lowrank, _operands(factors, c_shape, trained))


@pytest.mark.parametrize("factors", [SHARED, PER_ROW], ids=["shared", "per-row"])
def test_a_number_equals_a_tensor_of_coefficients(factors):
    x, a, b, _, base = _operands(factors, (4,), "xa")
    c = torch.full((4,), 0.3, dtype=torch.float64)
    for given in (base, None):
        torch.testing.assert_close(lowrank(x, a, b, 0.3, given), lowrank(x, a, b, c, given))
        with torch.no_grad():
            torch.testing.assert_close(lowrank(x, a, b, 0.3, given), lowrank(x, a, b, c, given))
    (gradient,) = torch.autograd.grad(lowrank(x, a, b, 0.3, base).sum(), a)
    (expected,) = torch.autograd.grad(lowrank(x, a, b, c, base).sum(), a)
    torch.testing.assert_close(gradient, expected)


def _saved_shapes(operands: list[torch.Tensor]) -> list[tuple[int, ...]]:
    saved: list[tuple[int, ...]] = []

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        saved.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lowrank(*operands)
    return saved


def test_frozen_factors_save_h_and_coefficients_but_not_x():
    saved = _saved_shapes(_operands(SHARED, (2, 1, 4), "xc"))
    assert (2, 3, 5) not in saved
    assert sorted(saved) == sorted([(4, 5), (4, 6), (2, 1, 4), (2, 3, 4)])


def test_with_only_x_differentiated_nothing_of_the_batch_size_is_saved():
    assert sorted(_saved_shapes(_operands(SHARED, (4,), "x"))) == sorted([(4, 5), (4, 6), (4,)])


def test_backward_leaves_saved_tensors_alone_so_it_can_run_twice():
    operands = _operands(SHARED, (2, 1, 4), "xabcy")
    y = lowrank(*operands)
    first = torch.autograd.grad(y.square().sum(), operands, retain_graph=True)
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), operands), first)


def test_an_expanded_gradient_is_accepted():
    operands = _operands(PER_ROW, (2, 1, 4), "xabcy")
    expected = torch.autograd.grad((lowrank(*operands) * torch.ones(2, 3, 6, dtype=torch.float64)).sum(), operands)
    torch.testing.assert_close(torch.autograd.grad(lowrank(*operands).sum(), operands), expected)


@pytest.mark.parametrize("factors", [SHARED, PER_ROW], ids=["shared", "per-row"])
def test_base_is_written_only_when_given_up(factors):
    x, a, b, c, base = _operands(factors, (2, 1, 4), "")
    before = base.clone()
    expected = lowrank(x, a, b, c, base)
    lowrank(x.clone().requires_grad_(), a, b, c, base)
    torch.testing.assert_close(base, before, rtol=0, atol=0)
    y = lowrank(x, a, b, c, base, reuse_base=True)
    assert y.data_ptr() == base.data_ptr()
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("factors", [SHARED, PER_ROW], ids=["shared", "per-row"])
def test_a_base_given_up_is_written_under_autograd_with_the_same_gradients(factors):
    operands = _operands(factors, (2, 1, 4), "xabcy")
    x, a, b, c, base = operands
    expected = torch.autograd.grad(lowrank(x, a, b, c, base * 1.0).square().sum(), operands)
    given = base * 1.0  # the output of something that did not save it
    y = lowrank(x, a, b, c, given, reuse_base=True)
    assert y.data_ptr() == given.data_ptr()
    torch.testing.assert_close(torch.autograd.grad(y.square().sum(), operands), expected)


def test_a_trained_base_or_a_view_is_never_written():
    x, a, b, c, base = _operands(SHARED, (4,), "xy")
    before = base.detach().clone()
    assert lowrank(x, a, b, c, base, reuse_base=True).data_ptr() != base.data_ptr()
    whole = (base * 1.0).flatten()
    y = lowrank(x, a, b, c, whole.view(base.shape), reuse_base=True)
    torch.testing.assert_close(whole, before.flatten(), rtol=0, atol=0)
    y.sum().backward()
    torch.testing.assert_close(base.grad, torch.ones_like(base))


def test_a_base_that_something_saved_is_not_changed_in_silence():
    x, a, b, c, base = _operands(SHARED, (4,), "xy")
    saved = base.exp()  # exp keeps its result for backward
    y = lowrank(x, a, b, c, saved, reuse_base=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_memory_that_cannot_be_written_safely_is_never_reused():
    x, a, b, c, base = _operands(SHARED, (4,), "")
    row = base[:1].expand(2, 3, 6)  # both batch rows share memory
    torch.testing.assert_close(lowrank(x, a, b, c, row, reuse_base=True), lowrank(x, a, b, c, row.clone()))
    with torch.inference_mode():
        frozen = base.clone()
    y = lowrank(x, a, b, c, frozen, reuse_base=True)
    torch.testing.assert_close(y, lowrank(x, a, b, c, base))


@pytest.mark.parametrize("c_shape", [(2, 1, 4), (2, 3, 4)], ids=str)
def test_the_fewest_operators_compute_the_same_in_place(c_shape):
    x, a, b, c, base = _operands(SHARED, c_shape, "")
    want = lowrank(x, a, b, c, base)
    found = add_lowrank_(base, x, a, b, c)
    assert found is base
    torch.testing.assert_close(found, want)
