"""KnOTS-DARE-TIES: a dense reference with the same masks, and what its draws depend on."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method
from compose.merging.random_masks import Words

RANKS, WEIGHTS = (3, 5, 2), (1.0, -0.5, 2.0)


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def deltas(ranks=RANKS, out=13, width=17, weights=WEIGHTS) -> Deltas:
    given = [LowRank(draw(r, width, seed=n), draw(out, r, seed=9 + n), 0.5 + n) for n, r in enumerate(ranks)]
    return Deltas.of(given, weights, names="abcdefgh"[: len(ranks)], target="lin", dtype=torch.float64)


def weighted(given: Deltas) -> torch.Tensor:
    """Return every ``w_n delta_n``, dense: ``(N, O, I)``."""
    return given.weights[:, None, None] * given.rows(0, given.shape[0])


def merge(given: Deltas, seed=5, **options) -> torch.Tensor:
    return make_method("knots_dare_ties", options).merge(given, Context(seed=seed)).dense()


@pytest.mark.parametrize(("rescale", "divisor"), [("probability", 0.6), ("none", 1.0)])
def test_it_is_election_on_the_masked_coordinates(rescale, divisor) -> None:
    given = deltas()
    u, s, v = torch.linalg.svd(torch.cat(list(weighted(given)), dim=1), full_matrices=False)
    coordinates = torch.stack((s[:10, None] * v[:10]).split(17, dim=1))
    words = torch.stack([Words(5, name, "lin", 17).lines(0, 10) for name in "abc"]).double()
    coordinates = torch.where((words + 2**31) / 2**32 < 0.6, coordinates / divisor, 0)
    agree = coordinates.sign() == coordinates.sum(0).sign()
    expected = u[:, :10] @ ((coordinates * agree).sum(0) / agree.sum(0).clamp(min=1))
    assert_close(merge(given, density=0.6, rescale=rescale), expected, atol=1e-10, rtol=1e-10)


def test_density_one_is_knots_ties_without_trimming() -> None:
    expected = make_method("knots_ties", {"density": 1.0}).merge(deltas(), Context()).dense()
    assert_close(merge(deltas(), density=1.0), expected, atol=1e-10, rtol=1e-10)
    assert not merge(deltas(), density=0.0).any()


def test_a_draw_depends_on_seed_and_target_and_not_on_the_global_generator() -> None:
    first = merge(deltas())
    torch.manual_seed(123)
    assert torch.equal(merge(deltas()), first)
    assert not torch.equal(merge(deltas(), seed=6), first)
    other = Deltas(deltas().a, deltas().b, deltas().weights, deltas().names, "other")
    assert not torch.equal(merge(other), first)


def test_without_election_the_mean_over_seeds_is_the_sum() -> None:
    """1/density makes DARE unbiased; 400 draws leave 1/20 of one draw's noise (about 0.8 of the norm)."""
    options = {"density": 0.6, "elect": "none", "denominator": "none"}
    mean = torch.stack([merge(deltas(), seed=seed, **options) for seed in range(400)]).mean(0)
    exact = weighted(deltas()).sum(0)
    assert float((mean - exact).norm() / exact.norm()) < 0.1
