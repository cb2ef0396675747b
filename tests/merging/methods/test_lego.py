"""lego on units whose clusters are known, at the limits, and what its draws and signs depend on."""

import math

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas, Factors
from compose.merging.method import Context, make_method
from compose.merging.methods import lego


def draw(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def updates(ranks=(3, 5, 2)) -> list[LowRank]:
    return [LowRank(draw(r, 14, seed=20 + r), draw(11, r, seed=30 + r), 0.5 + n) for n, r in enumerate(ranks)]


def merged(given, weights=None, seed=0, names=(), **options) -> Factors:
    weights = weights or [1.0] * len(given)
    deltas = Deltas.of(given, weights, names=names, target="lin", dtype=torch.float64)
    return make_method("lego", options).merge(deltas, Context(seed=seed))


def planted() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Three adapters of rank 4, whose rows are 4 prototypes, perturbed, in another order: a, b and the order."""
    order = torch.tensor([[0, 1, 2, 3], [2, 0, 3, 1], [3, 2, 1, 0]])
    a = draw(4, 14, seed=40)[order] + 0.05 * draw(3, 4, 14, seed=41)
    b = draw(4, 11, seed=42)[order] + 0.05 * draw(3, 4, 11, seed=43)
    return a, b, order


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_planted_clusters_become_rescaled_centroids(seed) -> None:
    a, b, order = planted()
    expected = torch.zeros(11, 14, dtype=torch.float64)
    for prototype in range(4):
        units = torch.cat([a[order == prototype], b[order == prototype]], dim=1)
        centroid = units.mean(dim=0)
        centroid = centroid * units.abs().amax(dim=1).mean() / centroid.abs().max()
        expected += torch.outer(centroid[14:], centroid[:14])
    given = [LowRank(x, y.T, 1.0) for x, y in zip(a, b, strict=True)]
    found = merged(given, seed=seed, gauge="given")
    assert found.a.shape == (4, 14)
    assert_close(found.dense(), math.sqrt(12 / 4) * expected, atol=1e-10, rtol=1e-10)
    plain = merged(given, seed=seed, gauge="given", output_scale="none")
    assert_close(plain.dense(), expected, atol=1e-10, rtol=1e-10)


def test_the_sign_of_a_unit_does_not_matter() -> None:
    a, b, _ = planted()
    flips = torch.where(draw(3, 4, 1, seed=44) > 0, 1.0, -1.0).double()
    given = [LowRank(x, y.T, 1.0) for x, y in zip(a, b, strict=True)]
    turned = [LowRank(x, y.T, 1.0) for x, y in zip(a * flips, b * flips, strict=True)]
    assert (flips < 0).any()
    found, again = (merged(x, gauge="given").dense() for x in (given, turned))
    assert_close(again, found, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("rank", [None, 1, 2, 4, 7])
def test_the_balanced_gauge_makes_the_split_into_factors_irrelevant(rank) -> None:
    turned = []
    for number, update in enumerate(updates()):
        gauge = draw(update.rank, update.rank, seed=50 + number)
        turned.append(LowRank(torch.linalg.inv(gauge) @ update.a, update.b @ gauge, update.scaling))
    found, again = (merged(x, rank=rank).dense() for x in (updates(), turned))
    assert found.norm() > 1.0
    assert_close(again, found, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("rank", [1, 2, 3])
def test_orthogonal_units_in_one_cluster_have_canonical_signs(rank) -> None:
    """All units of one adapter are orthogonal: rounding alone would choose their signs."""
    update = updates()[1]
    found = [
        merged([LowRank(turn @ update.a, update.b @ turn.T, update.scaling)], rank=rank).dense()
        for turn in [torch.eye(5).double(), *(torch.linalg.qr(draw(5, 5, seed=s))[0] for s in range(60, 66))]
    ]
    for other in found[1:]:
        assert_close(other, found[0], atol=1e-9, rtol=1e-9)


def test_with_a_cluster_for_every_unit_it_is_the_sum() -> None:
    total = sum(weight * update.delta() for weight, update in zip((1.0, -0.5, 2.0), updates(), strict=True))
    for rank in (10, 99):
        found = merged(updates(), [1.0, -0.5, 2.0], rank=rank)
        assert found.a.shape == (10, 14)
        assert_close(found.dense(), total, atol=1e-10, rtol=1e-10)


def test_one_cluster_is_the_mean_unit() -> None:
    """Two adapters of rank 1: the worked example of the formula."""
    one = LowRank(torch.tensor([[4.0, 0.0]]), torch.tensor([[4.0], [0.0]]), 1.0)
    two = LowRank(torch.tensor([[2.0, 2.0]]), torch.tensor([[2.0], [-2.0]]), 1.0)
    found = merged([one, two], rank=1, gauge="given").dense()
    # mean unit (3, 1 | 3, -1), L-infinity norms 4 and 2 against 3: factor 1, then sqrt(2 / 1).
    assert_close(found, math.sqrt(2) * torch.tensor([[9.0, 3.0], [-3.0, -1.0]]).double())


def test_every_unit_is_nearest_to_its_own_centroid() -> None:
    """Lloyd's iteration has ended: no unit would change its cluster, up to signs."""
    units = draw(40, 6, seed=70)
    gram = units @ units.T
    seeds = lego._seeds(gram, torch.rand(5, 40, generator=torch.Generator().manual_seed(3)).numpy())
    assert len(set(seeds)) == 5
    members = lego._cluster(gram, seeds, 1e-12)
    labels = members.abs().argmax(dim=0)
    assert_close((members != 0).sum(dim=0), torch.ones(40, dtype=torch.int64))
    assert_close(members.abs().sum(dim=1), torch.ones(len(members), dtype=torch.float64))
    centroids = members @ units
    distance = torch.minimum(torch.cdist(units, centroids), torch.cdist(units, -centroids))
    assert torch.equal(distance.argmin(dim=1), labels)
    assert (torch.einsum("ud,ud->u", units, centroids[labels]) * members.sum(dim=0) > 0).all()


def test_draws_depend_on_seed_name_target_and_unit_alone() -> None:
    def deltas(names, target="lin") -> Deltas:
        given = updates()[: len(names)]
        return Deltas.of(given, [1.0] * len(names), names=names, target=target, dtype=torch.float64)

    base = lego._draws(0, deltas("abc"), 1, 4, 5)
    assert (lego._draws(0, deltas("ba"), 0, 6, 3)[:4] == base[:, :3]).all()
    for other in (
        lego._draws(1, deltas("abc"), 1, 4, 5),
        lego._draws(0, deltas("abc"), 0, 4, 5),
        lego._draws(0, deltas("abc", "other"), 1, 4, 5),
    ):
        assert (other != base).all()
    before = torch.random.get_rng_state()
    merged(updates())
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_seed_chooses_the_start() -> None:
    found = [merged(updates(), seed=seed, rank=3).dense() for seed in range(8)]
    assert any((other - found[0]).norm() > 1e-3 for other in found[1:])
    assert_close(merged(updates(), seed=0, rank=3).dense(), found[0], atol=0, rtol=0)


def test_zero_deltas_and_equal_adapters_are_defined() -> None:
    first = updates()[0]
    nothing = LowRank(first.a, 0 * first.b, 1.0)
    assert merged([nothing]).a.shape == (0, 14)
    assert merged([first], [0.0]).b.shape == (11, 0)
    assert_close(merged([first, nothing]).dense(), first.delta(), atol=1e-10, rtol=1e-10)
    # Equal units fall together: the centroid is the unit, and 6 units in 3 clusters give the root of 2.
    twice = merged([first, first], names="ab").dense()
    assert_close(twice, math.sqrt(2) * first.delta(), atol=1e-10, rtol=1e-10)
    gauge = draw(3, 3, seed=80)
    same = LowRank(torch.linalg.inv(gauge) @ first.a, first.b @ gauge, first.scaling)
    for seed in range(5):
        found = merged([first, same], names="ab", seed=seed, rank=5)
        assert found.a.shape == (3, 14)
        assert_close(found.dense(), twice, atol=1e-9, rtol=1e-9)


def test_units_as_given_count_once_with_their_negative_and_not_at_all_if_zero() -> None:
    first = updates()[0]
    negative = LowRank(-first.a, -first.b, first.scaling)
    nothing = LowRank(draw(4, 14, seed=81), torch.zeros(11, 4, dtype=torch.float64), 1.0)
    for seed in range(5):
        for rank in (3, 5):
            found = merged([first, negative], names="ab", seed=seed, rank=rank, gauge="given")
            assert found.a.shape == (3, 14)
            assert_close(found.dense(), math.sqrt(2) * first.delta(), atol=1e-10, rtol=1e-10)
    found = merged([first, nothing], gauge="given").dense()
    assert_close(found, first.delta(), atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("options", [{"rank": 0}, {"output_scale": "sqrt"}, {"gauge": "svd"}])
def test_options_out_of_range_are_refused(options) -> None:
    with pytest.raises(IncompatibleError, match=f"{next(iter(options))} must be"):
        make_method("lego", options)
