"""karcher against dense log and exp maps, and against what defines the mean."""

import math

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method


def updates() -> list[LowRank]:
    generator = torch.Generator().manual_seed(11)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [LowRank(draw(r, 14), draw(11, r), 0.5 + number) for number, r in enumerate((3, 5, 2))]


def merged(given, weights, **options) -> torch.Tensor:
    deltas = Deltas.of(given, weights, target="lin", dtype=torch.float64)
    return make_method("karcher", options).merge(deltas, Context()).dense()


def log_map(base, point) -> torch.Tensor:
    theta = torch.acos(base @ point)
    return theta / torch.sin(theta) * (point - (base @ point) * base)


def textbook(given, share, steps) -> torch.Tensor:
    dense = torch.stack([update.delta().flatten() for update in given])
    lengths = dense.norm(dim=1)
    units = dense / lengths[:, None]
    base = share @ units
    base = base / base.norm()
    for _ in range(steps):
        step = sum(p * log_map(base, unit) for p, unit in zip(share, units, strict=True))
        base = torch.cos(step.norm()) * base + torch.sin(step.norm()) * step / step.norm()
    return ((share @ lengths) * base).view(11, 14)


@pytest.mark.parametrize("steps", [0, 1, 2, 5])
def test_every_step_is_the_dense_step(steps) -> None:
    share = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
    found = merged(updates(), (6.0, 1.0, 3.0), max_iter=steps, tol=0.0)
    assert_close(found, textbook(updates(), share, steps), atol=1e-10, rtol=1e-10)


def test_a_delta_of_zero_leaves_direction_and_steps_to_the_others() -> None:
    one, two, three = updates()
    nothing = LowRank(three.a, 0 * three.b, 1.0)
    found = merged([one, two, nothing], (3.0, 2.0, 5.0), max_iter=1, tol=0.0)
    share = torch.tensor([0.6, 0.4], dtype=torch.float64)
    assert_close(found, 0.5 * textbook([one, two], share, 1), atol=1e-10, rtol=1e-10)


def test_at_the_mean_the_logs_cancel() -> None:
    """The projected mean (multislerp) does not have this property."""
    share = torch.tensor([0.6, 0.1, 0.3], dtype=torch.float64)
    units = [update.delta().flatten() / update.norm() for update in updates()]
    residual = {}
    for steps in (0, 100):
        base = merged(updates(), (0.6, 0.1, 0.3), max_iter=steps, tol=1e-13).flatten()
        base = base / base.norm()
        residual[steps] = sum(p * log_map(base, unit) for p, unit in zip(share, units, strict=True)).norm()
    assert residual[100] < 1e-10
    assert residual[0] > 1e-3


def test_it_stops_at_the_tolerance() -> None:
    loose, exact = merged(updates(), (1, 2, 3), tol=10.0), merged(updates(), (1, 2, 3), max_iter=0)
    assert_close(loose, exact, atol=0, rtol=0)
    default, long = merged(updates(), (1, 2, 3)), merged(updates(), (1, 2, 3), max_iter=200, tol=1e-14)
    assert_close(default, long, atol=0, rtol=1e-2)


def test_two_adapters_of_one_length_meet_half_way() -> None:
    given = [LowRank(update.a, update.b, update.scaling / update.norm()) for update in updates()[:2]]
    slerp = make_method("slerp", {"t": 0.5}).merge(Deltas.of(given, (1, 1), dtype=torch.float64), Context())
    assert_close(merged(given, (1.0, 1.0), max_iter=50, tol=1e-14), slerp.dense(), atol=1e-10, rtol=1e-10)


def test_a_negative_weight_stands_for_the_negated_adapter() -> None:
    first, second, third = updates()
    negated = LowRank(second.a, -second.b, second.scaling)
    found, expected = merged(updates(), (1, -2, 1)), merged([first, negated, third], (1, 2, 1))
    assert_close(found, expected, atol=1e-12, rtol=1e-12)


def test_parallel_opposite_and_zero_deltas_are_defined() -> None:
    first = updates()[0]
    negative = LowRank(first.a, -first.b, first.scaling)
    nothing = LowRank(first.a, 0 * first.b, 1.0)
    assert_close(merged([first, first], (0.3, 0.7)), first.delta())
    assert not merged([first, negative], (1.0, 1.0)).any()
    assert_close(merged([first, negative], (3.0, 1.0)), first.delta())
    assert_close(merged([first, nothing], (1.0, 3.0)), 0.25 * first.delta())
    assert not merged([nothing, nothing], (1.0, 3.0)).any()


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="'karcher' needs a weight that is not 0"):
        merged(updates(), (0.0, 0.0, 0.0))
    with pytest.raises(IncompatibleError, match="max_iter must be at least 0, got -1"):
        make_method("karcher", {"max_iter": -1})
    with pytest.raises(IncompatibleError, match="tol must be a finite number, got nan"):
        make_method("karcher", {"tol": math.nan})
