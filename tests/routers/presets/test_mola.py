"""MoLA's numbers of experts along the depth (arXiv:2402.08562)."""

import torch

from compose.routers.presets.registry import PRESETS, experts_for, preset
from compose.routers.selectors.top_k import TopK


def test_two_four_six_eight_in_quarters() -> None:
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)}) for _ in range(8)])
    adapters = experts_for("mola", model)
    counts = [sum(f"layers.{layer}.q_proj" in adapter.targets for adapter in adapters) for layer in range(8)]
    assert counts == [2, 2, 4, 4, 6, 6, 8, 8]


def test_missing_experts_take_no_part(routed_preset, say, inputs_of) -> None:
    routed = routed_preset("mola", awake=True)
    with torch.no_grad(), routed.recording() as decisions:
        routed(**inputs_of("llama"))
    for each in decisions:
        available = (2, 2, 4)[each.layer] if len(routed.router.experts) == 4 else (2, 4, 6)[each.layer]
        assert int(each.available_E.sum()) == available
        assert ((each.gates_NE > 0).sum(1) == 2).all()


def test_k_by_depth(small) -> None:
    mixture = small(preset("mola", select=TopK(k=(1, 3))), depth=2, targets="up_proj")
    active = []
    with torch.no_grad(), mixture.routed.recording() as decisions:
        mixture.run()
    active = [int((each.gates_NE > 0).sum(1).unique()) for each in decisions]
    assert active == [1, 3]


def test_probabilities_of_the_best_two_renormalised(small) -> None:
    mixture = small(preset("mola"))
    output = mixture.run()
    probs = torch.softmax(mixture.read() @ mixture.gate.weight_ED.detach().double().T, -1)
    best = probs.topk(2, dim=-1)
    gates = torch.zeros_like(probs).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    torch.testing.assert_close(output, mixture.by_hand(gates), rtol=1e-6, atol=1e-6)
    assert PRESETS["mola"].spec.losses[0].coefficient == 1e-3
