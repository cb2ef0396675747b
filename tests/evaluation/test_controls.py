"""Ablations of gates: random order keeps the values, other rows keep the rows."""

import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.evaluation.controls import gates_of_other_rows, random_gates
from compose.routers.builder import build
from compose.routers.experts import fresh_experts, linear_targets
from compose.routers.presets.registry import preset
from compose.routers.routing import Routing


def routed_tiny(tiny_model, name: str = "molora", **options):
    model = tiny_model("llama")
    experts = fresh_experts(model, linear_targets(model), num_experts=4, rank=2, init="kaiming_both")
    return build(attach(model, Bank.from_adapters(experts)), preset(name, train="router", **options))


def routing(*lead: int) -> Routing:
    gates = torch.softmax(torch.randn(*lead, 4), -1)
    return Routing(gates, None, gates.log(), gates)


def test_random_order_keeps_every_decision_s_values(tiny_model) -> None:
    routed = routed_tiny(tiny_model)
    site = next(iter(routed.router.layout))
    given = routing(3, 5)
    changed = random_gates(routed.router, 0)(site, given).gates
    torch.testing.assert_close(changed.sort(-1).values, given.gates.sort(-1).values, rtol=0, atol=0)
    assert not torch.equal(changed, given.gates)
    again = random_gates(routed.router, 0)(site, given).gates
    assert torch.equal(again, changed)
    assert not torch.equal(random_gates(routed.router, 1)(site, given).gates, changed)


def test_random_order_stays_among_the_experts_of_the_site(tiny_model) -> None:
    routed = routed_tiny(tiny_model)
    site = next(iter(routed.router.layout))
    routed.router.site(site).available_E[1] = False
    given = routing(3, 5)
    given = given._replace(gates=given.gates * torch.tensor([1.0, 0.0, 1.0, 1.0]))
    assert random_gates(routed.router, 0)(site, given).gates[..., 1].abs().max() == 0


def test_gates_of_other_rows_are_rolled() -> None:
    given = routing(4, 5)
    changed = gates_of_other_rows()("site", given)
    assert torch.equal(changed.gates[0], given.gates[2])
    static = routing()
    assert gates_of_other_rows()("site", static) is static


def test_a_transform_acts_and_leaves(tiny_model) -> None:
    routed = routed_tiny(tiny_model).eval()
    ids = torch.tensor([[5, 6, 7], [8, 9, 10]])
    with torch.no_grad():
        plain = routed(input_ids=ids).logits
        with routed.transformed(gates_of_other_rows()):
            changed = routed(input_ids=ids).logits
        assert not torch.equal(changed, plain)
        assert torch.equal(routed(input_ids=ids).logits, plain)
