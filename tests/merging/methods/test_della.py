"""della against dense arithmetic on its words, its keep probabilities, and mergekit fed with the same masks."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method
from compose.merging.random_masks import Words

WEIGHTS = (1.0, -0.5, 0.7)
NAMES = ("math", "code", "law")


def deltas(dtype=torch.float64, width=31, weights=WEIGHTS) -> Deltas:
    draw = torch.Generator().manual_seed(7)
    updates = [
        LowRank(
            torch.randn(rank, width, generator=draw, dtype=torch.float64),
            torch.randn(23, rank, generator=draw, dtype=torch.float64),
            0.5 + number,
        )
        for number, rank in zip(range(len(weights)), (3, 5, 2), strict=False)
    ]
    return Deltas.of(updates, weights, names=NAMES[: len(weights)], target="up", dtype=dtype)


def merged(given: Deltas, seed=3, **options) -> torch.Tensor:
    return make_method("della", options).merge(given, Context(seed=seed)).dense()


def chances(dense: torch.Tensor, density: float, epsilon: float) -> torch.Tensor:
    """Line by line, entry by entry: the rank is the number of smaller magnitudes."""
    x = dense.abs()
    ranks = (x[..., None, :] < x[..., :, None]).sum(dim=-1).double()
    return density - epsilon + 2 * epsilon * ranks / (dense.shape[-1] - 1)


def masks(dense: torch.Tensor, density: float, epsilon: float, seed=3) -> torch.Tensor:
    words = torch.stack([Words(seed, name, "up", dense.shape[-1]).lines(0, len(dense[0])) for name in NAMES])
    return (words.double() + 2**31) / 2**32 < chances(dense, density, epsilon)


@pytest.mark.parametrize("semantics", ["paper", "mergekit"])
@pytest.mark.parametrize(("density", "epsilon"), [(0.3, 0.15), (0.5, 0.0), (0.6, 0.4)])
def test_della_is_the_dense_rule(semantics, density, epsilon) -> None:
    given = deltas()
    dense, w = given.rows(0, 23), given.weights[:, None, None]
    x = dense * masks(dense, density, epsilon)
    if semantics == "paper":
        x = x / chances(dense, density, epsilon)
    else:
        x = x * (dense.abs().sum(dim=(1, 2)) / x.abs().sum(dim=(1, 2)))[:, None, None]
    agree = (w * x).sign() == torch.where((w * x).sum(dim=0) >= 0, 1.0, -1.0)
    divisor = (agree * w).sum(dim=0) if semantics == "mergekit" else agree.sum(dim=0)
    expected = (w * x * agree).sum(dim=0) / torch.where(divisor == 0, 1.0, divisor)
    found = merged(given, density=density, epsilon=epsilon, semantics=semantics)
    assert_close(found, expected, atol=1e-10, rtol=1e-10)
    half = merged(given, density=density, epsilon=epsilon, semantics=semantics, scale=0.5)
    assert_close(half, expected / 2, atol=1e-10, rtol=1e-10)


def test_large_entries_are_kept_more_often_and_the_mean_is_the_delta() -> None:
    given = deltas(weights=(1.0,))
    dense = given.rows(0, 23)[0]
    runs = torch.stack([merged(given, seed, density=0.5, epsilon=0.4) for seed in range(400)])
    kept = (runs != 0).double().mean(dim=0)
    assert_close(kept, chances(dense, 0.5, 0.4), atol=0.13, rtol=0)
    ranks = dense.abs().argsort(dim=1).argsort(dim=1)
    assert_close(kept[ranks == 0].mean(), torch.tensor(0.1, dtype=torch.float64), atol=0.02, rtol=0)
    assert_close(kept[ranks == 30].mean(), torch.tensor(0.9, dtype=torch.float64), atol=0.02, rtol=0)
    noise = float((runs[0] - dense).norm())
    assert float((runs.mean(dim=0) - dense).norm()) < 1.3 * noise / 20


@pytest.mark.parametrize("semantics", ["paper", "mergekit"])
def test_densities_zero_and_one_drop_everything_and_nothing(semantics) -> None:
    given = deltas(weights=(1.0,))
    whole = merged(given, density=1.0, semantics=semantics)
    assert_close(whole, given.rows(0, 23)[0], atol=1e-12, rtol=1e-12)
    assert merged(given, density=0.0, semantics=semantics).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_of_equal_magnitudes_the_first_ranks_lower(dtype) -> None:
    """Lines of ones: the probability grows from the first column to the last."""
    given = Deltas.of([LowRank(torch.ones(1, 31), torch.ones(23, 1), 1.0)], [1.0], dtype=dtype)
    runs = torch.stack([merged(given, seed, density=0.5, epsilon=0.5 - 1e-6, rescale="none") for seed in range(100)])
    assert_close(runs.double().mean(dim=(0, 1)), torch.linspace(0, 1, 31, dtype=torch.float64), atol=0.06, rtol=0)


def test_single_and_double_precision_keep_the_same_entries() -> None:
    assert_close(merged(deltas(torch.float32)).double(), merged(deltas()), atol=1e-4, rtol=1e-4)


def test_a_line_of_one_entry_is_kept_with_the_density() -> None:
    given = deltas(width=1, weights=(1.0,))
    runs = torch.stack([merged(given, seed, density=0.5, epsilon=0.4) for seed in range(200)])
    assert float((runs != 0).double().mean()) == pytest.approx(0.5, abs=0.05)


@pytest.mark.parametrize("name", ["della", "della_linear"])
def test_parity_with_mergekit_on_the_same_masks(name, monkeypatch) -> None:
    mergekit = pytest.importorskip("mergekit.merge_methods")
    given = deltas(torch.float32)
    feed = iter(masks(given.rows(0, 23), 0.4, 0.2))
    monkeypatch.setattr(torch, "bernoulli", lambda chances: next(feed).to(chances))
    parameters = {"weight": list(WEIGHTS), "density": 0.4, "epsilon": 0.2}
    dense = [torch.zeros(23, 31), *given.rows(0, 23)]
    expected = mergekit.merge_tensors(dense, name, base_index=0, parameters=parameters)
    linear = {"elect": "none", "denominator": "none"} if name == "della_linear" else {}
    found = merged(given, density=0.4, epsilon=0.2, semantics="mergekit", **linear)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 0.1, "epsilon": 0.15}, r"must lie in \(0, 1\].*got density 0.1 and epsilon 0.15"),
        ({"density": 0.9, "epsilon": 0.15}, r"must lie in \(0, 1\]"),
        ({"epsilon": -0.1}, "epsilon must not be negative"),
        ({"density": 1.1}, r"density must lie in \[0, 1\]"),
        ({"semantics": "peft"}, "semantics must be one of paper, mergekit; got 'peft'"),
        ({"rescale": "l2"}, "rescale must be "),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(IncompatibleError, match=message):
        make_method("della", options)
