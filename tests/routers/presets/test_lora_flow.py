"""LoRA-Flow's weights by hand (arXiv:2402.11455)."""

import torch

from compose.routers.presets.registry import preset


def test_the_bias_stands_outside_of_the_softmax(small) -> None:
    mixture = small(preset("lora_flow", post_init=(-0.5, 0.5)), experts=2, targets=r"layers")
    with torch.no_grad():
        mixture.gate.weight_ED.normal_()
    output = mixture.run()
    weights = torch.softmax(mixture.x @ mixture.gate.weight_ED.detach().double().T, -1) + torch.tensor([-0.5, 0.5])
    assert (weights < 0).any()
    assert (weights > 1).any()
    query = "layers.0.attn.q_proj"
    torch.testing.assert_close(mixture.outputs[query], mixture.by_hand(weights, query), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(output, mixture.by_hand(weights), rtol=1e-6, atol=1e-6)  # the same weights


def test_gates_and_biases_alone_train(small) -> None:
    mixture = small(preset("lora_flow"), experts=3, targets=r"layers", depth=2)
    names = sorted(name.partition(".gates.")[2] for name in mixture.routed.trained_parameters())
    assert names == [f"layers/{layer}.{part}" for layer in (0, 1) for part in ("gate.weight_ED", "post_E")]
