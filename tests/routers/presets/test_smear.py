"""SMEAR averages parameters by the normalised mean of the prompt (arXiv:2306.03745)."""

import torch

from compose.routers.presets.registry import preset


def test_parameters_are_averaged(small) -> None:
    mixture = small(preset("smear"))
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    output = mixture.run(prompt_mask=mask)
    x = mixture.read()
    pooled = torch.stack([x[0, :3].mean(0), x[1, :4].mean(0)])
    normed = torch.nn.functional.layer_norm(pooled, (6,))
    probs = torch.softmax(normed @ mixture.gate.weight_ED.detach().double().T, -1)
    stack = mixture.attached.layers["layers.0.mlp.up_proj"].stack
    expected = mixture.base().clone()
    for row in range(2):
        a = sum(probs[row, e] * stack.factors(e)[0].detach() for e in range(4))
        b = sum(probs[row, e] * stack.factors(e)[1].detach() for e in range(4))
        expected[row] += 1.5 * (x[row] @ a.T) @ b
    torch.testing.assert_close(output, expected, rtol=1e-6, atol=1e-6)


def test_a_gate_for_each_part_of_a_layer(small) -> None:
    mixture = small(preset("smear"), targets="layers", depth=2)
    assert list(mixture.routed.router.layout) == [
        f"layers.{layer}:{part}" for layer in (0, 1) for part in ("attention", "feed_forward")
    ]
