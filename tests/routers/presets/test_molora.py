"""MoLoRA and MoV by hand (arXiv:2309.05444)."""

import torch

from compose.routers.presets.registry import PRESETS, preset
from compose.routers.selectors.top_k import TopK


def test_soft_mixture_per_token(small) -> None:
    mixture = small(preset("molora"))
    output = mixture.run()
    probs = torch.softmax(mixture.read() @ mixture.gate.weight_ED.detach().double().T, -1)
    torch.testing.assert_close(output, mixture.by_hand(probs), rtol=1e-6, atol=1e-6)


def test_top_k_masks_without_renormalising(small) -> None:
    mixture = small(preset("molora", select=TopK(k=2)))
    output = mixture.run()
    probs = torch.softmax(mixture.read() @ mixture.gate.weight_ED.detach().double().T, -1)
    lowest = probs.topk(2, dim=-1, largest=False).indices
    torch.testing.assert_close(output, mixture.by_hand(probs.scatter(-1, lowest, 0.0)), rtol=1e-6, atol=1e-6)


def test_vectors_are_merged_before_use(small) -> None:
    mixture = small(preset("mov"))
    experts = mixture.routed.mixer.structure("layers.0.mlp.up_proj")
    torch.testing.assert_close(mixture.run(), mixture.base(), rtol=1e-6, atol=1e-6)  # vectors of ones
    with torch.no_grad():
        experts.l_EO.normal_()
    output = mixture.run()
    probs = torch.softmax(mixture.read() @ mixture.gate.weight_ED.detach().double().T, -1)
    torch.testing.assert_close(output, (probs @ experts.l_EO.detach().double()) * mixture.base(), rtol=1e-6, atol=1e-6)


def test_sizes_of_the_code() -> None:
    experts = PRESETS["molora"].experts
    assert (experts.num_experts, experts.rank, experts.alpha, experts.init, experts.std) == (10, 4, 16, "normal", 0.02)
