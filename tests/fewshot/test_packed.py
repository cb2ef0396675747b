"""Packed examples: every architecture gives the losses of each example alone; what cannot be packed is left alone."""

import numpy as np
import pytest
import torch
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

import compose
from compose.fewshot import packed
from compose.fewshot.losses import response_losses
from compose.fewshot.packed import MODEL_TYPES, pack, takes_packed_rows
from compose.fewshot.population import PopulationObjective
from compose.text.encoding import Encoded

SHARED = (5, 9, 11, 30, 12, 7, 8, 21)
EXAMPLES = [
    Encoded((*SHARED, 14, 3), (4, 30, 2)),
    Encoded((*SHARED, 7), (3, 2)),
    Encoded((*SHARED, 7, 8, 6, 12, 40), (3, 8, 9, 10, 2)),
    Encoded((*SHARED, 41), (9, 2)),
]


def model_of(model_type: str, attention: str = "sdpa", **options):
    config = AutoConfig.for_model(
        model_type, vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=4, head_dim=8, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
        initializer_range=0.3, **{"sliding_window": None, **options},
    )  # fmt: skip
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval().requires_grad_(False)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", sorted(MODEL_TYPES))
def test_packed_losses_are_those_of_each_example_alone(model_type, attention) -> None:
    model = model_of(model_type, attention)
    (row,) = pack(model, EXAMPLES, 1000)
    assert row.num_tokens == len(SHARED) + sum(example.length - 1 - len(SHARED) for example in EXAMPLES)
    alone = torch.cat([response_losses(model, [EXAMPLES[index]]) for index in row.examples])
    assert_close(row.losses(model, 3), alone.expand(3, -1), atol=2e-5, rtol=2e-5)


def test_a_population_packed_equals_padded_with_gradients(loaded, bank, monkeypatch) -> None:
    examples = [Encoded(tuple(i % 28 + 2 for i in e.prompt), tuple(i % 28 + 2 for i in e.response)) for e in EXAMPLES]
    weights = np.random.default_rng(0).normal(size=(5, 6)) * 0.5
    with compose.attach(loaded.model, bank) as attached:
        found = PopulationObjective(attached, examples)(weights, gradient=True)
        monkeypatch.setattr(packed, "SAVING", 1.0)
        assert not pack(loaded.model, examples, 1000)
        wanted = PopulationObjective(attached, examples)(weights, gradient=True)
    np.testing.assert_allclose(found.losses, wanted.losses, atol=2e-5)
    np.testing.assert_allclose(found.gradients, wanted.gradients, atol=5e-5)


def test_rows_stay_within_the_limit_and_name_every_example_once() -> None:
    model = model_of("llama")
    rows = pack(model, EXAMPLES, 20)
    assert len(rows) > 1
    assert all(row.num_tokens <= 20 for row in rows)
    assert sorted(index for row in rows for index in row.examples) == [0, 1, 2, 3]


def test_equal_prompts_keep_their_last_token_apart() -> None:
    """It predicts the first token of the response, so each example needs its own."""
    model = model_of("llama")
    examples = [Encoded(SHARED, (4, 2)), Encoded(SHARED, (9, 9, 2))]
    (row,) = pack(model, examples, 1000)
    alone = torch.cat([response_losses(model, [example]) for example in examples])
    assert_close(row.losses(model, 1)[0], alone, atol=2e-5, rtol=2e-5)


def test_a_loss_that_is_not_finite_stays_with_its_example(monkeypatch) -> None:
    model = model_of("llama")
    (row,) = pack(model, EXAMPLES, 1000)
    healthy = row.losses(model, 1)[0]
    forward = model.forward

    def broken(*args, **kwargs):
        found = forward(*args, **kwargs)
        found.logits[0, 0, row.labels_L[0]] = -torch.inf
        return found

    broken.__signature__ = __import__("inspect").signature(forward)
    monkeypatch.setattr(model, "forward", broken)
    found = row.losses(model, 1)[0]
    assert found[0] == torch.inf
    assert_close(found[1:], healthy[1:])


@pytest.mark.parametrize(
    ("what", "model"),
    [
        ("an encoder-decoder", lambda tiny: tiny("t5")),
        ("alibi", lambda tiny: AutoModelForCausalLM.from_config(AutoConfig.for_model(
            "bloom", vocab_size=67, hidden_size=32, n_layer=2, n_head=4))),
        ("a sliding window", lambda tiny: model_of("mistral", sliding_window=4)),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)  # fmt: skip
def test_a_model_that_cannot_take_them_gets_none(what, model, tiny_model) -> None:
    built = model(tiny_model)
    assert not takes_packed_rows(built), what
    assert pack(built, EXAMPLES, 1000) == []


def test_examples_that_share_little_are_not_packed() -> None:
    examples = [Encoded((5, 9, index), tuple(range(4, 24))) for index in (11, 12, 13)]
    assert pack(model_of("llama"), examples, 1000) == []
