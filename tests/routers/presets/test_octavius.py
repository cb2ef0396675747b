"""Octavius: one gate from the prompt's embeddings (arXiv:2311.02684)."""

import torch

from compose.routers.presets.registry import PRESETS, preset


def test_mean_of_prompt_embeddings_decides_for_all_layers(small) -> None:
    mixture = small(preset("octavius"), targets="layers", depth=2)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    mixture.run(prompt_mask=mask)
    pooled = torch.stack([mixture.x[0, :3].mean(0), mixture.x[1, :4].mean(0)])
    probs = torch.softmax(pooled @ mixture.gate.weight_ED.detach().double().T, -1)
    best = probs.topk(2, dim=-1)
    gates = torch.zeros_like(probs).scatter(-1, best.indices, best.values / best.values.sum(-1, keepdim=True))
    for target in mixture.attached.layers:
        torch.testing.assert_close(
            mixture.outputs[target], mixture.by_hand(gates[:, None], target), rtol=1e-6, atol=1e-6
        )


def test_the_codes_variant_has_no_scaling() -> None:
    with_scaling, without = PRESETS["octavius"].experts, PRESETS["octavius_noscale"].experts
    assert with_scaling.alpha / with_scaling.rank == 2
    assert without.alpha / without.rank == 1
