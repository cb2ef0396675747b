"""Records as batches: what gates and losses read is there, or said to be missing."""

from dataclasses import replace

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.gates.embedding import EmbeddingGate
from compose.routers.losses.gate_ce import GateCrossEntropy
from compose.routers.spec import MixtureSpec
from compose.routers.stages import Stage
from compose.routers.train_data import fingerprint, plan_stages, prepare
from compose.routers.train_settings import TrainSettings
from compose.text.encoding import PromptFormat
from tests.routers.train_cases import LetterTokenizer, records

EXPERTS = ("one", "two")
CPU = torch.device("cpu")


def prepared(model, spec, examples, **more):
    settings = more.pop("settings", TrainSettings())
    return prepare(
        examples, LetterTokenizer(), PromptFormat(), config=model.config, spec=spec, experts=EXPERTS,
        settings=settings, **more,
    )  # fmt: skip


def labelled():
    return [
        replace(each, expert="one" if each.task == "say" else "two", cluster=n % 3) for n, each in enumerate(records())
    ]


def test_batches_hold_what_models_and_routers_take(tiny_model) -> None:
    data = prepared(tiny_model("llama"), MixtureSpec(), labelled())
    inputs, targets = data.batch([0, 3, 5], CPU)
    assert inputs.keys() == {
        "input_ids", "attention_mask", "labels", "task_ids", "prompt_mask", "expert_labels", "cluster_ids",
    }  # fmt: skip
    assert targets == int((inputs["labels"] != -100).sum())
    assert inputs["task_ids"].tolist() == [1, 1, 0]
    assert data.tasks == ("say", "turn")
    assert data.clusters == 3
    inputs, _ = prepared(tiny_model("t5"), MixtureSpec(), records()).batch([0], CPU)
    assert "prompt_mask" not in inputs
    assert "cluster_ids" not in inputs


def test_losses_that_read_labels_get_them_where_decisions_are_made(tiny_model) -> None:
    plain = GateCrossEntropy(coefficient=1.0)
    for over in ("real", "response"):
        spec = MixtureSpec(losses=(replace(plain, over=over),))
        inputs, _ = prepared(tiny_model("llama"), spec, labelled()).batch([1], CPU)
        labels, ids = inputs["expert_labels"][0], inputs["input_ids"][0]
        predicted = (inputs["labels"][0, 1:] != -100) if over == "response" else torch.ones(len(ids) - 1, dtype=bool)
        assert torch.equal(labels[:-1], torch.where(predicted, 0, -1))
        assert labels[-1] == -1


def test_what_is_missing_is_said(tiny_model) -> None:
    model = tiny_model("llama")
    cluster = MixtureSpec(scope="sequence", gate_input="cluster_id", gate=EmbeddingGate(of="clusters"))
    with pytest.raises(IncompatibleError, match="24 records have none"):
        prepared(model, cluster, records())
    with pytest.raises(IncompatibleError, match="no record has one"):
        prepared(model, MixtureSpec(losses=(GateCrossEntropy(),)), records())
    text = MixtureSpec(scope="sequence", gate_input="text", site="model")
    with pytest.raises(IncompatibleError, match=r"got \(24,\)"):
        prepared(model, text, records(), text_embedding=lambda texts: torch.zeros(len(texts)))


def test_the_fingerprint_tells_runs_apart(tiny_model) -> None:
    settings = TrainSettings(batch_size=4)
    data = prepared(tiny_model("llama"), MixtureSpec(), records())
    plan, parts = plan_stages(data.examples, (Stage(name="a", epochs=2, tasks=("turn",)),), settings)
    assert plan.steps == (4,)  # 8 records, twice, 4 a step
    assert parts[0].sampler.tasks == ("turn",)
    print_ = fingerprint(data, plan, settings)
    assert print_ == fingerprint(data, plan, replace(settings, checkpoint_every=1, log_every=5))
    assert print_ != fingerprint(data, plan, replace(settings, seed=1))
    other = prepared(tiny_model("llama"), MixtureSpec(), records(23))
    assert print_["data"] != fingerprint(other, plan, settings)["data"]
