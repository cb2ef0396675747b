"""Gates keep their values whatever dtype the model is cast to."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compose.routers import preset
from compose.routers.selectors.top_p import TopP


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_casting_a_routed_model_does_not_round_its_gates(routed_over, dtype):
    routed = routed_over("llama", preset("xlora"))
    for parameter in routed.router.parameters():
        parameter.data = torch.rand(parameter.shape, generator=torch.Generator().manual_seed(1))
    before = {name: value.clone() for name, value in routed.router.state_dict().items()}
    routed.to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    assert before
    for name, value in routed.router.state_dict().items():
        assert value.dtype == wide
        assert torch.equal(value, before[name].to(wide))


def test_a_bias_after_selection_gives_nothing_to_experts_that_were_not_selected(routed_over):
    spec = replace(preset("molora"), post="bias", post_init=0.25, select=TopP(p=0.5))
    routed = routed_over("llama", spec)
    with torch.no_grad():
        for name, parameter in routed.router.named_parameters():
            if name.endswith("weight_ED"):
                parameter.normal_(generator=torch.Generator().manual_seed(1))
    with routed.recording() as decisions:
        routed.model(input_ids=torch.arange(3, 11)[None])
    gates = torch.cat([decision.gates_NE for decision in decisions])
    probs = torch.cat([decision.probs_NE for decision in decisions])
    selected = gates != 0
    assert selected.any(1).all()
    assert not selected.all()
    torch.testing.assert_close(gates[selected], probs[selected] + 0.25)
