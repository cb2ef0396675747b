"""Lengths, angles, normalised weights and balanced factors against dense float64 arithmetic."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.gram import (
    balanced,
    column_gram,
    cosines,
    length,
    normalised,
    norms,
    row_gram,
    shares,
    slerp_coefficients,
)


def deltas(weights=(1.0, -0.5, 2.0), ranks=(3, 5, 2)) -> Deltas:
    generator = torch.Generator().manual_seed(1)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    updates = [LowRank(draw(r, 14), draw(11, r), 0.5 + number) for number, r in enumerate(ranks)]
    return Deltas.of(updates, weights, names="abc", target="lin", dtype=torch.float64)


def test_line_grams_are_exact() -> None:
    found = deltas()
    dense = found.rows(0, 11)
    assert_close(row_gram(found), torch.einsum("noi,moi->onm", dense, dense), atol=1e-10, rtol=1e-10)
    assert_close(column_gram(found), torch.einsum("noi,moi->inm", dense, dense), atol=1e-10, rtol=1e-10)
    assert_close(row_gram(found).sum(dim=0), found.gram, atol=1e-10, rtol=1e-10)


def test_norms_and_cosines_of_many_grams_at_once() -> None:
    vectors = torch.randn(4, 3, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    vectors[1, 2] = 0.0
    gram = vectors @ vectors.mT
    assert_close(norms(gram), vectors.norm(dim=-1))
    unit = vectors / vectors.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    found = cosines(gram)
    assert_close(found, unit @ unit.mT)
    along = torch.rand(60, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64) * vectors[0, 0]
    assert float((along @ along.T / (along.norm(dim=1)[:, None] * along.norm(dim=1))).max()) > 1.0
    assert float(cosines(along @ along.T).max()) == 1.0
    assert not found[1, 2].any()
    assert not found[1, :, 2].any()


def test_length_is_exact_and_zero_where_terms_cancel() -> None:
    found = deltas()
    coefficients = torch.tensor([0.3, -2.0, 1.0], dtype=torch.float64)
    dense = torch.einsum("n,noi->oi", coefficients, found.rows(0, 11))
    assert length(found.gram, coefficients) == pytest.approx(float(dense.norm()), rel=1e-12)
    third = 1 / 3
    twice = Deltas.of(
        [LowRank(found.a[0], found.b[0], third), LowRank(third * found.a[0], found.b[0], 1.0)],
        [1.0, -1.0],
        dtype=torch.float64,
    )
    assert length(twice.gram, twice.weights) == 0.0
    assert length(twice.gram, torch.tensor([1.0, -0.999], dtype=torch.float64)) > 0.0


def test_slerp_coefficients_go_straight_where_there_is_no_angle() -> None:
    pairs = torch.tensor(
        [[[4.0, 3.0], [3.0, 9.0]], [[1.0, 1.0], [1.0, 1.0]], [[1.0, -1.0], [-1.0, 1.0]], [[4.0, 0.0], [0.0, 0.0]]],
        dtype=torch.float64,
    )
    found = slerp_coefficients(pairs, 0.25, parallel=0.9995)
    # cos = 1/2: theta = 60 degrees, so the multipliers are sin(45) / sin(60) and sin(15) / sin(60).
    expected = [[0.8164965809277261, 0.2988584907226845], [0.75, 0.25], [0.75, 0.25], [0.75, 0.25]]
    assert_close(found, torch.tensor(expected, dtype=torch.float64), atol=1e-12, rtol=0)


def test_normalised_weights_and_shares() -> None:
    assert_close(normalised(deltas(), "mean"), torch.tensor([0.4, -0.2, 0.8], dtype=torch.float64))
    share, sign = shares(deltas((3.0, -1.0, 0.0)), "karcher")
    assert share.tolist() == [0.75, 0.25, 0.0]
    assert sign.tolist() == [1.0, -1.0, 0.0]


@pytest.mark.parametrize("weights", [(1.0, 1.0, -2.0), (0.1, 0.2, -0.3), (0.0, 0.0, 0.0)])
def test_a_sum_of_zero_is_refused_with_target_method_and_weights(weights) -> None:
    with pytest.raises(IncompatibleError, match=r"lin: merge method 'mean' divides by the sum of the weights.* is 0"):
        normalised(deltas(weights), "mean")


def test_shares_refuse_weights_that_are_all_zero() -> None:
    with pytest.raises(IncompatibleError, match=r"'karcher' needs a weight that is not 0, got \[0.0, 0.0, 0.0\]"):
        shares(deltas((0.0, 0.0, 0.0)), "karcher")


def test_balanced_factors_belong_to_the_delta_alone() -> None:
    a, b = deltas().a[1], deltas().b[1]
    found = balanced(a, b)
    assert_close(found.dense(), b @ a, atol=1e-10, rtol=1e-10)
    singular = torch.linalg.svdvals(b @ a)[:5]
    assert_close(found.a @ found.a.T, torch.diag(singular), atol=1e-10, rtol=1e-10)
    assert_close(found.b.T @ found.b, torch.diag(singular), atol=1e-10, rtol=1e-10)
    strongest = found.a.gather(1, found.a.abs().argmax(dim=1, keepdim=True))
    assert (strongest > 0).all()
    gauge = torch.randn(5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    for turn in (gauge, -gauge, torch.diag(torch.tensor([1.0, -1.0, 1.0, -1.0, -1.0], dtype=torch.float64))):
        again = balanced(torch.linalg.inv(turn) @ a, b @ turn)
        assert_close(again.a, found.a, atol=1e-9, rtol=1e-9)
        assert_close(again.b, found.b, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_balanced_factors_have_only_the_rank_that_is_there(dtype) -> None:
    a, b = deltas().a[0].to(dtype), deltas().b[0].to(dtype)
    doubled = balanced(torch.cat([a, a, 0 * a]), torch.cat([b, b, b], dim=1))
    assert doubled.a.shape == (3, 14)
    assert_close(doubled.dense(), 2 * b @ a, atol=1e-5 if dtype == torch.float32 else 1e-10, rtol=1e-5)
    assert balanced(a, 0 * b).a.shape == (0, 14)
    assert balanced(a[:0], b[:, :0]).b.shape == (11, 0)
