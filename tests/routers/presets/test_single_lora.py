"""The baseline is plain LoRA; Align-LoRA is that with a loss."""

import pytest
import torch

from compose.routers.presets.registry import PRESETS
from compose.routers.presets.single_lora import RANKS, none_r


@pytest.mark.parametrize("rank", RANKS)
def test_one_expert_of_the_rank_at_scaling_two(rank) -> None:
    entry = PRESETS[f"none_r{rank}"]
    assert (entry.experts.num_experts, entry.experts.rank, entry.experts.alpha) == (1, rank, 2 * rank)
    assert entry.spec.gate is None
    assert none_r(rank).spec == entry.spec


def test_any_other_rank() -> None:
    assert none_r(7).experts.rank == 7
    assert none_r(7).spec.preset == "none_r7"


def test_it_is_plain_lora(small) -> None:
    one = small(PRESETS["none_r8"].spec, experts=1)
    torch.testing.assert_close(one.run(), one.by_hand(torch.ones(1)))


@pytest.mark.parametrize(("name", "loss"), [("align_lora", "mmd_align"), ("align_lora_kl", "kl_align")])
def test_alignment_sees_tasks_apart(name, loss, routed_preset, inputs_of) -> None:
    routed, inputs = routed_preset(name, "llama", awake=True), inputs_of("llama")
    with torch.no_grad():
        routed(**inputs, task_ids=torch.tensor([0, 1, 1]))
        assert float(routed.last_losses[loss]) > 0
        routed(**inputs, task_ids=torch.tensor([1, 1, 1]))
        assert float(routed.last_losses[loss]) == 0
