"""slerp against the dense formula, and where there is no angle."""

import math

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method


def draw(*shape: int, seed: int = 6) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FIRST = LowRank(draw(3, 14), draw(11, 3, seed=7), 0.5)
SECOND = LowRank(draw(5, 14, seed=8), draw(11, 5, seed=9), 1.5)


def merged(updates, weights=(1.0, 1.0), **options) -> torch.Tensor:
    deltas = Deltas.of(updates, weights, target="lin", dtype=torch.float64)
    return make_method("slerp", options).merge(deltas, Context()).dense()


def textbook(first, second, t) -> torch.Tensor:
    theta = torch.acos((first * second).sum() / (first.norm() * second.norm()))
    return (torch.sin((1 - t) * theta) * first + torch.sin(t * theta) * second) / torch.sin(theta)


@pytest.mark.parametrize("t", [0.0, 0.3, 1.0, 1.4, -0.2])
def test_it_is_the_dense_formula_at_the_given_t(t) -> None:
    expected = textbook(FIRST.delta(), SECOND.delta(), t)
    assert_close(merged([FIRST, SECOND], t=t), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("weights", [(3.0, 1.0), (1.0, 1.0), (2.0, -0.5)])
def test_weights_give_t(weights) -> None:
    expected = textbook(FIRST.delta(), SECOND.delta(), weights[1] / sum(weights))
    assert_close(merged([FIRST, SECOND], weights), expected, atol=1e-10, rtol=1e-10)


def test_between_unit_deltas_it_stays_on_the_sphere() -> None:
    units = [LowRank(u.a, u.b, u.scaling / u.norm()) for u in (FIRST, SECOND)]
    for t in (0.2, 0.5, 0.8):
        assert float(merged(units, t=t).norm()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize(("cosine", "straight"), [(0.9994, False), (0.9996, True), (-0.9996, True)])
def test_nearly_parallel_deltas_are_interpolated_straight(cosine, straight) -> None:
    first, second = torch.zeros(2, 2, 4, dtype=torch.float64)
    first[0, 0] = 1.0
    second[0, 0], second[0, 1] = 2 * cosine, 2 * math.sqrt(1 - cosine**2)
    eye = torch.eye(2, dtype=torch.float64)
    expected = 0.7 * first + 0.3 * second if straight else textbook(first, second, 0.3)
    found = merged([LowRank(first, eye, 1.0), LowRank(second, eye, 1.0)], t=0.3)
    assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_parallel_antiparallel_and_zero_deltas_are_defined() -> None:
    negative = LowRank(FIRST.a, -FIRST.b, 0.5)
    nothing = LowRank(SECOND.a, 0 * SECOND.b, 1.0)
    assert_close(merged([FIRST, FIRST], t=0.3), FIRST.delta())
    assert_close(merged([FIRST, negative], t=0.25), 0.5 * FIRST.delta())
    assert_close(merged([FIRST, nothing], t=0.25), 0.75 * FIRST.delta())
    assert not merged([nothing, nothing], t=0.25).any()


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="lin: merge method 'slerp' takes exactly two adapters, got 3"):
        merged([FIRST, SECOND, FIRST], (1.0, 1.0, 1.0))
    with pytest.raises(IncompatibleError, match="'slerp' divides by the sum of the weights"):
        merged([FIRST, SECOND], (1.0, -1.0))
    with pytest.raises(IncompatibleError, match="t must be a finite number"):
        make_method("slerp", {"t": math.nan})
