"""The text of every request equals what PEFT gives it alone: greedy, float32, prompts of mixed lengths."""

import copy

import pytest
import torch

import compose
from compose.bank import Bank
from compose.engine.requests import Request, RunningBatch

peft = pytest.importorskip("peft", reason="PEFT is the oracle of these tests")

TARGETS = {
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
    "gpt2": ["c_attn", "c_proj", "c_fc"],
    "t5": ["q", "k", "v", "o", "wi", "wo"],
}
RANKS = {"one": 4, "two": 1, "three": 8, "four": 3}
ADAPTERS = [
    "one",
    None,
    {"two": 0.7, "three": -0.4},
    "three",
    {"one": 1.5},
    "two",
    {"four": 0.5, "one": 0.5, "two": 0.25},
    None,
    "four",
    {"one": 0.3, "two": 0.3, "three": 0.3, "four": 0.3},
]
NEW = 10


@pytest.fixture(params=sorted(TARGETS))
def pair(request, tiny_model, tmp_path):
    """(our base model, our bank, PEFT's model), same weights, adapters that change the text."""
    model = tiny_model(request.param)
    wrapped = None
    for name, rank in RANKS.items():
        config = peft.LoraConfig(
            r=rank, lora_alpha=4 * rank, target_modules=TARGETS[request.param], init_lora_weights=False,
            fan_in_fan_out=request.param == "gpt2",
        )  # fmt: skip
        if wrapped is None:
            wrapped = peft.get_peft_model(copy.deepcopy(model), config, adapter_name=name)
        else:
            wrapped.add_adapter(name, config)
    wrapped.eval().save_pretrained(str(tmp_path))
    return model, Bank.open([tmp_path / name for name in RANKS]), wrapped


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(2)
    return [torch.randint(3, 67, (1 + (7 * row) % 17,), generator=generator).tolist() for row in range(len(ADAPTERS))]


def alone(wrapped, prompt: list[int], adapter) -> list[int]:
    """One request with PEFT: the base model, one adapter, or an exact ``cat`` of a weighted set."""
    ids = torch.tensor([prompt])
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": NEW, "do_sample": False}
    if adapter is None:
        with wrapped.disable_adapter():
            out = wrapped.generate(input_ids=ids, **options)
    elif isinstance(adapter, str):
        wrapped.set_adapter(adapter)
        out = wrapped.generate(input_ids=ids, **options)
    else:
        wrapped.add_weighted_adapter(list(adapter), list(adapter.values()), "sum", combination_type="cat")
        wrapped.set_adapter("sum")
        out = wrapped.generate(input_ids=ids, **options)
        wrapped.set_adapter(next(iter(RANKS)))
        wrapped.delete_adapter("sum")
    new = out[0, 1 if wrapped.config.is_encoder_decoder else len(prompt) :].tolist()
    return new[: new.index(2)] if 2 in new else new


def test_a_batch_of_mixed_rows(pair) -> None:
    model, bank, wrapped = pair
    wanted = [alone(wrapped, prompt, adapter) for prompt, adapter in zip(prompts(), ADAPTERS, strict=True)]
    with compose.attach(model, bank) as attached:
        assert attached.generate(prompts(), ADAPTERS, max_new_tokens=NEW) == wanted
    assert len({tuple(row) for row in wanted}) >= 8


def test_a_batch_of_single_adapters(pair) -> None:
    model, bank, wrapped = pair
    single = [None if isinstance(adapter, dict) else adapter for adapter in ADAPTERS]
    wanted = [alone(wrapped, prompt, adapter) for prompt, adapter in zip(prompts(), single, strict=True)]
    with compose.attach(model, bank) as attached:
        assert attached.generate(prompts(), single, max_new_tokens=NEW) == wanted


def test_rows_that_join_and_leave(pair) -> None:
    """Three places for ten requests; each is added while others are in the middle of theirs."""
    model, bank, wrapped = pair
    with compose.attach(model, bank) as attached:
        batch = RunningBatch(attached, max_rows=3)
        found = {}
        for number, (prompt, adapter) in enumerate(zip(prompts(), ADAPTERS, strict=True)):
            batch.add(Request(prompt, adapter, NEW, id=number))
            for finished in batch.step():
                found[finished.request.id] = finished.tokens
        found |= {finished.request.id: finished.tokens for finished in batch.run()}
    for number, (prompt, adapter) in enumerate(zip(prompts(), ADAPTERS, strict=True)):
        assert found[number] == alone(wrapped, prompt, adapter), number
