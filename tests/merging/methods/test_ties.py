"""ties against dense arithmetic, PEFT and mergekit, in each of the three meanings."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method

WEIGHTS = (1.0, -0.5, 0.7, 0.3)


def deltas(weights=WEIGHTS, ranks=(3, 5, 2, 8), dtype=torch.float64, out=23, width=31) -> Deltas:
    draw = torch.Generator().manual_seed(3)
    updates = [
        LowRank(
            torch.randn(rank, width, generator=draw, dtype=torch.float64),
            torch.randn(out, rank, generator=draw, dtype=torch.float64),
            0.5 + number,
        )
        for number, rank in enumerate(ranks)
    ]
    return Deltas.of(updates, weights, target="up", dtype=dtype)


def merged(given: Deltas, **options) -> torch.Tensor:
    return make_method("ties", options).merge(given, Context()).dense()


def trimmed(dense: torch.Tensor, density: float) -> torch.Tensor:
    kept = torch.zeros_like(dense)
    for before, after in zip(dense, kept, strict=True):
        places = before.abs().flatten().argsort(descending=True)[: int(density * before.numel())]
        after.view(-1)[places] = before.flatten()[places]
    return kept


def textbook(dense: torch.Tensor, weights: torch.Tensor, density: float, semantics: str) -> torch.Tensor:
    x = trimmed(dense, density)
    w = weights[:, None, None]
    votes = x if semantics == "peft" else w * x
    sign = torch.where(votes.sum(dim=0) >= 0, 1.0, -1.0)
    agree = (votes.sign() == sign).double()
    divisor = (agree * w if semantics == "mergekit" else agree).sum(dim=0)
    return (w * x * agree).sum(dim=0) / torch.where(divisor == 0, 1.0, divisor)


@pytest.mark.parametrize("semantics", ["paper", "peft", "mergekit"])
@pytest.mark.parametrize("density", [0.0, 0.2, 0.55, 1.0])
@pytest.mark.parametrize("weights", [WEIGHTS, (1.0, 1.0, 1.0, 1.0)])
def test_ties_is_the_dense_rule(semantics, density, weights) -> None:
    given = deltas(weights)
    expected = textbook(given.rows(0, 23), given.weights, density, semantics)
    assert_close(merged(given, density=density, semantics=semantics), expected, atol=1e-10, rtol=1e-10)
    assert_close(
        merged(given, density=density, semantics=semantics, scale=0.3), 0.3 * expected, atol=1e-10, rtol=1e-10
    )


def test_the_three_meanings_differ_under_unequal_weights_and_the_flags_bridge_them() -> None:
    given = deltas()
    paper, peft, mergekit = (merged(given, semantics=name) for name in ("paper", "peft", "mergekit"))
    for one, other in ((paper, peft), (paper, mergekit), (peft, mergekit)):
        assert float((one - other).norm() / one.norm()) > 0.1
    assert_close(merged(given, semantics="mergekit", denominator="count"), paper, atol=0, rtol=0)
    assert_close(merged(given, elect="raw"), peft, atol=0, rtol=0)


def test_a_worked_example() -> None:
    """Entries by adapter; the smallest of each column pair is trimmed, then each column is decided."""
    first, second = torch.tensor([[3.0, -1.0, 2.0, 0.5]]), torch.tensor([[-4.0, 2.0, 1.0, -0.1]])
    one = torch.ones(1, 1)
    given = Deltas.of([LowRank(first, one, 1.0), LowRank(second, one, 1.0)], [1.0, 1.0])
    assert merged(given, density=0.5).tolist() == [[-4.0, 2.0, 2.0, 0.0]]
    assert merged(given, density=1.0).tolist() == [[-4.0, 2.0, 1.5, 0.5]]


def test_a_negative_weight_merges_the_negated_adapter() -> None:
    given = deltas((1.0, -1.0, 1.0, 1.0))
    negated = Deltas(given.a, (given.b[0], -given.b[1], *given.b[2:]), torch.ones(4), given.names, "up")
    assert_close(merged(given), merged(negated), atol=1e-12, rtol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("majority", [("total", None), ("frequency", "count")])
def test_parity_with_peft(dtype, majority) -> None:
    peft = pytest.importorskip("peft.utils.merge_utils")
    given = deltas(dtype=dtype)
    dense = list(given.rows(0, 23))
    expected = peft.ties(dense, given.weights.to(dtype), 0.4, majority_sign_method=majority[0])
    found = merged(given, semantics="peft", density=0.4, elect=majority[1])
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(found, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("normalize", [True, False])
def test_parity_with_mergekit(normalize) -> None:
    mergekit = pytest.importorskip("mergekit.merge_methods")
    given = deltas()
    parameters = {"weight": list(WEIGHTS), "density": 0.4, "normalize": normalize}
    dense = [torch.zeros(23, 31, dtype=torch.float64), *given.rows(0, 23)]
    expected = mergekit.merge_tensors(dense, "ties", base_index=0, parameters=parameters)
    found = merged(given, semantics="mergekit", density=0.4, denominator=None if normalize else "none")
    assert_close(found, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.5}, r"density must lie in \[0, 1\], got 1.5"),
        ({"density": -0.1}, "density must lie in"),
        ({"semantics": "best"}, "semantics must be one of paper, peft, mergekit; got 'best'"),
        ({"elect": "sum"}, "elect must be 'weighted', 'raw', "),
        ({"denominator": "sum"}, "denominator must be 'weight', "),
        ({"densities": 1}, "has no option 'densities'"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(IncompatibleError, match=message):
        make_method("ties", options)
