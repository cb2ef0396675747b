"""multislerp against its dense formula, and against projection, tangent mean and exponential map step by step."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method


def updates() -> list[LowRank]:
    generator = torch.Generator().manual_seed(10)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [LowRank(draw(r, 14), draw(11, r), 0.5 + number) for number, r in enumerate((3, 5, 2))]


def merged(given, weights, **options) -> torch.Tensor:
    deltas = Deltas.of(given, weights, target="lin", dtype=torch.float64)
    return make_method("multislerp", options).merge(deltas, Context()).dense()


def textbook(given, weights) -> torch.Tensor:
    dense = torch.stack([update.delta() for update in given])
    lengths = dense.norm(dim=(1, 2))
    weights = torch.tensor(weights, dtype=torch.float64)
    direction = torch.einsum("n,noi->oi", weights / lengths, dense)
    return (weights * lengths).sum() * direction / direction.norm()


@pytest.mark.parametrize("weights", [(1.0, 1.0, 1.0), (2.0, -0.5, 1.0)])
def test_it_is_the_dense_formula(weights) -> None:
    share = [weight / sum(weights) for weight in weights]
    assert_close(merged(updates(), weights), textbook(updates(), share), atol=1e-10, rtol=1e-10)
    plain = merged(updates(), weights, normalize_weights=False)
    assert_close(plain, textbook(updates(), weights), atol=1e-10, rtol=1e-10)


def test_the_step_in_the_tangent_space_at_the_mean_is_zero() -> None:
    """Why the projected mean is all there is to the published algorithm."""
    weights = torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64)
    dense = torch.stack([update.delta().flatten() for update in updates()])
    units = dense / dense.norm(dim=1, keepdim=True)
    base = weights @ units
    base = base / base.norm()
    tangent = weights @ (units - (units @ base)[:, None] * base)
    assert tangent.norm() < 1e-12
    scale = weights @ dense.norm(dim=1)
    found = merged(updates(), (0.2, 0.5, 0.3))
    assert_close(found.flatten(), scale * base, atol=1e-10, rtol=1e-10)


def test_parallel_opposite_and_zero_deltas_are_defined() -> None:
    first = updates()[0]
    negative = LowRank(first.a, -first.b, first.scaling)
    nothing = LowRank(first.a, 0 * first.b, 1.0)
    assert_close(merged([first, first], (0.3, 0.7)), first.delta())
    assert not merged([first, negative], (1.0, 1.0)).any()
    assert_close(merged([first, nothing], (1.0, 3.0)), 0.25 * first.delta())
    assert not merged([nothing, nothing], (1.0, 3.0)).any()


def test_weights_that_sum_to_zero_are_refused_where_they_are_normalised() -> None:
    with pytest.raises(IncompatibleError, match="'multislerp' divides by the sum of the weights"):
        merged(updates(), (1.0, 1.0, -2.0))
    assert merged(updates(), (1.0, 1.0, -2.0), normalize_weights=False).isfinite().all()
