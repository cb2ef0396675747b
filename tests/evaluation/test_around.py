"""What batches run in: adapters and weights per item, routers told what they may know, which see prompts only."""

import pytest
import torch

from compose.engine.attach import attach
from compose.engine.coefficients import Coefficients
from compose.errors import IncompatibleError
from compose.evaluation.around import adapter_rows, fixed, prompt_columns, routed_rows, told_of, weighted_rows
from compose.fewshot.losses import response_losses
from compose.fewshot.scoring import ScoredBatch, score, stop_ids
from compose.routers.gates.linear import LinearGate
from compose.routers.gates.table import TableGate
from compose.routers.spec import MixtureSpec
from compose.text.encoding import Encoded, encode
from compose.text.examples import Example

NORMAL = LinearGate(init="normal", std=1.0)
NAMES = ["sum", None, "add_one", "largest", "largest", "sum"]


def test_columns_of_prompts() -> None:
    rows = (Encoded((5, 6, 7), (8,)), Encoded((5,), (6, 7)))
    assert prompt_columns(ScoredBatch((0, 1), rows, left=False)).tolist() == [[True, True, True], [True, False, False]]
    assert prompt_columns(ScoredBatch((0, 1), rows, left=True)).all()


def test_every_item_runs_with_its_own_adapter(loaded, bank, records) -> None:
    items = [record.example for record in records(2)]
    with attach(loaded.model, bank) as attached:
        scores = score(loaded, items, adapter_rows(attached, NAMES))
        encoded = encode(items, loaded.tokenizer, loaded.prompt_format, encoder_decoder=False)
        longest = max(len(row.response) for row in encoded)
        ids = attached.generate(
            [row.prompt for row in encoded], NAMES, max_new_tokens=longest + 2, stop_ids=stop_ids(loaded)
        )
        assert list(scores.texts) == loaded.tokenizer.batch_decode(ids, skip_special_tokens=True)
        for number, name in enumerate(NAMES):
            alone = score(loaded, [items[number]], fixed(attached, None if name is None else _one_hot(bank, name)))
            assert scores.losses[number] == pytest.approx(alone.losses[0], abs=1e-5)
    assert len(set(scores.texts)) > 3


def _one_hot(bank, name: str) -> Coefficients:
    return Coefficients(torch.eye(len(bank))[bank.index(name)])


def test_weights_of_an_item_are_found_again_in_whatever_order_it_runs(loaded, bank, records) -> None:
    items = [record.example for record in records(2)]
    with attach(loaded.model, bank) as attached:
        groups = dict.fromkeys(attached.layers, 0)
        one_hot = torch.stack([torch.zeros(3) if n is None else torch.eye(3)[bank.index(n)] for n in NAMES])
        weighted = score(loaded, items, weighted_rows(attached, one_hot[None], groups))
        named = score(loaded, items, adapter_rows(attached, NAMES))
    assert weighted.texts == named.texts
    torch.testing.assert_close(weighted.losses, named.losses, rtol=0, atol=1e-5)


def test_gates_of_a_sequence_do_not_see_the_response(loaded, routed) -> None:
    mixture = routed(MixtureSpec(gate=NORMAL, site="model", scope="sequence", gate_input="embeddings", pooling="mean"))
    items = [Example("Shout: a b", "A B"), Example("Shout: a b", "a much longer answer")]
    batch = ScoredBatch(
        (0, 1), tuple(encode(items, loaded.tokenizer, loaded.prompt_format, encoder_decoder=False)), False
    )

    def gates() -> torch.Tensor:
        with mixture.recording() as decisions:
            response_losses(loaded.model, batch.rows)
        return decisions[0].gates_NE

    with routed_rows(mixture, {})(batch), torch.no_grad():
        first, second = gates()
    assert torch.equal(first, second)
    with torch.no_grad():  # the same without being told what is prompt: this is the leak
        first, second = gates()
    assert not torch.equal(first, second)


def test_a_router_is_told_its_own_numbers_of_tasks(routed, records) -> None:
    spec = MixtureSpec(gate=TableGate(rows="tasks"), site="model", scope="task", gate_input="task_id")
    mixture = routed(spec, tasks=("largest", "add_one", "sum"))
    assert told_of(mixture, records(1), None)["task_ids"].tolist() == [2, 1, 0]
    with pytest.raises(IncompatibleError, match="not trained on task 'stars'; it knows largest, add_one, sum"):
        told_of(mixture, records(1, "sum", "stars"), None)


def test_what_a_router_reads_and_records_lack_is_named(routed, records) -> None:
    by_cluster = MixtureSpec(gate=TableGate(rows="clusters"), site="model", scope="sequence", gate_input="cluster_id")
    with pytest.raises(IncompatibleError, match="reads clusters, and records have none"):
        told_of(routed(by_cluster, clusters=2), records(1), None)


def test_embeddings_are_of_the_texts(routed, records) -> None:
    spec = MixtureSpec(gate=NORMAL, site="model", scope="sequence", gate_input="text")
    mixture = routed(spec, text_features=1)
    with pytest.raises(IncompatibleError, match="give text_embedding"):
        told_of(mixture, records(1), None)
    found = told_of(mixture, records(1), lambda texts: torch.tensor([[float(len(text))] for text in texts]))
    assert found["text_embedding"].tolist() == [[float(len(record.example.input))] for record in records(1)]
