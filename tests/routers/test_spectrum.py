"""The right spectrum of a product of factors: that of the dense product, at numerical rank."""

import pytest
import torch

from compose.kernels.stack import LoraStack
from compose.routers.spectrum import first_directions, right_spectrum


@pytest.mark.parametrize(("rank", "width", "out"), [(3, 8, 9), (8, 5, 9), (8, 9, 5), (1, 4, 4)])
def test_it_is_the_spectrum_of_the_product(rank, width, out) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(rank, width, dtype=torch.float64), torch.randn(rank, out, dtype=torch.float64)
    sigma, v = right_spectrum(a, b)
    wanted = torch.linalg.svdvals(b.T @ a)[: min(rank, width, out)]
    torch.testing.assert_close(sigma, wanted)
    torch.testing.assert_close(v @ v.T, torch.eye(len(v), dtype=torch.float64))
    torch.testing.assert_close((b.T @ a @ v.T).norm(dim=0), sigma)
    assert (v.gather(1, v.abs().argmax(1, keepdim=True)) > 0).all()


def test_directions_that_are_only_rounding_are_left_out() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(4, 6, dtype=torch.float64), torch.randn(4, 6, dtype=torch.float64)
    a[3] = a[0] + a[1]
    b[3] = 0
    assert len(right_spectrum(a, b).sigma_r) == 3
    assert len(right_spectrum(a, torch.zeros_like(b)).sigma_r) == 0
    assert len(right_spectrum(a[:0], b[:0]).sigma_r) == 0


def test_low_precision_factors_are_read_exactly() -> None:
    torch.manual_seed(0)
    a, b = torch.randn(2, 6).bfloat16(), torch.randn(2, 6).bfloat16()
    assert torch.equal(right_spectrum(a, b).v_rD, right_spectrum(a.double(), b.double()).v_rD)


def test_experts_without_factors_have_no_direction() -> None:
    stack = LoraStack(torch.randn(2, 4), torch.randn(2, 5), torch.ones(2), (0, 2))
    rows = first_directions(stack)
    assert rows[0].abs().sum() == 0
    torch.testing.assert_close(rows[1].norm(), torch.tensor(1.0))
