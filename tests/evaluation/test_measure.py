"""What a router decides over records: sums by task, right choices by label, texts with their experts."""

import pytest
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.errors import IncompatibleError
from compose.evaluation.measure import measure_routing
from compose.fewshot.loading import LoadedModel
from compose.report.routing_html import render_routing
from compose.routers.builder import build
from compose.routers.experts import fresh_experts, linear_targets
from compose.routers.gates.linear import LinearGate
from compose.routers.gates.table import TableGate
from compose.routers.spec import MixtureSpec
from compose.text.encoding import PromptFormat, encode

NORMAL = LinearGate(init="normal", std=1.0)


def test_every_token_of_prompts_and_responses_is_counted_by_task(loaded, routed, records) -> None:
    mixture, given = routed(MixtureSpec(gate=NORMAL, site="block", gate_input="block")), records(3)
    trace = measure_routing(mixture, loaded, given, about={"data": "some"})
    rows = encode([one.example for one in given], loaded.tokenizer, loaded.prompt_format, encoder_decoder=False)
    for task in ("sum", "add_one", "largest"):
        tokens = sum(
            len(row.prompt) + len(row.response) for row, one in zip(rows, given, strict=True) if one.task == task
        )
        site = trace.sites[0].site
        assert trace.metrics(site, task).decisions == tokens
    assert trace.about == {"data": "some"}
    assert len(trace.cosines) == 3
    assert "sum" in render_routing(trace)


def test_labels_tell_how_often_the_choice_is_right(loaded, bank, routed, records) -> None:
    spec = MixtureSpec(gate=TableGate(rows="tasks"), site="model", scope="task", gate_input="task_id")
    mixture = routed(spec, tasks=("add_one", "largest", "sum", "stars"))
    (table,) = mixture.router.parameters()
    with torch.no_grad():
        table.zero_()
        table[0, bank.index("add_one")] = table[1, bank.index("largest")] = table[2, bank.index("largest")] = 9.0
    given = records(2) + records(2, "stars", labelled=True)  # no expert has this name: no label
    trace = measure_routing(mixture, loaded, given)
    rates = {task: trace.overall(task).accuracy for task in ("add_one", "largest", "sum", "stars")}
    assert rates == {"add_one": 1.0, "largest": 1.0, "sum": 0.0, "stars": None}


def test_the_first_text_of_each_task_is_kept(loaded, routed, records) -> None:
    mixture, given = routed(MixtureSpec(gate=NORMAL)), records(2)
    trace = measure_routing(mixture, loaded, given, texts=2)
    assert [strip.name for strip in trace.strips] == ["add_one", "largest"]
    first = next(one for one in given if one.task == "add_one").example
    assert first.input in "".join(trace.strips[0].tokens[: trace.strips[0].prompt_length])
    assert first.output in "".join(trace.strips[0].tokens[trace.strips[0].prompt_length :])


def test_the_mode_stays_and_noise_is_off(loaded, routed, records) -> None:
    mixture = routed(MixtureSpec(gate=NORMAL, noise=9.0)).train()
    one, two = (measure_routing(mixture, loaded, records(1)).to_json() for _ in range(2))
    assert mixture.training
    assert one == two


def test_a_router_without_choices_leaves_no_sums(loaded, bank, routed, records) -> None:
    mixture = routed(MixtureSpec(gate=NORMAL, always_on=bank.names))
    trace = measure_routing(mixture, loaded, records(1))
    assert trace.overall() is None
    assert "othing was counted" in render_routing(trace)


def test_what_records_lack_is_named(loaded, routed, records) -> None:
    spec = MixtureSpec(gate=TableGate(rows="tasks"), site="model", scope="task", gate_input="task_id")
    with pytest.raises(IncompatibleError, match="not trained on task 'add_one'"):
        measure_routing(routed(spec, tasks=("sum",)), loaded, records(1))


def test_an_encoder_s_texts_are_shown(tiny_model, loaded, records) -> None:
    model = tiny_model("t5")
    model.resize_token_embeddings(300)
    targets = [target for target in linear_targets(model) if "relative" not in target]
    bank = Bank.from_adapters(fresh_experts(model, targets, num_experts=3, rank=2, init="kaiming_both"))
    with attach(model, bank) as attached:
        mixture = build(attached, MixtureSpec(gate=NORMAL))
        trace = measure_routing(mixture, LoadedModel(model, loaded.tokenizer, PromptFormat()), records(2))
    assert len(trace.sites) == len(targets)
    assert all(line.site.startswith("encoder") for strip in trace.strips for line in strip.lines)
