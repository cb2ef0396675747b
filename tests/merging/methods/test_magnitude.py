"""magnitude against dense arithmetic and PEFT."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method


def deltas(dtype=torch.float64) -> Deltas:
    draw = torch.Generator().manual_seed(4)
    updates = [
        LowRank(
            torch.randn(rank, 31, generator=draw, dtype=torch.float64),
            torch.randn(23, rank, generator=draw, dtype=torch.float64),
            0.5 + number,
        )
        for number, rank in enumerate((3, 5, 2))
    ]
    return Deltas.of(updates, [1.0, -0.5, 0.7], dtype=dtype)


def merged(given: Deltas, **options) -> torch.Tensor:
    return make_method("magnitude", options).merge(given, Context()).dense()


@pytest.mark.parametrize("density", [0.0, 0.001, 0.2, 0.9, 1.0])
def test_magnitude_is_the_sum_of_the_largest_entries(density) -> None:
    given = deltas()
    expected = torch.zeros(23, 31, dtype=torch.float64)
    for x, weight in zip(given.rows(0, 23), given.weights, strict=True):
        places = x.abs().flatten().argsort(descending=True)[: int(density * 713)]
        expected.view(-1)[places] += weight * x.flatten()[places]
    assert_close(merged(given, density=density), expected, atol=1e-10, rtol=1e-10)
    assert_close(merged(given, density=density, scale=-2.0), -2 * expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parity_with_peft(dtype) -> None:
    peft = pytest.importorskip("peft.utils.merge_utils")
    given = deltas(dtype)
    expected = peft.magnitude_prune(list(given.rows(0, 23)), given.weights.to(dtype), 0.3)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(merged(given, density=0.3), expected, atol=tolerance, rtol=tolerance)


def test_a_density_out_of_range_is_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"density must lie in \[0, 1\], got 2"):
        make_method("magnitude", {"density": 2})
