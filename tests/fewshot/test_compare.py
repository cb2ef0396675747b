"""Merge methods compared: the split, batched scores, what is chosen and on what, ranks, references, normalisation."""

import json
import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.engine.coefficients import Coefficients
from compose.engine.data_merge import DATA_METHODS
from compose.engine.generate import generate_tokens
from compose.engine.merge import merge
from compose.errors import ExamplesError, IncompatibleError, UnknownNameError
from compose.fewshot.compare import (
    LARGEST_SCALE,
    REFERENCES,
    Comparison,
    TaskItems,
    data_free_methods,
    record_of,
    row_of,
    split_items,
)
from compose.fewshot.compare_scores import score_rows
from compose.fewshot.data_batches import data_batches
from compose.fewshot.losses import response_losses
from compose.fewshot.scoring import score, stop_ids
from compose.merging.method import METHODS
from compose.text.encoding import PromptFormat, encode
from compose.text.examples import Example

LONGEST = 8


@pytest.fixture(scope="module")
def speaker(loaded):
    """The tiny model with a letter as the end of a response, which random adapters do write."""
    return loaded._replace(prompt_format=PromptFormat("{input}\n", "x"))


def answers_of(loaded, bank, name, seed, count=12):
    """Items whose outputs are what the model says under one adapter, so that this adapter answers all of them."""
    rng = random.Random(seed)
    asked = [Example("".join(rng.choices("abcdefgh", k=5)), "x") for _ in range(150)]
    encoded = encode(asked, loaded.tokenizer, loaded.prompt_format, encoder_decoder=False)
    with attach(loaded.model, bank) as attached, attached.using(name):
        found = generate_tokens(
            loaded.model, [row.prompt for row in encoded], max_new_tokens=LONGEST, stop_ids=stop_ids(loaded)
        )
    texts = loaded.tokenizer.batch_decode(found, skip_special_tokens=True)
    answers = [
        Example(one.input, text)
        for one, row, text in zip(asked, found, texts, strict=True)
        if 0 < len(row) < LONGEST - 1 and text == text.strip() != ""
    ]
    assert len(answers) >= count
    return answers[:count]


@pytest.fixture(scope="module")
def small(bank):
    return bank.select(["skill-0", "skill-1", "skill-4"])


@pytest.fixture(scope="module")
def tasks(speaker, small):
    found = {}
    for number, name in enumerate(("skill-0", "skill-1")):
        items = answers_of(speaker, small, name, number)
        found[name] = TaskItems(tuple(items[:5]), tuple(items[5:]))
    return found


def test_the_split_does_not_depend_on_order_and_keeps_equal_items_together() -> None:
    items = [Example(f"in {n % 20}", f"out {n % 20}") for n in range(40)]
    found = split_items({"t": items}, 0.3)["t"]
    assert len(found.selection) == 12
    assert len(found.test) == 28
    assert not {one.input for one in found.selection} & {one.input for one in found.test}
    shuffled = random.Random(0).sample(items, len(items))
    again = split_items({"t": shuffled}, 0.3)["t"]
    assert {one.input for one in again.selection} == {one.input for one in found.selection}


def test_both_sides_of_a_split_have_items() -> None:
    for share in (0.01, 0.99):
        found = split_items({"t": [Example("a", "b"), Example("c", "d")]}, share)["t"]
        assert len(found.selection) == len(found.test) == 1
    with pytest.raises(ExamplesError, match="task 'one' has 1 distinct items"):
        split_items({"one": [Example("a", "b"), Example("a", "b")]})
    with pytest.raises(ExamplesError, match=r"\(0, 1\), got 1"):
        split_items({"t": [Example("a", "b"), Example("c", "d")]}, 1)


