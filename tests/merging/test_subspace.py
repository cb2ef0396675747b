"""Subspace primitives against dense arithmetic, and what the methods promise about order, gauge and signs."""

from dataclasses import replace

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Core, Deltas
from compose.merging.elementwise import Election
from compose.merging.method import METHODS, Context, make_method
from compose.merging.subspace import disjoint, fold, frame, keep_largest, knots, negligible, procrustes, ties, triplets

OUT, IN, RANKS = 13, 17, (3, 5, 2)
WEIGHTS = (1.0, -0.5, 2.0)
ELECTION = Election("weighted", "count")
SUBSPACE = {
    "knots_ties": {"density": 0.4},
    "knots_dare_ties": {"density": 0.6},
    "core_ties": {"density": 0.4},
    "tsvm": {},
    "iso": {},
    "iso_cts": {"common": 0.5},
    "ctm": {"density": 0.5, "sweeps": 6},
    "opcm": {},
    "dc_merge": {"density": 0.3, "smoothing": "linear"},
    "drm": {"density": 0.4},
    "wudi": {},
    "regmean": {},
}
WRONG = [
    ("knots_ties", {"density": 1.5}, "density"),
    ("knots_ties", {"threshold": 1.0}, "threshold"),
    ("knots_dare_ties", {"rescale": "l1"}, "rescale"),
    ("core_ties", {"elect": "loud"}, "loud"),
    ("core_ties", {"threshold": -0.1}, "threshold"),
    ("tsvm", {"rank": 0}, "rank"),
    ("iso", {"threshold": 1.0}, "threshold"),
    ("iso_cts", {"common": 1.1}, "common"),
    ("ctm", {"beta": -0.1}, "beta"),
    ("ctm", {"rank": 0}, "rank"),
    ("ctm", {"sweeps": 0}, "sweeps"),
    ("ctm", {"tolerance": -1.0}, "tolerance"),
    ("opcm", {"alpha": 1.0}, "alpha"),
    ("dc_merge", {"smoothing": "flat"}, "smoothing"),
    ("dc_merge", {"ratio": 0.5}, "ratio"),
    ("drm", {"stack": "diagonal"}, "stack"),
    ("wudi", {"threshold": 1.0}, "threshold"),
    ("regmean", {"rho": 1.2}, "rho"),
]


def draw(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed + sum(shape)), dtype=torch.float64)


def updates() -> list[LowRank]:
    return [LowRank(draw(r, IN, seed=n), draw(OUT, r, seed=9 + n), 0.5 + n) for n, r in enumerate(RANKS)]


def deltas(given=None, weights=WEIGHTS, names="abc") -> Deltas:
    return Deltas.of(given or updates(), weights, names=names, target="lin", dtype=torch.float64)


def dense() -> torch.Tensor:
    return torch.stack([update.delta() for update in updates()])


def context(order=(0, 1, 2)) -> Context:
    inputs = draw(len(RANKS), 40, IN)[list(order)]
    return Context(seed=3, statistics={"input_gram": inputs.mT @ inputs})


def merged(name: str, given: Deltas, place: Context | None = None, **options) -> torch.Tensor:
    return make_method(name, SUBSPACE[name] | options).merge(given, place or context()).dense()


def regauged(update: LowRank, seed: int, padding: int = 2) -> LowRank:
    """Return the same update with other factors, more of them than it needs."""
    rank = update.a.shape[0] + padding
    a, b = torch.zeros(rank, IN).double(), torch.zeros(OUT, rank).double()
    a[: rank - padding], b[:, : rank - padding] = update.a, update.b
    b[:, rank - padding :] = draw(OUT, padding, seed=seed)
    gauge = torch.linalg.qr(draw(rank, rank, seed=seed)).Q * torch.linspace(0.5, 2, rank).double()
    return LowRank(torch.linalg.inv(gauge) @ a, b @ gauge, update.scaling)


def test_frame_holds_every_update_and_leading_columns_the_first_ones() -> None:
    found = frame(deltas())
    assert_close(found.left @ found.matrices() @ found.right.T, dense(), atol=1e-10, rtol=1e-10)
    assert_close(found.left.T @ found.left, torch.eye(10).double())
    assert float(found.matrices()[:2, 8:].abs().max()) < 1e-12


def test_knots_is_the_svd_of_the_deltas_side_by_side() -> None:
    found = knots(deltas(), 1e-5)
    u, s, _ = torch.linalg.svd(torch.cat(list(dense()), dim=1), full_matrices=False)
    assert_close(found.values, s[:10], atol=1e-10, rtol=1e-10)
    assert_close((found.left * (found.left * u[:, :10]).sum(0).sign()), u[:, :10], atol=1e-10, rtol=1e-10)
    assert_close(found.left @ found.coordinates, dense(), atol=1e-10, rtol=1e-10)
    assert len(knots(deltas(), float(s[4] / s[0]) * 1.001).values) == 4


