"""LoRAMoE's localised balance over a batch of two kinds of tasks (arXiv:2312.09979)."""

import torch

from compose.routers.losses.localized import LocalizedCv2
from compose.routers.presets.registry import preset


def test_the_balance_is_part_of_the_loss(routed_preset, inputs_of) -> None:
    routed, inputs = routed_preset("loramoe", awake=True), inputs_of("llama")
    tasks = torch.tensor([0, 1, 1])
    with torch.no_grad(), routed.recording() as decisions:
        total = routed(**inputs, task_ids=tasks).loss
        plain = routed.model(**inputs).loss
    first = decisions[0]
    real, rows = first.real_N, torch.arange(3).repeat_interleave(9)
    mass = torch.stack([first.gates_NE[real & (rows == row)].sum(0) for row in range(3)])
    same = (torch.arange(8) < 4).long() == tasks[:, None]
    z = mass * torch.where(same, 1.1, 0.9)
    expected = z.var() / z.mean() ** 2
    value = LocalizedCv2(coefficient=0.1, delta=0.1)(first, lambda counts: counts)
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(total, plain + 0.1 * routed.last_losses["localized_cv2"], rtol=1e-5, atol=1e-5)


def test_all_experts_take_part_per_token(small) -> None:
    mixture = small(preset("loramoe"), experts=8)
    output = mixture.run()
    probs = torch.softmax(mixture.read() @ mixture.gate.weight_ED.detach().double().T, -1)
    torch.testing.assert_close(output, mixture.by_hand(probs), rtol=1e-6, atol=1e-6)
