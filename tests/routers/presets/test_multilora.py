"""MultiLoRA starts at the base model though no factor is zero."""

import torch

from compose.routers.presets.registry import preset


def test_scales_start_at_zero_and_learn_first(small) -> None:
    mixture = small(preset("multilora"), experts=3)
    output = mixture.run()
    torch.testing.assert_close(output, mixture.base(), rtol=0, atol=0)
    assert all((factor != 0).all() for factor in mixture.attached.layers["layers.0.mlp.up_proj"].stack.factors(1))
    output.square().sum().backward()
    expected = torch.einsum("bto,ebto->e", 2 * mixture.base(), mixture.deltas())
    torch.testing.assert_close(mixture.gate.table_NE.grad[0].double(), expected, rtol=1e-5, atol=1e-6)


def test_scales_are_free(small) -> None:
    mixture = small(preset("multilora"), experts=3)
    with torch.no_grad():
        mixture.gate.table_NE.copy_(torch.tensor([[2.0, -1.0, 0.5]]))
    torch.testing.assert_close(mixture.run(), mixture.by_hand(torch.tensor([2.0, -1.0, 0.5])), rtol=1e-6, atol=1e-6)