def test_batched_rows_score_as_one_set_of_coefficients_after_the_other(speaker, small, tasks) -> None:
    items = [*tasks["skill-0"].test, *tasks["skill-1"].test]
    gates = np.array([[1.0, 0.0, 0.0], [0.3, -0.5, 2.0], [0.0, 0.0, 0.0]])
    which = np.tile(np.arange(len(items)), len(gates))
    with attach(speaker.model, small) as attached:
        found = score_rows(speaker, attached, items, which, np.repeat(gates, len(items), axis=0), rows=7)
        for number, one in enumerate(gates):
            with attached.using(Coefficients(torch.tensor(one, dtype=torch.float32))):
                expected = score(speaker, items)
            mine = slice(number * len(items), (number + 1) * len(items))
            np.testing.assert_array_equal(found.exact[mine], expected.exact)
            np.testing.assert_allclose(found.losses[mine], expected.losses, rtol=1e-4)
    assert found.exact[: len(tasks["skill-0"].test)].all()
    assert not found.exact.all()


def test_references_are_what_they_say(speaker, small, tasks) -> None:
    comparison = Comparison(speaker, small, tasks)
    assert comparison.rank == max(small["skill-1"].ranks.values())
    rows = {name: comparison.row(name) for name in REFERENCES}
    assert rows["own adapter"].macro("exact") == 1.0
    assert rows["own adapter"].normalised(rows["own adapter"]) == 1.0
    with attach(speaker.model, small) as attached:
        for task, items in tasks.items():
            assert rows["base"].tasks[task]["exact"] == score(speaker, items.test).exact.mean()
            with attached.using("skill-0"):
                mean_loss = score(speaker, items.test).losses.mean()
            if rows["best single"].options == {"adapter": "skill-0"}:
                assert rows["best single"].tasks[task]["loss"] == pytest.approx(mean_loss, rel=1e-4)
    assert rows["best single"].options["adapter"] in ("skill-0", "skill-1")
    summed = merge(small, "sum", rank=comparison.rank)
    assert rows["uniform sum"].lost == summed.relative_error > 0


def test_factor_and_density_are_chosen_on_the_selection_items_alone(speaker, small, tasks) -> None:
    comparison = Comparison(speaker, small, tasks)
    row = comparison.row("ties")
    other = Comparison(speaker, small, {task: TaskItems(one.selection, one.test[:1]) for task, one in tasks.items()})
    again = other.row("ties")
    assert (again.options, again.scale, again.selection) == (row.options, row.scale, row.selection)
    best = (-1.0, 0.0)
    for density in (0.2, 0.5):
        adapter = replace(merge(small, "ties", rank=comparison.rank, density=density).adapter, name="m")
        with attach(speaker.model, Bank.from_adapters([adapter])) as attached:
            for scale in {0.35, 0.5, 0.7, 1.0, 1.4, 2.0, row.scale}:
                with attached.using({"m": scale}):
                    scores = [score(speaker, one.selection) for one in tasks.values()]
                exact = np.mean([one.exact.mean() for one in scores])
                loss = np.mean([one.losses.mean() for one in scores])
                best = max(best, (exact, -loss))
                if (density, scale) == (row.options["density"], row.scale):
                    assert row.selection["exact"] == pytest.approx(exact)
                    assert row.selection["loss"] == pytest.approx(loss, rel=1e-4)
    assert row.selection["exact"] == pytest.approx(best[0])


def test_the_factor_goes_on_beyond_the_end_of_the_grid(speaker, small) -> None:
    items = answers_of(speaker, small, "skill-0", 3)
    tasks = {"t": TaskItems(tuple(items[:6]), tuple(items[6:]))}
    weak = Bank.from_adapters(
        [
            replace(
                small["skill-0"],
                targets={key: replace(one, b=one.b / 2.8) for key, one in small["skill-0"].targets.items()},
            )
        ]
    )
    row = Comparison(speaker, weak, tasks).row("sum")
    assert 2 < row.scale < LARGEST_SCALE
    assert row.selection["exact"] == 1.0


