"""The experts' gradient carries the gate's root, values and gates' gradients are unchanged (arXiv:2502.15828)."""

import torch

from compose.routers.presets.registry import preset


def gradients(mixture):
    mixture.run().square().sum().backward()
    layer = mixture.attached.layers["layers.0.mlp.up_proj"]
    return mixture.gate.weight_ED.grad.clone(), layer.a_RD.grad.clone(), layer.b_RO.grad.clone()


def test_value_and_gradients(small) -> None:
    riemann = small(preset("moe_riemann"), experts=12)
    plain = small(preset("moe_riemann", expert_grad="plain"), experts=12)
    torch.testing.assert_close(riemann.run(), plain.run(), rtol=1e-6, atol=1e-6)
    (gate, a, b), (plain_gate, plain_a, _) = gradients(riemann), gradients(plain)
    torch.testing.assert_close(gate, plain_gate, rtol=1e-5, atol=1e-6)
    assert (a - plain_a).abs().max() > 1e-3
    x, dy = riemann.read(), 2 * riemann.outputs["layers.0.mlp.up_proj"].detach()
    probs = torch.softmax(x @ riemann.gate.weight_ED.detach().double().T, -1)
    best = probs.topk(10, dim=-1)
    g = torch.zeros_like(probs).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    stack = riemann.attached.layers["layers.0.mlp.up_proj"].stack
    for expert in range(12):
        a_e, b_e = (factor.detach() for factor in stack.factors(expert))
        root = 1.5 * g[..., expert].sqrt()[..., None]
        rows = slice(2 * expert, 2 * expert + 2)
        torch.testing.assert_close(a[rows], torch.einsum("btr,btd->rd", root * (dy @ b_e.T), x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(b[rows], torch.einsum("btr,bto->ro", root * (x @ a_e.T), dy), rtol=1e-4, atol=1e-5)
