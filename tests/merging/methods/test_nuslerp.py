"""nuslerp against the dense formula for the whole delta, every row and every column."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


FIRST = LowRank(draw(3, 14, seed=1), draw(11, 3, seed=2), 0.5)
SECOND = LowRank(draw(5, 14, seed=3), draw(11, 5, seed=4), 1.5)
WEIGHTS = (3.0, 1.0)


def merged(updates, weights=WEIGHTS, **options):
    deltas = Deltas.of(updates, weights, target="lin", dtype=torch.float64)
    return make_method("nuslerp", options).merge(deltas, Context())


def textbook(first, second, t) -> torch.Tensor:
    """Of two vectors; straight where one is 0 or both lie on a line."""
    if not first.any() or not second.any():
        return (1 - t) * first + t * second
    cosine = (first @ second / (first.norm() * second.norm())).clamp(-1, 1)
    theta = torch.acos(cosine)
    if torch.sin(theta) < 1e-6:
        return (1 - t) * first + t * second
    return (torch.sin((1 - t) * theta) * first + torch.sin(t * theta) * second) / torch.sin(theta)


def test_flattened_it_has_one_angle() -> None:
    expected = textbook(FIRST.delta().flatten(), SECOND.delta().flatten(), 0.25).view(11, 14)
    assert_close(merged([FIRST, SECOND]).dense(), expected, atol=1e-10, rtol=1e-10)


def test_row_wise_it_has_one_angle_per_row() -> None:
    rows = zip(FIRST.delta(), SECOND.delta(), strict=True)
    expected = torch.stack([textbook(x, y, 0.25) for x, y in rows])
    found = merged([FIRST, SECOND], flatten=False, row_wise=True)
    assert found.a.shape == (8, 14)
    assert_close(found.dense(), expected, atol=1e-10, rtol=1e-10)


def test_otherwise_it_has_one_angle_per_column() -> None:
    columns = zip(FIRST.delta().T, SECOND.delta().T, strict=True)
    expected = torch.stack([textbook(x, y, 0.25) for x, y in columns], dim=1)
    found = merged([FIRST, SECOND], flatten=False)
    assert found.b.shape == (11, 8)
    assert_close(found.dense(), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [{}, {"flatten": False}, {"flatten": False, "row_wise": True}])
def test_lines_without_an_angle_are_interpolated_straight(options) -> None:
    negative = LowRank(FIRST.a, -FIRST.b, 0.5)
    nothing = LowRank(SECOND.a, 0 * SECOND.b, 1.0)
    assert_close(merged([FIRST, FIRST], **options).dense(), FIRST.delta())
    assert_close(merged([FIRST, negative], **options).dense(), 0.5 * FIRST.delta())
    assert_close(merged([FIRST, nothing], **options).dense(), 0.75 * FIRST.delta())
    assert_close(merged([nothing, FIRST], **options).dense(), 0.25 * FIRST.delta())


def test_small_angles_are_still_angles() -> None:
    """Unlike slerp, which goes straight above a cosine of 0.9995."""
    near = LowRank(torch.cat([FIRST.a, SECOND.a]), torch.cat([FIRST.b, 1e-3 * SECOND.b], dim=1), 0.5)
    expected = textbook(FIRST.delta().flatten(), near.delta().flatten(), 0.25).view(11, 14)
    straight = 0.75 * FIRST.delta() + 0.25 * near.delta()
    assert (expected - straight).norm() > 1e-8
    assert_close(merged([FIRST, near]).dense(), expected, atol=1e-10, rtol=1e-10)


def test_one_row_of_zeros_leaves_the_others_alone() -> None:
    b = FIRST.b.clone()
    b[4] = 0.0
    holed = LowRank(FIRST.a, b, 0.5)
    rows = zip(holed.delta(), SECOND.delta(), strict=True)
    expected = torch.stack([textbook(x, y, 0.25) for x, y in rows])
    found = merged([holed, SECOND], flatten=False, row_wise=True).dense()
    assert_close(found[4], 0.25 * SECOND.delta()[4])
    assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="row_wise=True needs flatten=False"):
        make_method("nuslerp", {"row_wise": True})
    with pytest.raises(IncompatibleError, match="'nuslerp' takes exactly two adapters, got 1"):
        merged([FIRST], (1.0,))
    with pytest.raises(IncompatibleError, match="'nuslerp' divides by the sum of the weights"):
        merged([FIRST, SECOND], (1.0, -1.0))
