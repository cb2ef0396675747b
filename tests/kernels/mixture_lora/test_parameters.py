from __future__ import annotations

import pytest
import torch

from compose.kernels.mixture_lora import parameters, reference


@pytest.mark.parametrize("ranks", [(3, 0, 8, 1, 16), (4, 4, 4, 4, 4)], ids=["padded", "equal ranks"])
@pytest.mark.parametrize("shape", [(5,), (6, 1, 5), (6, 4, 5)], ids=["factor sums", "per row", "contractions"])
def test_every_way_equals_the_reference(make_stack, ranks, shape):
    stack, gates = make_stack(ranks), torch.randn(shape, dtype=torch.float64)
    x, base = torch.randn(6, 4, 13, dtype=torch.float64), torch.randn(6, 4, 7, dtype=torch.float64)
    expected = reference.forward(x, stack, gates, None, base=base, combine="parameters")
    torch.testing.assert_close(parameters.forward(x, stack, gates, base), expected)


def test_a_sum_of_factors_has_cross_terms(make_stack):
    """Two adapters with gates 1: parameters minus outputs is ``√(s_0 s_1) (B_0 A_1 + B_1 A_0) x``."""
    stack = make_stack((2, 2), equal_scaling=True)
    x, gates = torch.randn(1, 4, 13, dtype=torch.float64), torch.ones(2, dtype=torch.float64)
    (a0, b0), (a1, b1) = stack.factors(0), stack.factors(1)
    cross = 0.5 * (x @ a1.T @ b0 + x @ a0.T @ b1)
    outputs = reference.forward(x, stack, gates, None, base=None, combine="outputs")
    torch.testing.assert_close(parameters.forward(x, stack, gates, None) - outputs, cross)
