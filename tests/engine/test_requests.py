"""A running batch: rows join and leave at any time, and every row gets exactly what it gets alone."""

import weakref
from unittest.mock import Mock

import pytest
import torch
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    BertConfig,
    BertForSequenceClassification,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    UMT5Config,
    UMT5ForConditionalGeneration,
)

import compose
from compose.bank import Bank
from compose.engine.requests import Request, RunningBatch
from compose.engine.running_rows import RunningRows, start_rows
from compose.errors import IncompatibleError, UnknownNameError

KINDS = ["expert-0", None, {"expert-1": 0.7, "expert-3": -0.4}, "expert-2", {"expert-0": 0.5, "expert-2": 1.5}]
END = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}


def gemma2() -> torch.nn.Module:
    """Every second layer sees five tokens back, which has to mean five of the row's own."""
    return Gemma2ForCausalLM(Gemma2Config(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, max_position_embeddings=64, sliding_window=5, **END,
    ))  # fmt: skip


def umt5() -> torch.nn.Module:
    return UMT5ForConditionalGeneration(UMT5Config(
        vocab_size=67, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0,
    ))  # fmt: skip


@pytest.fixture
def named_model(tiny_model):
    def make(name: str) -> torch.nn.Module:
        others = {"gemma2": gemma2, "umt5": umt5}
        return others[name]().eval() if name in others else tiny_model(name)

    return make


def requests(count: int) -> list[Request]:
    generator = torch.Generator().manual_seed(1)
    return [
        Request(
            torch.randint(3, 67, (1 + (5 * number) % 13,), generator=generator).tolist(),
            KINDS[number % 5],
            3 + (7 * number) % 12,
            id=number,
        )
        for number in range(count)
    ]


@pytest.mark.parametrize(
    ("name", "stop"),
    [("llama", False), *((name, True) for name in ("llama", "gpt2", "t5", "gemma2", "umt5"))],
    ids=lambda value: {False: "to the limit", True: "with stop tokens"}.get(value, value),
)
def test_rows_that_join_and_leave_get_what_they_get_alone(named_model, make_bank, name, stop) -> None:
    model = named_model(name)
    stop_ids = list(range(3, 12)) if stop else []
    given = requests(14)
    with compose.attach(model, make_bank(model)) as attached:
        batch = RunningBatch(attached, max_rows=4, stop_ids=stop_ids)
        found, late = {}, given[5:]
        for request in given[:5]:
            batch.add(request)
        while batch.running or batch.waiting or late:
            found |= {finished.request.id: finished for finished in batch.step()}
            assert len(batch.running) <= 4
            if late:
                batch.add(late.pop(0))
        assert sorted(found) == list(range(14))
        for request in given:
            (alone,) = attached.generate(
                [request.prompt], [request.adapter], max_new_tokens=request.max_new_tokens, stop_ids=stop_ids
            )
            finished = found[request.id]
            assert (finished.tokens, finished.request) == (alone, request)
            assert finished.reason == ("length" if len(alone) == request.max_new_tokens else "stop")
    reasons = {finished.reason for finished in found.values()}
    assert reasons == ({"stop", "length"} if stop else {"length"})
    assert len({tuple(finished.tokens) for finished in found.values()}) >= 7


def test_combine_parameters(tiny_model, make_bank) -> None:
    model = tiny_model("llama")
    given = requests(5)
    with compose.attach(model, make_bank(model)) as attached:
        batch = RunningBatch(attached, max_rows=3, combine="parameters")
        for request in given:
            batch.add(request)
        for finished in batch.run():
            request = finished.request
            options = {"max_new_tokens": request.max_new_tokens, "combine": "parameters"}
            assert attached.generate([request.prompt], [request.adapter], **options) == [finished.tokens]