def test_every_result_has_the_rank_of_the_comparison(speaker, small, tasks, monkeypatch) -> None:
    seen = []

    def recording(bank, *arguments, **options):
        merged = merge(bank, *arguments, **options)
        seen.append(max(merged.adapter.ranks.values()))
        return merged

    monkeypatch.setattr("compose.fewshot.compare.merge", recording)
    tiny = {task: TaskItems(one.selection[:1], one.test[:1]) for task, one in tasks.items()}
    comparison = Comparison(speaker, small, tiny, rank=2)
    rows = [comparison.row(name) for name in ("sum", "dare", "tsvm")]
    assert max(seen) == 2
    assert all(0 < row.lost < 1 for row in rows)


def test_a_method_that_cannot_merge_the_bank_says_why(speaker, small, tasks) -> None:
    row = Comparison(speaker, small, tasks).row("slerp")
    assert "exactly 2" in row.skipped
    assert row.tasks == {}
    with pytest.raises(UnknownNameError, match="did you mean 'ties'"):
        Comparison(speaker, small, tasks).row("tise")


def test_methods_with_data_are_given_the_selection_items(speaker, small, tasks) -> None:
    two = small.select(["skill-0", "skill-1"])
    row = Comparison(speaker, two, tasks).row("regmean")
    assert row.kind == "data"
    assert row.skipped == ""
    without = Comparison(speaker, small, tasks).row("regmean")
    assert "skill-4" in without.skipped
    given = Comparison(speaker, small, tasks, data=dict.fromkeys(small.names, tasks["skill-0"].selection))
    assert given.row("regmean").skipped == ""


def test_rows_survive_json_and_runs_repeat(speaker, small, tasks) -> None:
    row = Comparison(speaker, small, tasks).row("dare")
    assert row_of(json.loads(json.dumps(record_of(row)))) == row
    again = Comparison(speaker, small, tasks).row("dare")
    assert replace(again, seconds=row.seconds) == row


def test_normalisation_leaves_out_tasks_without_a_scoring_adapter() -> None:
    own = row_of({"name": "own adapter", "kind": "reference", "tasks": {"a": _s(0.8), "b": _s(0.0)}})
    row = row_of({"name": "sum", "kind": "method", "tasks": {"a": _s(0.4), "b": _s(0.5), "c": _s(0.6)}})
    assert row.normalised(own) == 0.5
    assert row.macro("exact") == pytest.approx(0.5)
    assert row.normalised(None) is None


def _s(exact: float) -> dict[str, float]:
    return {"exact": exact, "loss": 1.0}


def test_all_data_free_methods_are_known_and_need_no_data() -> None:
    names = data_free_methods()
    assert set(names) == {name for name in METHODS if name not in DATA_METHODS}
    assert "regmean" not in names


def test_a_rank_below_one_and_no_tasks_are_refused(speaker, small, tasks) -> None:
    with pytest.raises(IncompatibleError, match="at least 1, got 0"):
        Comparison(speaker, small, tasks, rank=0)
    with pytest.raises(IncompatibleError, match="no task"):
        Comparison(speaker, small, {})


def test_data_batches_give_the_losses_of_the_responses(speaker) -> None:
    examples = [Example("ab", "c"), Example("abcdef", "gh ab"), Example("a", "bcd")]
    batches = data_batches(speaker, examples, rows=2)
    assert [len(batch["input_ids"]) for batch in batches] == [2, 1]
    encoded = encode(examples, speaker.tokenizer, speaker.prompt_format, encoder_decoder=False)
    expected = response_losses(speaker.model, encoded)
    found = []
    for batch in batches:
        logits = speaker.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        for row, labels in zip(logits, batch["labels"], strict=True):
            found.append(torch.nn.functional.cross_entropy(row[:-1], labels[1:]))
    torch.testing.assert_close(torch.stack(found), expected)
    for batch, part in zip(batches, (encoded[:2], encoded[2:]), strict=True):
        for labels, one in zip(batch["labels"], part, strict=True):
            assert tuple(labels[labels != -100].tolist()) == one.response
