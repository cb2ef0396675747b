"""Loss-free balance: the bias moves against the load, and a lopsided gate evens out."""

import pytest
import torch
from torch import nn

from compose.errors import IncompatibleError, UnknownNameError
from compose.routers.balance import SelectionBalance, nudge_, selection_bias
from compose.routers.component import SiteShape
from compose.routers.context import RoutingContext
from compose.routers.routing import Decisions
from compose.routers.selectors.top_k import TopK
from compose.routers.steps import Seen, masked

ALL = torch.ones(4, dtype=torch.bool)


def selector(available=ALL, bias=True, k=1) -> nn.Module:
    names = tuple(f"expert-{number}" for number in range(4))
    shape = SiteShape("site", 0, 1, 3, names, available, {}, 0, 0, 0, torch.Generator())
    return TopK(k=k, selection_bias=bias).build(shape)


def decide(module, logits, available=ALL, real=None, site="site") -> Decisions:
    logits = masked(logits, available)
    probs = torch.softmax(logits, -1)
    selected = module(logits, probs, Seen(None, None, None, None, RoutingContext(), True), available)
    gates = torch.zeros_like(probs).scatter(1, selected.expert_ids, selected.gates)
    real = torch.ones(len(logits), dtype=torch.bool) if real is None else real
    unknown = torch.full((len(logits),), -1)
    return Decisions(site, 0, logits, probs, gates, real, real, unknown, unknown, available)


def test_nudge_by_hand():
    bias = torch.tensor([0.0, 0.5, -0.5, 0.0])
    nudge_(bias, torch.tensor([6.0, 1.0, 3.0, 2.0]), ALL, 0.1)  # mean 3
    assert bias.tolist() == pytest.approx([-0.1, 0.6, -0.5, 0.1])
    nudge_(bias, torch.zeros(4), ALL, 0.1)
    assert bias.tolist() == pytest.approx([-0.1, 0.6, -0.5, 0.1])


def test_missing_experts_keep_their_bias_and_do_not_count():
    bias = torch.zeros(4)
    nudge_(bias, torch.tensor([4.0, 0.0, 4.0, 100.0]), torch.tensor([True, False, True, False]), 0.1)
    assert bias.tolist() == [0.0, 0.0, 0.0, 0.0]


@pytest.mark.parametrize("available", [(True,) * 4, (True, False, True, True)])
def test_a_lopsided_gate_evens_out(available):
    available_E = torch.tensor(available)
    module = selector(available_E)
    balance = SelectionBalance({"site": module}, rate=0.02)
    generator = torch.Generator().manual_seed(0)
    lean = torch.tensor([2.0, 0.5, 0.0, -1.0])
    shares = []
    for _ in range(150):
        given = decide(module, lean + torch.randn(400, 4, generator=generator), available_E)
        balance.observe([given])
        shares.append(balance.load("site") / 400)
        balance.step()
    assert float(shares[0].max()) > 0.6
    late = torch.stack(shares[-30:]).mean(0)[available_E]
    assert float(late.max()) < 1.3 / int(available_E.sum())
    assert float(late.min()) > 0.7 / int(available_E.sum())


def test_loads_add_up_over_forwards_and_leave_padding_out():
    module = selector(k=2)
    balance = SelectionBalance({"site": module})
    logits = torch.tensor([[3.0, 2, 1, 0], [0, 3, 2, 1], [3, 2, 1, 0]])
    balance.observe([decide(module, logits, real=torch.tensor([True, True, False]))])
    balance.observe([decide(module, logits[:1]), decide(module, logits, site="elsewhere")])
    assert balance.load("site").tolist() == [2, 3, 1, 0]
    balance.step()
    assert selection_bias(module).tolist() == pytest.approx([-1e-3, -1e-3, 1e-3, 1e-3])
    with pytest.raises(UnknownNameError, match="no decisions"):
        balance.load("site")


def test_a_step_without_decisions_changes_nothing():
    module = selector()
    SelectionBalance({"site": module}).step()
    assert selection_bias(module).tolist() == [0.0] * 4


def test_processes_move_by_their_common_load():
    module = selector()
    balance = SelectionBalance({"site": module}, rate=0.5)
    balance.observe([decide(module, torch.tensor([[3.0, 0, 0, 0]]))])  # load (1, 0, 0, 0)
    balance.step(lambda load: load + torch.tensor([0.0, 3.0, 1.0, 3.0]))  # in all (1, 3, 1, 3)
    assert selection_bias(module).tolist() == [0.5, -0.5, 0.5, -0.5]


def test_the_bias_is_found_inside_a_larger_module_and_has_no_gradient():
    module = nn.ModuleDict({"gate": nn.Linear(3, 4), "select": selector()})
    bias = selection_bias(module)
    assert bias is module["select"].selection_bias_E
    assert not bias.requires_grad
    assert selection_bias(selector(bias=False)) is None


def test_nothing_to_balance_is_refused():
    with pytest.raises(IncompatibleError, match="selection_bias=True"):
        SelectionBalance({"site": selector(bias=False)})
    with pytest.raises(IncompatibleError, match="rate"):
        SelectionBalance({"site": selector()}, rate=0.0)
