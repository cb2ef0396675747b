"""compare: every contender once, each told no more than it may know, finished rows kept, refusals told."""

from dataclasses import replace

import pytest
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.errors import IncompatibleError
from compose.evaluation import compare as module
from compose.evaluation.compare import Baseline, Items, RouterRun, compare, score_run
from compose.evaluation.result import Row, summarise
from compose.fewshot.loading import LoadedModel
from compose.routers.builder import build
from compose.routers.experts import fresh_experts, linear_targets, linear_widths
from compose.routers.gates.linear import LinearGate
from compose.routers.gates.table import TableGate
from compose.routers.presets.registry import preset
from compose.routers.spec import MixtureSpec
from compose.routers.stages import Stage
from compose.routers.train_settings import TrainSettings
from compose.text.encoding import PromptFormat

TOKENS = MixtureSpec(gate=LinearGate(init="normal", std=1.0), site="model", gate_input="embeddings", preset="tokens")
BY_TASK = MixtureSpec(gate=TableGate(rows="tasks"), site="model", scope="task", gate_input="task_id", missing="zero")
TASKS = ("add_one", "largest", "sum")
SHORT = TrainSettings(batch_size=4, seed=5)


def a_run(loaded, bank, spec=TOKENS, *, name: str = "r", seed: int = 0, **more) -> RouterRun:
    def opened():
        torch.manual_seed(seed)
        return build(attach(loaded.model, bank), spec, seed=seed, **more)

    return RouterRun(name, seed, opened)


def by_task(loaded, bank) -> RouterRun:
    """A router that gives every task the adapter of its name."""

    def opened():
        routed = build(attach(loaded.model, bank), BY_TASK, tasks=TASKS)
        for table in routed.router.parameters():
            table.data = torch.tensor([[20.0 * (task == name) for name in bank.names] for task in TASKS])
        return routed

    return RouterRun("told", 0, opened)


def a_stage(**more) -> Stage:
    return Stage(name="one", steps=1, **more)


@pytest.fixture
def items(records) -> Items:
    return Items(test=records(2), choosing=records(1, split="shots"))


def test_all_contenders_stand_in_the_table_once(loaded, bank, items, records) -> None:
    before = {name: type(part) for name, part in loaded.model.named_modules()}
    runs = [a_run(loaded, bank, seed=seed) for seed in (0, 1)]
    baseline = Baseline(records=records(2, split="train"), stages=[a_stage()], settings=SHORT, seeds=(0,))
    rows = list(compare(loaded, bank, runs, items, baseline=baseline, merges=("sum",), merge_rank=4))
    per_run = ["r", "r: mean gates, told the task", "r: gates in random order", "r: gates of other rows"]
    names = ["base", "uniform average", "oracle adapters", "best merge", *per_run, *per_run]
    assert [row.name for row in rows[:-1]] == names
    assert rows[-1].name.startswith("one LoRA of rank ")
    assert [row.kind for row in rows[:5]] == ["reference"] * 4 + ["router"]
    assert all(set(row.tasks) == {"sum", "add_one", "largest"} and not row.skipped for row in rows)
    assert {name: type(part) for name, part in loaded.model.named_modules()} == before
    assert not any(parameter.requires_grad for parameter in loaded.model.parameters())
    assert len({row.loss for row in rows}) == len(rows)


def test_a_router_that_picks_each_task_s_adapter_is_the_oracle(loaded, bank, items) -> None:
    rows = {row.name: row for row in compare(loaded, bank, [by_task(loaded, bank)], items, merges=())}
    oracle = rows["oracle adapters"]
    assert oracle.exact > rows["base"].exact
    for name in ("told", "told: mean gates, told the task"):
        assert {task: score.exact for task, score in rows[name].tasks.items()} == {
            task: score.exact for task, score in oracle.tasks.items()
        }
        assert rows[name].loss == pytest.approx(oracle.loss, abs=1e-4)
    for name in ("told: gates in random order", "told: gates of other rows"):
        assert rows[name].loss > oracle.loss + 0.1
    assert rows["told"].trained == 9
    assert "best merge" not in rows


def test_uniform_gates_in_another_order_are_the_same(loaded, bank, items) -> None:
    run = a_run(loaded, bank, MixtureSpec(gate=LinearGate(init="zeros")))
    router, *ablations = compare(loaded, None, [run], items)
    assert len(ablations) == 3
    for row in ablations:
        assert row.loss == pytest.approx(router.loss, abs=1e-4)


def test_random_gates_follow_from_the_seed(loaded, routed, items) -> None:
    mixture = routed(TOKENS)

    def random(seed: int) -> Row:
        rows = score_run(loaded, mixture, Items(test=items.test), name="r", seed=seed)
        return next(row for row in rows if "random" in row.name)

    assert random(0) == random(0)
    assert random(0).loss != random(1).loss


