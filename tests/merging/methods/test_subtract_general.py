"""subtract_general against dense residuals."""

import math

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method


def updates() -> list[LowRank]:
    generator = torch.Generator().manual_seed(14)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [LowRank(draw(r, 14), draw(11, r), 0.5 + number) for number, r in enumerate((3, 5, 2))]


def merged(weights, **options) -> torch.Tensor:
    deltas = Deltas.of(updates(), weights, names=("math", "code", "wiki"), target="lin", dtype=torch.float64)
    return make_method("subtract_general", options).merge(deltas, Context()).dense()


@pytest.mark.parametrize("share", [1.0, 0.4, 0.0])
@pytest.mark.parametrize("weights", [(1.0, -0.5, 2.0), (1.0, 0.0, 0.0)])
def test_the_mean_of_all_is_subtracted_from_each(share, weights) -> None:
    dense = torch.stack([update.delta() for update in updates()])
    residuals = dense - share * dense.mean(dim=0)
    expected = sum(weight * residual for weight, residual in zip(weights, residuals, strict=True))
    assert_close(merged(weights, general_share=share), expected, atol=1e-10, rtol=1e-10)


def test_a_named_adapter_is_subtracted_from_the_others_and_its_weight_is_not_used() -> None:
    one, two, general = (update.delta() for update in updates())
    expected = 0.7 * (one - 0.5 * general) + 0.2 * (two - 0.5 * general)
    for own in (0.0, 9.0):
        found = merged((0.7, 0.2, own), general="wiki", general_share=0.5)
        assert_close(found, expected, atol=1e-10, rtol=1e-10)


def test_equal_weights_leave_nothing_once_all_of_the_mean_is_gone() -> None:
    assert merged((2.0, 2.0, 2.0)).norm() < 1e-12


def test_what_it_cannot_take_is_refused() -> None:
    with pytest.raises(IncompatibleError, match=r"lin: no adapter is called 'news' here.*math, code, wiki"):
        merged((1.0, 1.0, 1.0), general="news")
    with pytest.raises(IncompatibleError, match="general_share must be a finite number, got inf"):
        make_method("subtract_general", {"general_share": math.inf})