def test_triplets_leave_out_what_is_rounding() -> None:
    wide = regauged(updates()[1], seed=4)
    found = triplets(wide.b, wide.a.T)
    u, s, v = torch.linalg.svd(wide.b @ wide.a, full_matrices=False)
    assert_close(found.s, s[:5], atol=1e-10, rtol=1e-10)
    assert_close(found.u * found.s @ found.v.T, u[:, :5] * s[:5] @ v[:5], atol=1e-10, rtol=1e-10)
    between = float(s[2] * s[3]) ** 0.5
    assert len(triplets(wide.b, wide.a.T, largest=between / negligible(torch.float64)).s) == 3


def test_procrustes_is_the_nearest_orthonormal_matrix() -> None:
    tall = draw(9, 4)
    values, vectors = torch.linalg.eigh(tall.T @ tall)
    assert_close(procrustes(tall), tall @ (vectors * values.rsqrt()) @ vectors.T, atol=1e-10, rtol=1e-10)
    signs = torch.tensor([1.0, -1, -1, 1]).double()
    assert_close(procrustes(tall * signs), procrustes(tall) * signs, atol=1e-10, rtol=1e-10)


def test_procrustes_of_repeated_columns_lives_on_their_span() -> None:
    one = draw(9, 2)
    found = procrustes(torch.cat([one, one], dim=1))
    assert_close(found, torch.cat([procrustes(one)] * 2, dim=1) / 2**0.5, atol=1e-10, rtol=1e-10)


def test_fold_leaves_out_what_is_zero() -> None:
    silent = LowRank(draw(2, IN), torch.zeros(OUT, 2).double(), 1.0)
    found = fold(deltas([*updates(), silent], (1.0, 0.0, 2.0, 1.0), "abcd"))
    assert found.names == ("a", "c")
    assert_close(found.rows(0, OUT)[1], 2 * dense()[2], atol=1e-10, rtol=1e-10)
    assert fold(deltas(weights=(0.0, 0.0, 0.0))) is None


def test_ties_is_equivariant_to_sign_flips_even_where_votes_cancel() -> None:
    """Basis vectors keep an arbitrary sign: flips of rows and columns must pass through unchanged."""
    stack = torch.cat([draw(3, 4, 5), -draw(3, 4, 5)[:1]])
    rows, columns = draw(4, 1, seed=1).sign(), draw(1, 5, seed=2).sign()
    for density in (1.0, 0.5):
        for rule in (ELECTION, Election("count", "none")):
            expected = ties(stack, density, rule) * rows * columns
            assert_close(ties(stack * rows * columns, density, rule), expected, atol=0, rtol=0)
    nearly = -stack[0] * (1 + 1e-15)
    assert not disjoint(torch.stack([stack[0], nearly]), ELECTION).any()


def test_ties_keeps_exactly_the_largest() -> None:
    one = draw(1, 6, 7)
    kept = ties(one, 0.3, ELECTION)
    assert int(kept.count_nonzero()) == int(0.3 * 42)
    assert float(kept[kept != 0].abs().min()) >= float(one[0][kept == 0].abs().max())


def test_a_large_stack_keeps_exactly_the_largest_whatever_the_sample_says() -> None:
    """Large enough for the threshold to be guessed; the second matrix hides its large entries from a strided guess."""
    stack = draw(2, 128, 300)
    stack[1, :, ::2] *= 100
    for density in (0.01, 0.3, 0.999):
        count = int(density * 128 * 300)
        for matrix, kept in zip(stack, keep_largest(stack, density), strict=True):
            least = matrix.abs().flatten().sort(descending=True).values[count - 1]
            assert_close(kept, torch.where(matrix.abs() >= least, matrix, 0), atol=0, rtol=0)


@pytest.mark.parametrize("name", [name for name in SUBSPACE if name != "opcm"])
def test_order_does_not_matter(name) -> None:
    order = (2, 0, 1)
    turned = deltas([updates()[n] for n in order], [WEIGHTS[n] for n in order], [("a", "b", "c")[n] for n in order])
    assert_close(merged(name, turned, context(order)), merged(name, deltas()), atol=1e-9, rtol=1e-9)


def test_order_matters_to_opcm() -> None:
    turned = deltas(updates()[::-1], WEIGHTS[::-1], "cba")
    assert float((merged("opcm", turned) - merged("opcm", deltas())).norm()) > 0.1
    assert not METHODS["opcm"].contract.order_free


