"""dare_ties against dense arithmetic on its masks, and against PEFT and mergekit fed with the same masks."""

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


def deltas(dtype=torch.float64) -> Deltas:
    draw = torch.Generator().manual_seed(6)
    updates = [
        LowRank(
            torch.randn(rank, 31, generator=draw, dtype=torch.float64),
            torch.randn(23, rank, generator=draw, dtype=torch.float64),
            0.5 + number,
        )
        for number, rank in enumerate((3, 5, 2))
    ]
    return Deltas.of(updates, WEIGHTS, names=NAMES, target="up", dtype=dtype)


def merged(given: Deltas, **options) -> torch.Tensor:
    return make_method("dare_ties", options).merge(given, Context(seed=3)).dense()


def masks(density: float) -> list[torch.Tensor]:
    highest = highest_word(torch.tensor(density))
    return [Words(3, name, "up", 31).lines(0, 23) <= highest for name in NAMES]


def textbook(dense: torch.Tensor, density: float, semantics: str) -> torch.Tensor:
    x = dense * torch.stack(masks(density))
    if semantics == "mergekit":
        x = x * (dense.abs().sum(dim=(1, 2)) / x.abs().sum(dim=(1, 2)))[:, None, None]
    else:
        x = x / density
    w = torch.tensor(WEIGHTS, dtype=torch.float64)[:, None, None]
    votes = x if semantics == "peft" else w * x
    agree = votes.sign() == torch.where(votes.sum(dim=0) >= 0, 1.0, -1.0)
    total = (w * x * agree).sum(dim=0)
    return total if semantics == "mergekit" else total / agree.sum(dim=0).clamp(min=1)


@pytest.mark.parametrize("semantics", ["paper", "peft", "mergekit"])
@pytest.mark.parametrize("density", [0.2, 0.7])
def test_dare_ties_is_the_dense_rule(semantics, density) -> None:
    given = deltas()
    expected = textbook(given.rows(0, 23), density, semantics)
    assert_close(merged(given, density=density, semantics=semantics), expected, atol=1e-10, rtol=1e-10)
    assert_close(merged(given, density=density, semantics=semantics, scale=0.5), expected / 2, atol=1e-10, rtol=1e-10)


def test_at_density_one_it_is_ties_without_trimming_and_at_zero_nothing() -> None:
    given = deltas()
    for semantics in ("paper", "peft"):
        ties = make_method("ties", {"density": 1.0, "semantics": semantics}).merge(given, Context()).dense()
        assert_close(merged(given, density=1.0, semantics=semantics), ties, atol=0, rtol=0)
        assert merged(given, density=0.0, semantics=semantics).abs().max() == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_parity_with_peft_on_the_same_masks(dtype, monkeypatch) -> None:
    peft = pytest.importorskip("peft.utils.merge_utils")
    given, feed = deltas(dtype), iter(masks(0.4))
    monkeypatch.setattr(torch, "bernoulli", lambda chances: next(feed).to(chances))
    expected = peft.dare_ties(list(given.rows(0, 23)), given.weights.to(dtype), 0.4)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    assert_close(merged(given, density=0.4, semantics="peft"), expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("normalize", [True, False])
def test_parity_with_mergekit_on_the_same_masks(normalize, monkeypatch) -> None:
    mergekit = pytest.importorskip("mergekit.merge_methods")
    given, feed = deltas(torch.float32), iter(masks(0.4))
    monkeypatch.setattr(torch, "bernoulli", lambda chances: next(feed).to(chances))
    parameters = {"weight": list(WEIGHTS), "density": 0.4, "normalize": normalize}
    dense = [torch.zeros(23, 31), *given.rows(0, 23)]
    expected = mergekit.merge_tensors(dense, "dare_ties", base_index=0, parameters=parameters)
    found = merged(given, density=0.4, semantics="mergekit", denominator="weight" if normalize else None)
    assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"density": 1.1}, r"density must lie in \[0, 1\], got 1.1"),
        ({"semantics": "della"}, "semantics must be one of paper, peft, mergekit; got 'della'"),
        ({"rescale": "l2"}, "rescale must be 'probability', "),
        ({"elect": "most"}, "elect must be 'weighted', "),
    ],
)
def test_options_out_of_range_are_refused(options, message) -> None:
    with pytest.raises(IncompatibleError, match=message):
        make_method("dare_ties", options)
