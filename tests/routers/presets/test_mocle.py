"""MoCLE's mix by hand (arXiv:2312.12379)."""

import pytest
import torch

from compose.routers.presets.registry import preset


@pytest.mark.parametrize(("name", "power"), [("mocle", 1), ("mocle_g2", 2)])
def test_the_universal_expert_gets_what_the_gate_leaves(name, power, small) -> None:
    mixture = small(preset(name), experts=3, extra=("universal",), clusters=5)
    with torch.no_grad():
        mixture.gate.bias_E.copy_(torch.tensor([0.01, -0.02, 0.03, 0.0]))
        mixture.gate.weight_ED.mul_(0.05)  # so that no gate is 0 or 1 at temperature 0.05
    clusters = torch.tensor([4, 1])
    output = mixture.run(cluster_ids=clusters)
    gate = mixture.gate
    scores = gate.table_ND[clusters].double() @ gate.weight_ED.double().T + gate.bias_E.double()
    probs = torch.softmax(scores[:, :3] / 0.05, -1)
    best, place = probs.max(-1)
    assert ((best > 0.34) & (best < 0.999)).all()
    gates = torch.zeros(2, 4, dtype=torch.float64).scatter(1, place[:, None], best[:, None] ** power)
    gates[:, 3] = 1 - best
    torch.testing.assert_close(output, mixture.by_hand(gates.detach()[:, None]), rtol=1e-5, atol=1e-6)


def test_noise_in_training_only(small) -> None:
    mixture = small(preset("mocle", noise=5.0), experts=3, extra=("universal",), clusters=5)
    said = {"cluster_ids": torch.tensor([4, 1])}
    assert torch.equal(mixture.run(**said), mixture.run(**said))
    mixture.routed.train()
    assert not all(torch.equal(mixture.run(**said), mixture.run(**said)) for _ in range(3))
