"""MOELoRA's gates by task, by hand (arXiv:2310.18339)."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.presets.registry import PRESETS, preset

TASKS = ("a", "b", "c")


def test_softmax_of_the_tasks_embedding(small) -> None:
    mixture = small(preset("moelora_task"), tasks=TASKS)
    output = mixture.run(task_ids=torch.tensor([2, -1]))
    table, weight = mixture.gate.table_ND.detach().double(), mixture.gate.weight_ED.detach().double()
    rows = torch.stack([table[2], table.mean(0)])
    gates = torch.softmax(rows @ weight.T, -1)
    torch.testing.assert_close(output, mixture.by_hand(gates[:, None]), rtol=1e-6, atol=1e-6)


def test_one_gate_for_all_layers(small) -> None:
    mixture = small(preset("moelora_task_shared"), tasks=TASKS, depth=3, targets="layers")
    assert list(mixture.routed.router.layout) == ["model:model"]
    assert len(mixture.routed.router.layout["model:model"].targets) == 6


def test_rank_16_in_eight_experts() -> None:
    experts = PRESETS["moelora_task"].experts
    assert experts.num_experts * experts.rank == 16


@pytest.mark.parametrize("number", [3, -2])
def test_numbers_beyond_the_table_are_refused(number, small) -> None:
    mixture = small(preset("moelora_task"), tasks=TASKS)
    with pytest.raises(IncompatibleError, match=r"must lie in \[0, 3\)"):
        mixture.run(task_ids=torch.tensor([0, number]))


def test_tasks_must_be_known_and_said(small) -> None:
    with pytest.raises(IncompatibleError, match="tasks="):
        small(preset("moelora_task"))
    with pytest.raises(IncompatibleError, match="task_ids="):
        small(preset("moelora_task"), tasks=TASKS).run()
