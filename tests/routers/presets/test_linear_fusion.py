"""Fixed and learned fusion weights equal coefficients set by hand."""

import pytest
import torch

from compose.engine.coefficients import Coefficients
from compose.errors import IncompatibleError
from compose.routers.gates.table import TableGate
from compose.routers.normalisations.identity import Identity
from compose.routers.presets.registry import preset


def test_uniform_unless_given(small) -> None:
    mixture = small(preset("linear_fusion"))
    torch.testing.assert_close(mixture.run(), mixture.by_hand(torch.full((4,), 0.25)))


def test_given_weights_equal_coefficients(small) -> None:
    weights = (0.7, -0.2, 0.4, 0.0)
    mixture = small(preset("linear_fusion", gate=TableGate(values=weights), normalise=Identity()))
    routed = mixture.run().detach()
    mixture.attached.set(Coefficients(torch.tensor(weights, dtype=torch.float64)))
    mixture.model(mixture.x)
    torch.testing.assert_close(routed, mixture.outputs["layers.0.mlp.up_proj"], rtol=1e-6, atol=1e-6)


def test_learned_weights_are_one_softmax(small) -> None:
    mixture = small(preset("linear_fusion_learned"))
    with torch.no_grad():
        mixture.gate.table_NE.copy_(torch.tensor([[0.3, -1.0, 2.0, 0.0]]))
    expected = torch.softmax(torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64), 0)
    torch.testing.assert_close(mixture.run(), mixture.by_hand(expected), rtol=1e-6, atol=1e-6)
    assert list(mixture.routed.trained_parameters()) == ["router.gates.model:model.gate.table_NE"]


def test_as_many_values_as_experts(small) -> None:
    with pytest.raises(IncompatibleError, match="2 values, the bank 4"):
        small(preset("linear_fusion", gate=TableGate(values=(1.0, 0.0))))
