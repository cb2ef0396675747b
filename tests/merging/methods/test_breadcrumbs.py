"""breadcrumbs: exact counts at both ends, against dense arithmetic and mergekit."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method

WEIGHTS = (1.0, -0.5, 0.7)


def deltas(dtype=torch.float64, weights=WEIGHTS) -> Deltas:
    draw = torch.Generator().manual_seed(8)
    updates = [
        LowRank(
            torch.randn(rank, 31, generator=draw, dtype=torch.float64),
            torch.randn(23, rank, generator=draw, dtype=torch.float64),
            0.5 + number,
        )
        for number, rank in zip(range(len(weights)), (3, 5, 2), strict=False)
    ]
    return Deltas.of(updates, weights, dtype=dtype)


def merged(given: Deltas, **options) -> torch.Tensor:
    return make_method("breadcrumbs", options).merge(given, Context()).dense()


def pruned(dense: torch.Tensor, density: float, gamma: float) -> torch.Tensor:
    """Fill the kept places of a descending order, from behind the dropped top."""
    kept = torch.zeros_like(dense)
    number = dense[0].numel()
    count = int(density * number)
    top = min(int(gamma * number), number - count)
    for before, after in zip(dense, kept, strict=True):
        places = before.abs().flatten().argsort(descending=True)[top : top + count]
        after.view(-1)[places] = before.flatten()[places]
    return kept


GRID = [(0.14, 0.01), (0.5, 0.0), (0.5, 0.3), (0.9, 0.3), (1.0, 0.3), (0.0, 0.1), (0.3, 1.0)]


@pytest.mark.parametrize(("density", "gamma"), GRID)
def test_breadcrumbs_drops_both_ends(density, gamma) -> None:
    given = deltas()
    expected = torch.einsum("noi,n->oi", pruned(given.rows(0, 23), density, gamma), given.weights)
    assert_close(merged(given, density=density, gamma=gamma), expected, atol=1e-10, rtol=1e-10)
    assert_close(merged(given, density=density, gamma=gamma, scale=3.0), 3 * expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize(("density", "gamma"), GRID)
def test_exactly_the_density_is_left_even_among_equal_entries(density, gamma) -> None:
    assert int(merged(deltas(weights=(1.0,)), density=density, gamma=gamma).count_nonzero()) == int(density * 713)
    equal = Deltas.of([LowRank(torch.ones(1, 31), torch.ones(23, 1), 1.0)], [1.0])
    assert int(merged(equal, density=density, gamma=gamma).count_nonzero()) == int(density * 713)


def test_with_an_election_it_is_breadcrumbs_with_ties() -> None:
    given = deltas()
    x = given.weights[:, None, None] * pruned(given.rows(0, 23), 0.4, 0.1)
    agree = x.sign() == torch.where(x.sum(dim=0) >= 0, 1.0, -1.0)
    expected = (x * agree).sum(dim=0)
    assert_close(merged(given, density=0.4, gamma=0.1, elect="weighted"), expected, atol=1e-10, rtol=1e-10)


@pytest.mark.parametrize("name", ["breadcrumbs", "breadcrumbs_ties"])
@pytest.mark.parametrize("gamma", [0.0, 0.1])
def test_parity_with_mergekit(name, gamma) -> None:
    mergekit = pytest.importorskip("mergekit.merge_methods")
    given = deltas(torch.float32)
    parameters = {"weight": list(WEIGHTS), "density": 0.4, "gamma": gamma}
    dense = [torch.zeros(23, 31), *given.rows(0, 23)]
    expected = mergekit.merge_tensors(dense, name, base_index=0, parameters=parameters)
    found = merged(given, density=0.4, gamma=gamma, elect="weighted" if name == "breadcrumbs_ties" else "none")
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.1}, r"density must lie in \[0, 1\], got 1.1"),
        ({"gamma": -0.1}, r"gamma must lie in \[0, 1\], got -0.1"),
        ({"elect": "sum"}, "elect must be 'weighted', "),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(IncompatibleError, match=message):
        make_method("breadcrumbs", options)