@pytest.mark.parametrize("name", SUBSPACE)
def test_other_factors_of_the_same_updates_do_not_matter(name) -> None:
    first, second, third = updates()
    other = [first, regauged(second, 5), regauged(third, 6, padding=0)]
    options = {"rank": 5} if name == "ctm" else {}  # its default is the rank as written
    found = merged(name, deltas(other), **options)
    assert_close(found, merged(name, deltas(), **options), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", SUBSPACE)
def test_an_adapter_that_is_zero_or_has_weight_zero_changes_nothing(name) -> None:
    silent = LowRank(draw(2, IN), torch.zeros(OUT, 2).double(), 1.0)
    expected = merged(name, deltas())
    grams = context().statistics["input_gram"]
    more = Context(seed=3, statistics={"input_gram": torch.cat([grams, torch.zeros_like(grams[:1])])})
    found = merged(name, deltas([*updates(), silent], (*WEIGHTS, 1.0), "abcd"), more)
    assert_close(found, expected, atol=1e-9, rtol=1e-9)
    loud = deltas([*updates(), updates()[0]], (*WEIGHTS, 0.0), "abcd")
    assert_close(merged(name, loud, more), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", SUBSPACE)
def test_nothing_to_merge_gives_zero(name) -> None:
    b = torch.zeros(OUT, 2).double()
    b[:, 0] = 1
    a = torch.zeros(2, IN).double()
    a[1] = 1  # b @ a is 0 though neither factor is
    for given in (deltas(weights=(0.0, 0.0, 0.0)), deltas([LowRank(a, b, 1.0)] * 3)):
        found = merged(name, given)
        assert found.shape == (OUT, IN)
        assert not found.any()


@pytest.mark.parametrize("name", SUBSPACE)
def test_a_common_factor_of_the_weights_carries_through(name) -> None:
    found = merged(name, deltas(weights=[3 * weight for weight in WEIGHTS]))
    assert_close(found, 3 * merged(name, deltas()), atol=1e-9, rtol=1e-9)
    assert_close(merged(name, deltas(weights=[-w for w in WEIGHTS])), -merged(name, deltas()), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", [name for name in SUBSPACE if name not in ("opcm", "knots_dare_ties")])
def test_an_adapter_and_its_negative_cancel(name) -> None:
    """To rounding of the sum; DARE drops other entries of each, OPCM never forgets what came first."""
    both = deltas([updates()[1]] * 2, (1.0, -1.0), "ab")
    grams = context().statistics["input_gram"][:1].expand(2, IN, IN)
    found = merged(name, both, Context(statistics={"input_gram": grams}))
    assert float(found.abs().max()) < 1e-12 * float(dense()[1].abs().max())


@pytest.mark.parametrize("name", SUBSPACE)
def test_one_adapter_comes_back_where_promised_and_inputs_stay(name) -> None:
    contract = METHODS[name].contract
    one = deltas(updates()[1:2], [1.0], "b")
    before = (one.a[0].clone(), one.b[0].clone())
    grams = context().statistics["input_gram"][:1]
    found = make_method(name, contract.neutral or {}).merge(one, Context(statistics={"input_gram": grams}))
    assert torch.equal(one.a[0], before[0])
    assert torch.equal(one.b[0], before[1])
    assert torch.allclose(found.dense(), dense()[1], atol=1e-9, rtol=1e-9) == contract.one_is_identity


@pytest.mark.parametrize("name", SUBSPACE)
def test_more_rank_than_the_target_has_is_no_matter(name) -> None:
    """Two adapters of rank 4 on a target of 3 outputs; one target of a single line."""
    for out in (3, 1):
        many = [LowRank(draw(4, IN, seed=n), draw(out, 4, seed=n), 1.0) for n in range(2)]
        given = Deltas.of(many, (1.0, 0.5), names="ab", target="lin", dtype=torch.float64)
        grams = context().statistics["input_gram"][:2]
        found = make_method(name, SUBSPACE[name]).merge(given, Context(statistics={"input_gram": grams})).dense()
        assert found.shape == (out, IN)
        assert bool(found.isfinite().all())


@pytest.mark.parametrize("name", ["core_ties", "knots_ties", "ctm"])
def test_signs_of_the_canonical_core_do_not_matter(name, monkeypatch) -> None:
    expected = merged(name, deltas())
    canonical = Deltas.core.func

    def flipped(self: Deltas) -> Core:
        left, right, matrices = canonical(self)
        rows, columns = draw(left.shape[1], seed=1).sign(), draw(right.shape[1], seed=2).sign()
        return Core(left * rows, right * columns, matrices * rows[:, None] * columns)

    monkeypatch.setattr(Deltas, "core", property(flipped))
    assert_close(merged(name, deltas()), expected, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("name", "options", "named"), WRONG)
def test_options_out_of_range_are_refused_by_name(name, options, named) -> None:
    with pytest.raises(IncompatibleError, match=named):
        make_method(name, options)


@pytest.mark.parametrize("name", SUBSPACE)
def test_float32_agrees_with_float64(name) -> None:
    """Well-conditioned random updates: 1e-3 of the norm covers the entries that change sides of a threshold."""
    exact = merged(name, deltas())
    single = replace(
        deltas(), a=tuple(a.float() for a in deltas().a), unscaled_b=tuple(b.float() for b in deltas().unscaled_b)
    )
    found = merged(name, single)
    assert found.dtype == torch.float32
    assert float((found.double() - exact).norm() / exact.norm()) < 1e-3
