"""AdaMoLE, LD-MoLE and DynMoLE: how many experts take part is decided per token, by hand."""

import torch

from compose.routers.normalisations.sparsegen import Sparsegen
from compose.routers.presets.registry import preset


def test_adamole(small) -> None:
    mixture = small(preset("adamole"), targets="q_proj")
    query = "layers.0.attn.q_proj"
    mixture.routed(x=mixture.x)
    gate, select = mixture.gate, next(iter(mixture.routed.router.gates.values())).select
    x = mixture.read(query)
    probs = torch.softmax(x @ gate.weight_ED.detach().double().T, -1)
    tau = 0.25 * torch.sigmoid(x @ select.weight_D.detach().double() + select.bias.detach().double())
    above = (probs - tau[..., None]).clamp(min=0)
    assert ((above > 0).sum(-1) < 4).any()
    expected = mixture.by_hand(above / above.sum(-1, keepdim=True), query)
    torch.testing.assert_close(mixture.outputs[query], expected, rtol=1e-5, atol=1e-6)


def test_ld_mole(small) -> None:
    """At lambda = 0 sparsegen is sparsemax: of two experts the first gets ``clamp((1 + z1 - z2) / 2)``."""
    mixture = small(preset("ld_mole", normalise=Sparsegen(fixed=0.0), losses=()), experts=2)
    with torch.no_grad():
        mixture.gate.weight_ED.mul_(20.0)
    output = mixture.run()
    scores = mixture.read() @ mixture.gate.weight_ED.detach().double().T
    first = ((1 + scores[..., 0] - scores[..., 1]) / 2).clamp(0, 1)
    gates = torch.stack([first, 1 - first], -1)
    assert ((gates == 0).any(-1)).any()
    torch.testing.assert_close(output, mixture.by_hand(gates), rtol=1e-5, atol=1e-6)


def test_dynmole(small) -> None:
    mixture = small(preset("dynmole"), experts=4)
    with torch.no_grad():
        mixture.gate.weight_ED.mul_(4.0)
    output = mixture.run()
    probs = torch.softmax(mixture.read() @ mixture.gate.weight_ED.detach().double().T, -1)
    share = (1 - (probs**1.1).sum(-1)) / (1 - 4 * 0.25**1.1)
    ordered = probs.sort(dim=-1, descending=True)
    inside = ordered.values.cumsum(-1) - ordered.values < 0.75  # up to the expert that reaches 0.75, two at least
    inside[..., :2] = True
    kept = torch.zeros_like(probs, dtype=torch.bool).scatter(-1, ordered.indices, inside)
    kept |= share[..., None] > 0.9
    gates = probs * kept
    assert (share > 0.9).any()
    assert (share < 0.9).any()
    torch.testing.assert_close(output, mixture.by_hand(gates / gates.sum(-1, keepdim=True)), rtol=1e-5, atol=1e-6)
