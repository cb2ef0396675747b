"""Laws of training over all presets that train: what trains changes, nothing else does, a run repeats itself.

Every preset on Llama, one of each kind on T5: see ``preset_kinds.py``.
"""

from dataclasses import replace

import pytest
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.routers.presets.registry import PRESETS, experts_for
from compose.routers.sampling import Sampling
from compose.routers.training import train
from tests.routers.preset_kinds import on_architectures
from tests.routers.train_cases import LetterTokenizer, records

TRAINED = [name for name in PRESETS if PRESETS[name].spec.train != "none"]


def embed(texts):
    """Four numbers of a text."""
    return torch.tensor([[len(text), text.count("a"), float(text.startswith("turn")), 1.0] for text in texts])


def run(name, model, make_experts):
    entry = PRESETS[name]
    spec, own = entry.spec, entry.experts is not None
    bank = Bank.from_adapters(experts_for(name, model)) if own else make_experts(model)
    labels = {"say": bank.names[0], "turn": bank.names[-1]}
    data = [
        replace(each, cluster=number % 3, expert=labels[each.task], group=number % 2)
        for number, each in enumerate(records())
    ]
    attached = attach(model, bank, trainable=spec.trains_experts and spec.structure in ("lora", "ffn"))
    result = train(
        attached, spec, data, tokenizer=LetterTokenizer(), steps=2, batch_size=8, learning_rate=0.01, seed=1,
        text_embedding=embed, sampling=Sampling(batch="balanced"),
    )  # fmt: skip
    state = {key: value.clone() for key, value in result.routed.state_dict().items()}
    names = set(result.routed.trained_parameters())
    attached.detach()
    return state, names, result.history


@pytest.mark.parametrize(("name", "architecture"), on_architectures(TRAINED, "t5"))
def test_a_preset_trains(name, architecture, tiny_model, make_experts) -> None:
    model = tiny_model(architecture)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state, names, history = run(name, model, make_experts)
    for key, value in model.state_dict().items():
        assert torch.equal(value, before[key])
    assert len(history) == 2
    assert history[0]["gradient_norm"] > 0
    assert names
    again, _, same = run(name, model, make_experts)
    assert same == history
    for key, value in state.items():
        assert torch.equal(value, again[key])