def test_one_call_of_the_model_serves_all_rows_and_one_more_those_that_join(tiny_model, make_bank) -> None:
    model = tiny_model("llama")
    shapes = []
    model.register_forward_pre_hook(
        lambda _, args, kwargs: shapes.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    with compose.attach(model, make_bank(model)) as attached:
        batch = RunningBatch(attached, max_rows=3, stop_ids=[])
        for prompt, limit in (([5, 6, 7], 3), ([8], 2), ([9, 10], 3), ([11, 12, 13, 14], 2)):
            batch.add(Request(prompt, "expert-0", limit))
        counts = [len(batch.step()) for _ in range(4)]
    assert counts == [0, 1, 3, 0]
    assert shapes == [(3, 3), (3, 1), (1, 4), (3, 1)]


def test_padding_leaves_with_the_row_that_needed_it(tiny_model, make_bank) -> None:
    for name in ("llama", "t5"):
        model = tiny_model(name)
        with compose.attach(model, make_bank(model)) as attached:
            batch = RunningBatch(attached, stop_ids=[])
            batch.add(Request([5] * 20, "expert-0", 2))
            batch.add(Request([5] * 3, "expert-1", 9))
            batch.step()
            batch.step()
            state = batch._state
            assert state.mask_BT.shape == (1, 2 if name == "t5" else 4)
            assert (state.mask_BT == 1).all()
            assert state.source_mask_BS is None or state.source_mask_BS.shape == (1, 3)


def test_the_handles_own_selection_is_in_force_between_steps(tiny_model, make_bank) -> None:
    model = tiny_model("llama")
    given = requests(4)
    with compose.attach(model, make_bank(model)) as attached:
        attached.set("expert-3")
        before = attached.active
        batch = RunningBatch(attached)
        for request in given:
            batch.add(request)
        alone = attached.generate([[5, 6]], max_new_tokens=4)
        found = {}
        while batch.running or batch.waiting:
            found |= {finished.request.id: finished.tokens for finished in batch.step()}
            assert attached.active is before
            assert attached.generate([[5, 6]], max_new_tokens=4) == alone
        for request in given:
            wanted = attached.generate([request.prompt], [request.adapter], max_new_tokens=request.max_new_tokens)
            assert wanted == [found[request.id]]


def test_a_request_is_taken_out(tiny_model, make_bank) -> None:
    model = tiny_model("llama")
    first, second, third = (Request([5 + i, 9], "expert-0", 6) for i in range(3))
    with compose.attach(model, make_bank(model)) as attached:
        batch = RunningBatch(attached, max_rows=2, stop_ids=[])
        for request in (first, second, third):
            batch.add(request)
        batch.step()
        batch.step()
        assert (batch.running, batch.waiting) == ((first, second), (third,))
        assert len(batch.remove(first)) == 2
        assert batch.remove(third) == []
        (finished,) = batch.run()
        assert finished.request is second
        assert attached.generate([second.prompt], ["expert-0"], max_new_tokens=6, stop_ids=[]) == [finished.tokens]
        for request in (first, second, third):
            with pytest.raises(IncompatibleError, match="neither waits nor runs"):
                batch.remove(request)


@pytest.mark.parametrize("failing", [1, 2, 3, 4, 5, 8])
def test_no_request_is_lost_when_the_model_raises(tiny_model, make_bank, failing) -> None:
    """Call 1 and 3 run prompts, the others a step; a layer deep inside raises, so the cache is half written."""
    model = tiny_model("llama")
    given = requests(5)
    with compose.attach(model, make_bank(model)) as attached:
        wanted = {
            r.id: attached.generate([r.prompt], [r.adapter], max_new_tokens=r.max_new_tokens, stop_ids=[])[0]
            for r in given
        }
        calls = []

        def fail(*_):
            calls.append(0)
            if len(calls) == failing:
                raise RuntimeError("no memory")

        handle = model.model.layers[1].mlp.register_forward_pre_hook(fail)
        batch = RunningBatch(attached, max_rows=3, stop_ids=[])
        for request in given:
            batch.add(request)
        found, errors = {}, 0
        while batch.running or batch.waiting:
            try:
                found |= {finished.request.id: finished.tokens for finished in batch.step()}
            except RuntimeError:
                errors += 1
            assert attached.active is None
        handle.remove()
    assert errors == 1
    assert found == wanted


def test_a_failure_while_a_row_leaves_neither_repeats_nor_reorders(tiny_model, make_bank, monkeypatch) -> None:
    model = tiny_model("llama")
    short, second, third, last = (Request([5 + i], "expert-0", limit) for i, limit in enumerate((2, 4, 4, 1)))
    with compose.attach(model, make_bank(model)) as attached:
        batch = RunningBatch(attached, max_rows=3, stop_ids=[])
        for request in (short, second, third, last):
            batch.add(request)
        batch.step()
        with monkeypatch.context() as patch:
            patch.setattr(RunningRows, "keep", Mock(side_effect=RuntimeError("no memory")))
            with pytest.raises(RuntimeError, match="no memory"):
                batch.step()
        assert (batch.running, batch.waiting) == ((), (second, third, last))
        found = list(batch.run())
        assert [finished.request for finished in found] == [short, last, second, third]
        for finished in found:
            request = finished.request
            options = {"max_new_tokens": request.max_new_tokens, "stop_ids": []}
            assert attached.generate([request.prompt], ["expert-0"], **options) == [finished.tokens]


def mamba() -> torch.nn.Module:
    return MambaForCausalLM(MambaConfig(vocab_size=67, hidden_size=32, state_size=4, num_hidden_layers=2, **END))


def bart() -> torch.nn.Module:
    sizes = {"encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48}
    heads = {"encoder_attention_heads": 4, "decoder_attention_heads": 4}
    return BartForConditionalGeneration(BartConfig(vocab_size=67, d_model=32, **sizes, **heads, **END))


def bloom() -> torch.nn.Module:
    return BloomForCausalLM(BloomConfig(vocab_size=67, hidden_size=32, n_layer=2, n_head=4, **END))


def lfm2() -> torch.nn.Module:
    """Layers of attention and of convolutions in turn."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    kinds = {"layer_types": ["conv", "full_attention"], "num_key_value_heads": 2}
    return Lfm2ForCausalLM(Lfm2Config(vocab_size=67, **sizes, **kinds, **END))


def bert() -> torch.nn.Module:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4}
    return BertForSequenceClassification(BertConfig(vocab_size=67, **sizes))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (bart, "only those with relative positions"),
        (bloom, "takes no positions"),
        (mamba, "mamba"),
        (lfm2, "keeps more"),
        (bert, "does not"),
    ],
)
def test_models_whose_rows_cannot_join_are_refused(make, make_bank, words) -> None:
    model = make().eval()
    with compose.attach(model, make_bank(model)) as attached, pytest.raises(IncompatibleError, match=words):
        RunningBatch(attached)


def test_generation_settings_that_a_running_batch_does_not_apply_are_refused(tiny_model, make_bank) -> None:
    model = tiny_model("llama")
    with compose.attach(model, make_bank(model)) as attached:
        model.generation_config.repetition_penalty = 1.1
        with pytest.raises(IncompatibleError, match=r"repetition_penalty=1\.1.*set it to None"):
            RunningBatch(attached)
        model.generation_config.repetition_penalty = 1.0
        model.generation_config.temperature = 0.6
        RunningBatch(attached)


@pytest.mark.parametrize(
    ("request_", "error", "words"),
    [
        (Request([]), IncompatibleError, "no tokens"),
        (Request([5, 67]), IncompatibleError, r"\[0, 67\), got 67"),
        (Request([-1]), IncompatibleError, "got -1"),
        (Request([5], max_new_tokens=0), IncompatibleError, "at least 1, got 0"),
        (Request([5] * 60, max_new_tokens=6), IncompatibleError, "need 65 positions, the model has 64"),
        (Request([5], "expert-9"), UnknownNameError, "expert-9"),
        (Request([5], {"expert-0": float("nan")}), IncompatibleError, "finite"),
    ],
    ids=lambda value: None,
)
def test_bad_requests_are_refused_when_they_are_added(tiny_model, make_bank, request_, error, words) -> None:
    model = tiny_model("gpt2")
    with compose.attach(model, make_bank(model)) as attached:
        batch = RunningBatch(attached)
        with pytest.raises(error, match=words):
            batch.add(request_)
        assert batch.waiting == ()
        batch.add(Request([5] * 60, max_new_tokens=5))
        assert [len(finished.tokens) <= 5 for finished in batch.run()] == [True]


def test_a_batch_needs_a_row_and_an_attached_bank(tiny_model, make_bank) -> None:
    model = tiny_model("llama")
    attached = compose.attach(model, make_bank(model))
    with pytest.raises(IncompatibleError, match="max_rows must be at least 1"):
        RunningBatch(attached, max_rows=0)
    batch = RunningBatch(attached)
    batch.add(Request([5], "expert-0", 2))
    attached.detach()
    with pytest.raises(IncompatibleError, match="detached"):
        batch.step()
    assert isinstance(attached.bank, Bank)


@torch.no_grad()
@pytest.mark.parametrize("name", ["llama", "t5"])
def test_memory_of_rows_that_left_or_were_joined_is_free(named_model, name) -> None:
    model = named_model(name)
    (_, rows), (_, others) = (start_rows(model, prompts) for prompts in ([[5, 9, 11], [4, 8]], [[7, 6]]))

    def memory() -> list[weakref.ref]:
        layers = getattr(rows.cache, "self_attention_cache", rows.cache).layers
        return [weakref.ref(each.untyped_storage()) for layer in layers for each in (layer.keys, layer.values)]

    before = memory()
    rows.keep([0])
    assert not any(each() for each in before)
    before = memory()
    rows.join(others)
    assert not any(each() for each in before)
