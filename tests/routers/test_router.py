"""Gates keep their values whatever dtype the model is cast to."""

from __future__ import annotations

import pytest
import torch

from compose.routers import preset


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