def test_the_oracle_counts_the_tasks_that_have_an_adapter(loaded, bank, records) -> None:
    items = Items(test=records(2, "sum", "stars", labelled=False))
    rows = {row.name: row for row in compare(loaded, bank, [], items)}
    assert list(rows["oracle adapters"].tasks) == ["sum"]
    assert rows["oracle adapters"].about == "no adapter for stars"
    assert set(rows["base"].tasks) == {"sum", "stars"}
    (summary,) = [one for one in summarise(list(rows.values())) if one.name == "uniform average"]
    assert summary.ratio == rows["uniform average"].tasks["sum"].exact / rows["oracle adapters"].exact


def test_no_task_with_an_adapter_no_oracle(loaded, bank, records) -> None:
    rows = list(compare(loaded, bank, [], Items(test=records(1, "stars", labelled=False))))
    assert [row.name for row in rows] == ["base", "uniform average"]


def test_what_a_router_cannot_be_told_is_said_in_its_row(loaded, bank, records) -> None:
    run = a_run(loaded, bank, BY_TASK, tasks=("sum", "other"))
    (row,) = compare(loaded, None, [run], Items(test=records(1, "sum", "largest")))
    assert (row.kind, row.tasks) == ("router", {})
    assert "not trained on task 'largest'" in row.skipped


def test_a_router_that_is_not_ready_does_not_end_the_others(loaded, bank, records) -> None:
    runs = [a_run(loaded, bank, preset("avg_act"), name="empty"), a_run(loaded, bank)]
    first, second = compare(loaded, None, runs, Items(test=records(1, "sum")), ablations=False)
    assert "has no prototypes yet" in first.skipped
    assert not second.skipped


def test_mean_gates_that_cannot_be_are_told_and_the_rest_goes_on(loaded, bank, records) -> None:
    def told(spec, choosing, **more) -> Row:
        items = Items(test=records(1, "sum", "largest"), choosing=choosing)
        rows = list(compare(loaded, None, [a_run(loaded, bank, spec, **more)], items))
        assert [bool(row.skipped) for row in rows] == [False, True, False, False]
        return rows[1]

    assert told(TOKENS, records(1, "sum")).skipped == "no records to average over for largest"
    strange = records(1, "sum", "largest", "stars", labelled=False)
    assert "not trained on task 'stars'" in told(BY_TASK, strange, tasks=("sum", "largest")).skipped


def test_finished_rows_are_not_measured_again(loaded, bank, records, monkeypatch) -> None:
    items = Items(test=records(1), choosing=records(1, split="shots"))

    def all_rows(**more) -> list[Row]:
        baseline = Baseline(records=records(1, split="train"), stages=[a_stage()], settings=SHORT, seeds=(0, 1))
        options = {"merges": ("sum",), "merge_rank": 4, "baseline": baseline, **more}
        return list(compare(loaded, bank, [a_run(loaded, bank)], items, **options))

    whole = all_rows()
    assert all_rows(kept=whole[:6]) == whole
    for name in ("score", "best_merge", "task_gates", "train"):
        monkeypatch.setattr(module, name, lambda *words, **options: pytest.fail("measured again"))
    assert all_rows(kept=whole) == whole


def test_one_lora_has_the_lowest_rank_with_as_many_parameters(loaded, bank, records) -> None:
    per_rank = sum(sum(linear_widths(loaded.model, target)) for target in bank.targets)
    shared = {"records": records(1, split="train"), "stages": [a_stage()], "settings": SHORT, "seeds": (0,)}
    for wanted, rank in ((1, 1), (per_rank, 1), (per_rank + 1, 2)):
        baseline = Baseline(**shared, parameters=wanted, targets=list(bank.targets))
        (row,) = compare(loaded, None, [], Items(test=records(1, "sum")), baseline=baseline)
        assert (row.name, row.trained) == (f"one LoRA of rank {rank}", rank * per_rank)


def test_one_lora_for_every_size_of_router(loaded, bank, records) -> None:
    per_rank = sum(sum(linear_widths(loaded.model, target)) for target in bank.targets)
    runs = [a_run(loaded, bank), a_run(loaded, bank, seed=1), a_run(loaded, bank, name="other")]
    runs = [replace(runs[0], trained=3 * per_rank), replace(runs[1], trained=1), replace(runs[2], trained=per_rank)]
    baseline = Baseline(records=records(1, split="train"), stages=[a_stage()], settings=SHORT, seeds=(0, 1))
    options = {"baseline": baseline, "ablations": False}
    rows = list(compare(loaded, None, runs, Items(test=records(1, "sum")), **options))
    loras = [(row.name, row.seed) for row in rows if row.kind == "baseline"]
    assert loras == [(f"one LoRA of rank {rank}", seed) for rank in (3, 1) for seed in (0, 1)]


