"""mean against the dense weighted average."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method


def deltas(weights) -> Deltas:
    generator = torch.Generator().manual_seed(4)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    updates = [LowRank(draw(r, 14), draw(11, r), 0.5 + number) for number, r in enumerate((3, 5, 2))]
    return Deltas.of(updates, weights, names="abc", target="lin", dtype=torch.float64)


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, -0.5, 3.0), (-1.0, -2.0, 0.0)])
def test_it_is_the_dense_weighted_average(weights) -> None:
    given = deltas(weights)
    dense = [b @ a for a, b in zip(given.a, given.b, strict=True)]
    expected = sum(weight * delta for weight, delta in zip(weights, dense, strict=True)) / sum(weights)
    assert_close(make_method("mean", {}).merge(given, Context()).dense(), expected, atol=1e-10, rtol=1e-10)


def test_only_the_ratios_of_the_weights_matter() -> None:
    found, tenfold = (make_method("mean", {}).merge(deltas(w), Context()) for w in [(1, 2, 1), (10, 20, 10)])
    assert_close(found.dense(), tenfold.dense(), atol=1e-12, rtol=1e-12)


def test_weights_that_sum_to_zero_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="'mean' divides by the sum of the weights"):
        make_method("mean", {}).merge(deltas((1.0, -3.0, 2.0)), Context())
