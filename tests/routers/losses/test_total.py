"""The sum of losses over sites."""

import pytest
import torch
from torch.testing import assert_close

from compose.errors import UnknownNameError
from compose.routers.losses.entropies import Entropy
from compose.routers.losses.load_balance import SwitchLoadBalance
from compose.routers.losses.registry import AbstractLoss
from compose.routers.losses.total import name_of, over_processes, total_loss
from compose.routers.losses.z_loss import ZLoss


def test_mean_and_sum_over_sites(decisions, alone):
    sites = [decisions(torch.randn(5, 4)) for _ in range(3)]
    lb, z = SwitchLoadBalance(coefficient=0.5), ZLoss(coefficient=2.0, reduce="sum")
    total, parts = total_loss((lb, z), sites)
    values = {
        "lb": torch.stack([lb(site, alone) for site in sites]),
        "z": torch.stack([z(site, alone) for site in sites]),
    }
    assert_close(parts["switch_lb"], values["lb"].mean())
    assert_close(parts["z"], values["z"].sum())
    assert_close(total, 0.5 * values["lb"].mean() + 2 * values["z"].sum())


def test_total_reaches_the_scores_and_parts_do_not(decisions):
    logits = torch.randn(5, 4).requires_grad_()
    total, parts = total_loss((ZLoss(),), [decisions(logits)])
    assert not parts["z"].requires_grad
    total.backward()
    assert bool((logits.grad != 0).any())


def test_a_loss_may_appear_twice(decisions):
    _, parts = total_loss((Entropy(), Entropy(sign=-1)), [decisions(torch.randn(5, 4))])
    assert list(parts) == ["entropy", "entropy_2"]
    assert_close(parts["entropy"], -parts["entropy_2"])


def test_no_sites_or_no_losses_give_0(decisions):
    assert total_loss((ZLoss(),), []).total.item() == 0
    assert total_loss((), [decisions(torch.randn(5, 4))]) == (torch.tensor(0.0), {})


def test_world_sum_is_handed_on(decisions):
    calls = []
    total_loss((ZLoss(),), [decisions(torch.randn(5, 4))] * 2, lambda counts: calls.append(counts) or counts)
    assert len(calls) == 2


def test_one_process_adds_up_to_itself():
    counts = torch.tensor([1.0, 2.0])
    assert over_processes(counts) is counts


def test_unregistered_losses_have_no_name():
    class Own(AbstractLoss):
        def __call__(self, decisions, world_sum):
            return torch.zeros(())

    with pytest.raises(UnknownNameError, match="Own"):
        name_of(Own())


PROCESS = """
import sys, torch
from compose.routers.losses.total import over_processes
rank, address = int(sys.argv[1]), sys.argv[2]
torch.distributed.init_process_group("gloo", init_method=address, rank=rank, world_size=2)
mine = torch.tensor([1.0 + rank, 10.0])
assert over_processes(mine).tolist() == [3.0, 20.0], over_processes(mine)
assert mine.tolist() == [1.0 + rank, 10.0]
torch.distributed.destroy_process_group()
"""


def test_two_processes_add_up(tmp_path, warm_python):
    address = f"file://{tmp_path / 'meeting'}"
    running = [warm_python.start(PROCESS, rank, address) for rank in range(2)]
    for process in running:
        assert process.wait(120) == 0, process.stderr
