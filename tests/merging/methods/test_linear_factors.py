"""linear_factors against PEFT, against the composition of LoRAHub, and not equal to a sum of updates."""

import pytest
import torch
from torch.testing import assert_close

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas
from compose.merging.method import Context, make_method
from compose.merging.ops import sum_factors

WEIGHTS = (0.25, -1.0, 4.0)  # roots are exact in float32, in which PEFT keeps its weights


def updates(ranks, scaling=1.0) -> list[LowRank]:
    generator = torch.Generator().manual_seed(5)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    return [LowRank(draw(r, 14), draw(11, r), scaling) for r in ranks]


def merged(given, weights, **options):
    deltas = Deltas.of(given, weights, target="lin", dtype=torch.float64)
    return make_method("linear_factors", options).merge(deltas, Context())


@pytest.mark.parametrize("scaling", [1.0, 2.0])
def test_it_is_linear_of_peft(scaling) -> None:
    peft = pytest.importorskip("peft")
    given = updates((4, 4, 4), scaling)
    model = torch.nn.Sequential(torch.nn.Linear(14, 11, bias=False)).double()
    config = peft.LoraConfig(r=4, lora_alpha=4 * scaling, target_modules=["0"])
    wrapped = peft.get_peft_model(model, config, adapter_name="n0", autocast_adapter_dtype=False)
    for number in (1, 2):
        wrapped.add_adapter(f"n{number}", config, autocast_adapter_dtype=False)
    layer = wrapped.base_model.model[0]
    with torch.no_grad():
        for number, update in enumerate(given):
            layer.lora_A[f"n{number}"].weight.copy_(update.a)
            layer.lora_B[f"n{number}"].weight.copy_(update.b)
    wrapped.add_weighted_adapter(["n0", "n1", "n2"], list(WEIGHTS), "both", combination_type="linear")
    expected = layer.get_delta_weight("both").detach()
    found = merged(given, WEIGHTS).dense()
    # PEFT multiplies by float32 weights: the root of 2 (scaling 2) is rounded there.
    tolerance = 1e-10 if scaling == 1.0 else 1e-6
    assert_close(found, expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("scaling", [1.0, 0.7])
def test_it_is_the_composition_of_lorahub_where_scalings_are_equal(scaling) -> None:
    given = updates((3, 5, 2), scaling)
    expected = sum_factors([LowRank(u.a.float(), u.b.float(), scaling) for u in given], WEIGHTS).delta()
    found = merged(given, WEIGHTS, semantics="lorahub")
    assert found.a.shape == (5, 14)
    assert_close(found.dense().float(), expected, atol=1e-4, rtol=1e-4)


def test_both_semantics_are_the_dense_products() -> None:
    given = updates((3, 5, 2), 0.7)
    a = [torch.nn.functional.pad(u.a, (0, 0, 0, 5 - u.rank)) for u in given]
    b = [torch.nn.functional.pad(0.7 * u.b, (0, 5 - u.rank)) for u in given]
    peft = (0.5 * b[0] + 1.0 * b[1] + 2.0 * b[2]) @ (0.5 * a[0] - 1.0 * a[1] + 2.0 * a[2])
    lorahub = (0.25 * b[0] - b[1] + 4 * b[2]) @ (0.25 * a[0] - a[1] + 4 * a[2])
    assert_close(merged(given, WEIGHTS).dense(), peft, atol=1e-10, rtol=1e-10)
    assert_close(merged(given, WEIGHTS, semantics="lorahub").dense(), lorahub, atol=1e-10, rtol=1e-10)


def test_it_has_cross_terms() -> None:
    """The reason for its name: it is far from the sum of the updates."""
    given = updates((4, 4, 4))
    total = sum(weight * update.delta() for weight, update in zip(WEIGHTS, given, strict=True))
    assert (merged(given, WEIGHTS).dense() - total).norm() > 0.5 * total.norm()


def test_unknown_semantics_are_refused() -> None:
    with pytest.raises(IncompatibleError, match="semantics must be 'peft' or 'lorahub', got 'mergekit'"):
        make_method("linear_factors", {"semantics": "mergekit"})
