"""dare: unbiased, exact densities at the ends, and the arithmetic of PEFT and mergekit on the same masks."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method
from compose.merging.random_masks import Words, highest_word

WEIGHTS = (1.0, -0.5, 0.7)
NAMES = ("math", "code", "law")


def deltas(dtype=torch.float64, weights=WEIGHTS) -> Deltas:
    draw = torch.Generator().manual_seed(5)
    updates = [
        LowRank(
            torch.randn(rank, 31, generator=draw, dtype=torch.float64),
            torch.randn(23, rank, generator=draw, dtype=torch.float64),
            0.5 + number,
        )
        for number, rank in enumerate((3, 5, 2))
    ]
    return Deltas.of(updates, weights, names=NAMES, target="up", dtype=dtype)


def merged(given: Deltas, seed=0, **options) -> torch.Tensor:
    return make_method("dare", options).merge(given, Context(seed=seed)).dense()


def masks(density: float, seed=0) -> list[torch.Tensor]:
    highest = highest_word(torch.tensor(density))
    return [Words(seed, name, "up", 31).lines(0, 23) <= highest for name in NAMES]


@pytest.mark.parametrize("rescale", ["probability", "l1", "none"])
def test_dare_is_the_masked_rescaled_sum(rescale) -> None:
    given = deltas()
    expected = torch.zeros(23, 31, dtype=torch.float64)
    for x, mask, weight in zip(given.rows(0, 23), masks(0.3), WEIGHTS, strict=True):
        factor = {"probability": 1 / 0.3, "l1": x.abs().sum() / (x * mask).abs().sum(), "none": 1.0}[rescale]
        expected += weight * factor * x * mask
    assert_close(merged(given, density=0.3, rescale=rescale), expected, atol=1e-10, rtol=1e-10)
    assert_close(merged(given, density=0.3, rescale=rescale, scale=2.0), 2 * expected, atol=1e-10, rtol=1e-10)


def test_dare_is_the_weighted_sum_on_average() -> None:
    given = deltas()
    exact = given.combine(given.weights).dense()
    mean = sum(merged(given, seed, density=0.5) for seed in range(400)) / 400
    noise = float((merged(given, 0, density=0.5) - exact).norm())
    assert float((mean - exact).norm()) < 1.3 * noise / 20


def test_density_one_is_the_sum_and_density_zero_is_zero() -> None:
    given = deltas()
    for semantics in ("paper", "peft", "mergekit"):
        whole = merged(given, density=1.0, semantics=semantics)
        assert_close(whole, given.combine(given.weights).dense(), atol=1e-12, rtol=1e-12)
        assert merged(given, density=0.0, semantics=semantics).abs().max() == 0


def test_a_seed_repeats_and_another_does_not() -> None:
    given = deltas()
    assert torch.equal(merged(given, 1), merged(given, 1))
    assert not torch.equal(merged(given, 1), merged(given, 2))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parity_with_peft_on_the_same_masks(dtype, monkeypatch) -> None:
    peft = pytest.importorskip("peft.utils.merge_utils")
    given, feed = deltas(dtype), iter(masks(0.4))
    monkeypatch.setattr(torch, "bernoulli", lambda chances: next(feed).to(chances))
    expected = peft.dare_linear(list(given.rows(0, 23)), given.weights.to(dtype), 0.4)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(merged(given, density=0.4, semantics="peft"), expected, atol=tolerance, rtol=tolerance)


def test_parity_with_mergekit_on_the_same_masks(monkeypatch) -> None:
    mergekit = pytest.importorskip("mergekit.merge_methods")
    given, feed = deltas(torch.float32), iter(masks(0.4))
    monkeypatch.setattr(torch, "bernoulli", lambda chances: next(feed).to(chances))
    parameters = {"weight": list(WEIGHTS), "density": 0.4}
    dense = [torch.zeros(23, 31), *given.rows(0, 23)]
    expected = mergekit.merge_tensors(dense, "dare_linear", base_index=0, parameters=parameters)
    assert_close(merged(given, density=0.4, semantics="mergekit"), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": -1}, r"density must lie in \[0, 1\], got -1"),
        ({"semantics": "della"}, "semantics must be one of paper, peft, mergekit; got 'della'"),
        ({"rescale": "l2"}, "rescale must be 'probability', 'l1', 'none' or left out, got 'l2'"),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(IncompatibleError, match=message):
        make_method("dare", options)
