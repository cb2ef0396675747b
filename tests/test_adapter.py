"""LowRank and Adapter: shapes, deltas, and that values stay what they were."""

import dataclasses

import pytest
import torch

from compose.adapter import Adapter, LowRank, Source
from compose.errors import IncompatibleError


def test_delta_is_scaling_times_b_times_a():
    update = LowRank(torch.tensor([[1.0, 2.0, 3.0]]), torch.tensor([[4.0], [5.0]]), 0.5)
    torch.testing.assert_close(update.delta(), torch.tensor([[2.0, 4.0, 6.0], [2.5, 5.0, 7.5]]), rtol=0, atol=0)
    assert (update.rank, update.in_features, update.out_features, update.kind) == (1, 3, 2, "linear")


def test_norm_is_the_norm_of_the_delta():
    update = LowRank(torch.randn(3, 7), torch.randn(5, 3), -0.7)
    assert update.norm() == pytest.approx(float(update.delta().double().norm()), rel=1e-6)
    assert LowRank(torch.zeros(2, 3), torch.ones(4, 2), 1.0).norm() == 0.0


@pytest.mark.parametrize(("a", "b"), [((2, 3), (4, 3)), ((2,), (4, 2)), ((2, 3), (4, 2, 1))])
def test_factors_must_share_a_rank(a, b):
    with pytest.raises(IncompatibleError, match=r"a must be \(R, I\) and b \(O, R\)"):
        LowRank(torch.ones(a), torch.ones(b), 1.0)


def test_an_adapter_counts_and_does_not_change():
    targets = {
        "q": LowRank(torch.ones(2, 3), torch.ones(4, 2), 1.0),
        "v": LowRank(torch.ones(1, 3), torch.ones(4, 1), 1.0),
    }
    adapter = Adapter("x", "base", targets, {"r": 2})
    assert adapter.ranks == {"q": 2, "v": 1}
    assert adapter.num_parameters == 2 * 3 + 4 * 2 + 3 + 4
    targets.clear()
    assert len(adapter.targets) == 2
    with pytest.raises(TypeError):
        adapter.targets["k"] = None
    with pytest.raises(TypeError):
        adapter.config["r"] = 3
    with pytest.raises(dataclasses.FrozenInstanceError):
        adapter.name = "y"


def test_replace_keeps_the_source():
    source = Source("{}", ("q",))
    adapter = Adapter("x", "", {"q": LowRank(torch.ones(1, 1), torch.ones(1, 1), 1.0)}, source=source)
    assert dataclasses.replace(adapter, name="y").source is source
