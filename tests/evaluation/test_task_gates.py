"""Gates averaged per task: those of routers that decide per task come back exactly, and do the same in force."""

import pytest
import torch

from compose.adapter import Adapter
from compose.bank import Bank
from compose.errors import IncompatibleError
from compose.evaluation.around import routed_rows, told_of, weighted_rows
from compose.evaluation.task_gates import task_gates
from compose.fewshot.scoring import score
from compose.routers.experts import fresh_experts, linear_targets
from compose.routers.gates.linear import LinearGate
from compose.routers.gates.table import TableGate
from compose.routers.presets.registry import preset
from compose.routers.spec import MixtureSpec
from compose.text.encoding import encode

TASKS = ("add_one", "largest", "sum", "stars")
BY_TASK = {"gate": TableGate(rows="tasks"), "scope": "task", "gate_input": "task_id"}


def found(mixture, loaded, records, **more):
    """Mean gates with tasks numbered as they appear in ``records``, which is not the router's order."""
    numbers = {task: number for number, task in enumerate(dict.fromkeys(record.task for record in records))}
    said = told_of(mixture, records, None)
    examples, tasks = [record.example for record in records], [numbers[record.task] for record in records]
    return numbers, task_gates(mixture, loaded, examples, tasks, num_tasks=len(numbers), said=said, **more)


def scattered(mixture):
    """Give every gate a table of its own."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in mixture.router.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return mixture


def of_targets(mixture, gates, task: int) -> dict[str, torch.Tensor]:
    """Target -> mean gates ``(E,)``."""
    return {target: gates.values_GTE[gates.groups[target], task] for target in mixture.attached.layers}


def decided(mixture, **said) -> dict[str, torch.Tensor]:
    """Target -> the gates ``(E,)`` that the router has for a row."""
    with torch.no_grad(), mixture.recording() as decisions:
        mixture(input_ids=torch.tensor([[5, 6]]), **said)
    of_sites = {each.site: each.gates_NE[0] for each in decisions}
    return {target: of_sites[site] for target, site in mixture.router.site_of.items()}


def test_static_gates_are_those_of_every_task(loaded, routed, records) -> None:
    mixture = scattered(routed(preset("linear_fusion", site="block", missing="zero")))
    _, gates = found(mixture, loaded, records(2))
    wanted = decided(mixture)
    for task in range(3):
        torch.testing.assert_close(of_targets(mixture, gates, task), wanted)
    assert len({tuple(value.tolist()) for value in wanted.values()}) > 3
    assert gates.values_GTE[-1].abs().max() == 0


def test_gates_by_task_are_the_table_s_rows_whatever_their_order(loaded, routed, records) -> None:
    mixture = scattered(routed(MixtureSpec(**BY_TASK, site="block", missing="zero"), tasks=TASKS))
    numbers, gates = found(mixture, loaded, records(3))
    assert list(numbers) == ["sum", "add_one", "largest"]
    for task, number in numbers.items():
        wanted = decided(mixture, task_ids=torch.tensor([TASKS.index(task)]))
        torch.testing.assert_close(of_targets(mixture, gates, number), wanted)


def test_gates_of_tokens_are_means_over_real_tokens(loaded, routed, records) -> None:
    mixture = routed(MixtureSpec(gate=LinearGate(init="normal", std=1.0)))
    few = records(3, "sum")
    _, together = found(mixture, loaded, few)
    examples = [record.example for record in few]
    sums: dict[str, torch.Tensor] = {}
    for row in encode(examples, loaded.tokenizer, loaded.prompt_format, encoder_decoder=False):
        with torch.no_grad(), mixture.recording() as decisions:
            mixture(input_ids=torch.tensor([[*row.prompt, *row.response]]))
        for each in decisions:  # one row, no padding
            sums[each.site] = sums.get(each.site, 0) + each.gates_NE.sum(0)
    wanted = {target: sums[site] / sums[site].sum() for target, site in mixture.router.site_of.items()}
    torch.testing.assert_close(of_targets(mixture, together, 0), wanted, rtol=1e-4, atol=1e-5)


def uneven(bank: Bank) -> Bank:
    """The bank with one adapter that has factors in every second layer only."""
    adapters = [bank[name] for name in bank.names]
    first = adapters[0]
    half = {target: one for number, (target, one) in enumerate(first.targets.items()) if number % 2}
    return Bank.from_adapters([Adapter(first.name, first.base, half), *adapters[1:]], base=bank.base)


@pytest.mark.parametrize("combine", ["outputs", "parameters"])
@pytest.mark.parametrize("missing", ["mask", "zero"])
def test_in_force_they_do_what_a_router_by_task_does(combine, missing, loaded, bank, routed, records) -> None:
    spec = MixtureSpec(**BY_TASK, site="block", combine=combine, missing=missing, targets=r"self_attn|layers\.0")
    mixture = scattered(routed(spec, over=uneven(bank), tasks=TASKS))
    numbers, gates = found(mixture, loaded, records(1, split="shots"))
    test = records(2)
    examples = [record.example for record in test]
    own = score(loaded, examples, routed_rows(mixture, told_of(mixture, test, None)))
    values = gates.rows([numbers[record.task] for record in test])
    same = score(loaded, examples, weighted_rows(mixture.attached, values, gates.groups, combine=combine))
    assert same.texts == own.texts
    torch.testing.assert_close(same.losses, own.losses, rtol=1e-4, atol=1e-4)


def test_sites_with_nothing_to_choose_keep_their_gates(loaded, routed, records, bank) -> None:
    mixture = routed(MixtureSpec(gate=LinearGate(), always_on=bank.names, global_scale=0.5))
    _, gates = found(mixture, loaded, records(1))
    for target, values_E in of_targets(mixture, gates, 0).items():
        assert values_E.tolist() == [0.5 * (target in bank[name].targets) for name in bank.names]


def test_experts_that_are_more_than_factors_are_refused(loaded, routed, records) -> None:
    targets = [target for target in linear_targets(loaded.model) if "layers.0." in target]
    fresh = Bank.from_adapters(fresh_experts(loaded.model, targets, num_experts=3, rank=2, init="kaiming_both"))
    mixture = routed(preset("mhr", train="router"), over=fresh, tasks=("sum", "add_one", "largest"))
    with pytest.raises(IncompatibleError, match="cannot be put into force"):
        found(mixture, loaded, records(1))