def test_one_lora_is_trained_as_the_stages_say(loaded, bank, records, monkeypatch) -> None:
    seen = []
    real = module.train

    def spy(attached, spec, given, **options):
        seen.append((given, options["stages"], options["settings"]))
        return real(attached, spec, given, **options)

    monkeypatch.setattr(module, "train", spy)
    stages = [
        Stage(name="a", train="router", steps=1, learning_rate=0.02),
        Stage(name="b", train="both", steps=1, learning_rate=0.02, expert_learning_rate=0.003),
    ]
    shared = {"records": records(1, split="train"), "settings": SHORT, "seeds": (7,), "parameters": 1}
    for rate in (None, 0.5):
        baseline = Baseline(**shared, stages=stages, learning_rate=rate, targets=list(bank.targets))
        (row,) = compare(loaded, None, [], Items(test=records(1, "sum")), baseline=baseline)
        assert row.seed == 7
    for (given, used, settings), rates in zip(seen, [(0.02, 0.003), (0.5, 0.5)], strict=True):
        assert [(stage.train, stage.learning_rate, stage.expert_learning_rate) for stage in used] == [
            ("experts", rate, None) for rate in rates
        ]
        assert all(record.expert is None for record in given)
        assert settings == replace(SHORT, seed=7)


def test_one_lora_that_cannot_be_is_told(loaded, bank, records) -> None:
    train = records(1, split="train")
    by_label = Baseline(records=train, stages=[a_stage(experts=("sum",))], settings=SHORT)
    row = list(compare(loaded, bank, [], Items(test=records(1)), baseline=by_label))[-1]
    assert "expert's label" in row.skipped
    too_long = Baseline(records=train, stages=[a_stage(tasks=("stars",))], settings=SHORT, seeds=(0,))
    row = list(compare(loaded, bank, [], Items(test=records(1)), baseline=too_long))[-1]
    assert "stars" in row.skipped
    assert not any("Composed" in type(part).__name__ for part in loaded.model.modules())
    with pytest.raises(IncompatibleError, match="needs targets"):
        list(compare(loaded, None, [], Items(test=records(1)), baseline=Baseline(records=train, stages=[a_stage()])))


def test_there_must_be_items(loaded, bank) -> None:
    with pytest.raises(IncompatibleError, match="no items"):
        list(compare(loaded, bank, [], Items(test=[])))


def test_a_router_that_stands_already_stays(loaded, bank, routed, items) -> None:
    mixture = routed(TOKENS)
    rows = list(score_run(loaded, mixture, items, name="mine", seed=3, trained=5, ablations=False))
    assert [(row.name, row.seed, row.trained) for row in rows] == [("mine", 3, 5)]
    assert mixture.attached.active is mixture.session
    others = list(compare(loaded, None, [], items))
    assert others == []


def test_a_bank_of_a_mixture_s_own_experts_is_not_needed(loaded, bank, items) -> None:
    own = Bank.from_adapters([bank[name] for name in bank.names], base=bank.base)
    rows = list(compare(loaded, None, [a_run(loaded, own)], Items(test=items.test), ablations=False))
    assert [row.name for row in rows] == ["r"]


def test_an_encoder_decoder_is_compared_alike(tiny_model, loaded, records) -> None:
    model = tiny_model("t5")
    model.resize_token_embeddings(300)
    two = LoadedModel(model.requires_grad_(False), loaded.tokenizer, PromptFormat())
    targets = [target for target in linear_targets(model) if "relative" not in target]
    own = Bank.from_adapters(fresh_experts(model, targets, num_experts=3, rank=2, init="kaiming_both"))
    router = MixtureSpec(gate=LinearGate(init="normal", std=1.0))
    test = records(2, "sum", "add_one", labelled=False)
    items = Items(test=test, choosing=records(1, "sum", "add_one", split="shots", labelled=False))
    baseline = Baseline(records=test, stages=[a_stage()], settings=SHORT, seeds=(0,), parameters=1)
    rows = list(compare(two, own, [a_run(two, own, router)], items, baseline=baseline, merges=("sum",), merge_rank=4))
    assert [row.name for row in rows] == [
        "base", "uniform average", "best merge", "r", "r: mean gates, told the task", "r: gates in random order",
        "r: gates of other rows", "one LoRA of rank 1",
    ]  # fmt: skip
    assert not any(row.skipped for row in rows)
    assert len({round(row.loss, 6) for row in rows}) == len(rows)
