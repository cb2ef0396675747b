"""``attached.generate``: one batch whose rows have an adapter, a weighted set, or none; inputs of any form."""

from threading import Event, Thread

import pytest
import torch
from torch.utils.hooks import RemovableHandle
from transformers import BatchEncoding

import compose
from compose.engine.coefficients import AdapterIds, Coefficients
from compose.engine.requests import Request, RunningBatch
from compose.engine.rows import row_weights, rows_selection
from compose.errors import IncompatibleError, UnknownNameError

PROMPTS = [[5, 9, 11, 4, 30], [7, 8, 6], [40, 41, 42, 43], [12], [5, 9, 11, 4, 30]]
ADAPTERS = ["expert-0", None, {"expert-1": 0.7, "expert-3": -0.4}, "expert-2", {"expert-2": 0.5, "expert-0": 1.5}]


@pytest.fixture
def llama(tiny_model, make_bank):
    model = tiny_model("llama")
    with compose.attach(model, make_bank(model)) as attached:
        yield attached


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
@pytest.mark.parametrize("combine", ["outputs", "parameters"])
def test_every_row_gets_what_it_gets_alone(tiny_model, make_bank, name, combine) -> None:
    model = tiny_model(name)
    with compose.attach(model, make_bank(model)) as attached:
        together = attached.generate(PROMPTS, ADAPTERS, max_new_tokens=8, combine=combine)
        for row, (prompt, adapter) in enumerate(zip(PROMPTS, ADAPTERS, strict=True)):
            selection = adapter
            if isinstance(adapter, dict):
                values = torch.zeros(len(attached.bank))
                for expert, weight in adapter.items():
                    values[attached.bank.index(expert)] = weight
                selection = Coefficients(values, combine)
            with attached.using(selection):
                assert attached.generate([prompt], max_new_tokens=8) == [together[row]]
    assert len({tuple(row) for row in together}) >= 4


def test_combine_reaches_the_weighted_rows(llama) -> None:
    outputs, parameters = (
        llama.generate(PROMPTS, ADAPTERS, max_new_tokens=8, combine=kind) for kind in ("outputs", "parameters")
    )
    assert [a == b for a, b in zip(outputs, parameters, strict=True)] == [True, True, False, True, False]


def test_a_batch_of_single_adapters_needs_ids_only(llama) -> None:
    def select(*adapters):
        rows = [row_weights(llama.bank, adapter) for adapter in adapters]
        return rows_selection(rows, combine="outputs", device=torch.device("cpu"))

    single = select("expert-2", None, {"expert-0": 1.0, "expert-1": 0.0})
    assert isinstance(single, AdapterIds)
    assert single.ids.tolist() == [2, -1, 0]
    mixed = select("expert-2", None, {"expert-0": 0.5, "expert-3": 2.0})
    assert mixed.indices.tolist() == [[2, -1], [-1, -1], [0, 3]]
    assert mixed.values.tolist() == [[1.0, 0.0], [0.0, 0.0], [0.5, 2.0]]
    assert select(None, {}, {"expert-0": 0.0}) is None


def test_what_was_in_force_is_restored_even_after_an_error(llama, monkeypatch) -> None:
    llama.set({"expert-1": 0.5})
    before = llama.active
    llama.generate(PROMPTS, ADAPTERS, max_new_tokens=2)
    assert llama.active is before
    seen = []

    def fail(**_):
        seen.append(llama.active)
        raise RuntimeError("no memory")

    monkeypatch.setattr(llama.model, "generate", fail)
    with pytest.raises(RuntimeError, match="no memory"):
        llama.generate(PROMPTS, ADAPTERS, max_new_tokens=2)
    assert isinstance(seen[0], Coefficients)
    assert llama.active is before


def test_without_adapters_what_is_in_force_stays(llama) -> None:
    llama.set("expert-2")
    stays = llama.generate(PROMPTS, max_new_tokens=6)
    assert stays == llama.generate(PROMPTS, ["expert-2"] * 5, max_new_tokens=6)
    assert stays != llama.generate(PROMPTS, [None] * 5, max_new_tokens=6)


def test_inputs_come_as_lists_tensors_or_a_tokenizers_result_padded_on_any_side(llama) -> None:
    wanted = llama.generate(PROMPTS, ADAPTERS, max_new_tokens=6)
    for left in (True, False):
        ids = [[0] * (5 - len(p)) + p if left else p + [0] * (5 - len(p)) for p in PROMPTS]
        mask = [[int(token > 0) for token in row] for row in ids]
        lists = {"input_ids": ids, "attention_mask": mask}
        for given in (lists, BatchEncoding({key: torch.tensor(value) for key, value in lists.items()})):
            assert llama.generate(given, ADAPTERS, max_new_tokens=6) == wanted
    same = torch.tensor([PROMPTS[0], PROMPTS[0]])
    assert llama.generate(same, ADAPTERS[:2], max_new_tokens=6) == llama.generate(
        {"input_ids": same}, ADAPTERS[:2], max_new_tokens=6
    )


def test_rows_end_at_the_models_own_stop_token_or_the_ones_given(llama) -> None:
    (free,) = llama.generate([PROMPTS[0]], ["expert-0"], max_new_tokens=6, stop_ids=[])
    assert len(free) == 6
    end = next(place for place, token in enumerate(free) if place and token not in free[:place])
    assert llama.generate([PROMPTS[0]], ["expert-0"], max_new_tokens=6, stop_ids=[free[end]]) == [free[:end]]
    llama.model.generation_config.eos_token_id = free[end]
    assert llama.generate([PROMPTS[0]], ["expert-0"], max_new_tokens=6) == [free[:end]]
    llama.model.generation_config.pad_token_id = None
    assert llama.generate([PROMPTS[0]], ["expert-0"], max_new_tokens=6, stop_ids=[]) == [free]


def test_beams_and_sampling_pass_on_to_generate(llama) -> None:
    beams = llama.generate(PROMPTS, ADAPTERS, max_new_tokens=6, num_beams=3, num_return_sequences=2)
    assert len(beams) == 10
    for row, (prompt, adapter) in enumerate(zip(PROMPTS, ADAPTERS, strict=True)):
        alone = llama.generate([prompt], [adapter], max_new_tokens=6, num_beams=3, num_return_sequences=2)
        assert beams[2 * row : 2 * row + 2] == alone
    samples = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        samples.append(llama.generate(PROMPTS, ADAPTERS, max_new_tokens=6, do_sample=True, temperature=2.0, top_k=0))
    assert samples[0] == samples[1] != samples[2]


@pytest.mark.parametrize(
    ("adapters", "error", "words"),
    [
        (["expert-0"], IncompatibleError, "one entry for each of the 5 rows, got 1 entries"),
        ("expert-0", IncompatibleError, "one entry for each of the 5 rows, got 'expert-0'"),
        ({"expert-0": 1.0}, IncompatibleError, "one entry for each of the 5 rows"),
        ([None] * 4 + ["expert-9"], UnknownNameError, "unknown adapter 'expert-9'"),
        ([None] * 4 + [{"expert-9": 0.0}], UnknownNameError, "unknown adapter 'expert-9'"),
        ([None] * 4 + [{"expert-0": float("nan")}], IncompatibleError, "'expert-0' must be a finite number, got nan"),
        ([None] * 4 + [{"expert-0": float("inf")}], IncompatibleError, "finite"),
        ([None] * 4 + [{"expert-0": True}], IncompatibleError, "finite number, got True"),
        ([None] * 4 + [{"expert-0": "1"}], IncompatibleError, "finite number, got '1'"),
        ([None] * 4 + [3], IncompatibleError, "got int"),
        ([None] * 4 + [["expert-0"]], IncompatibleError, "got list"),
    ],
)
def test_bad_adapters_are_refused(llama, adapters, error, words) -> None:
    with pytest.raises(error, match=words):
        llama.generate(PROMPTS, adapters, max_new_tokens=2)
    assert llama.active is None


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ([], "no rows"),
        ([[5], []], "row 1 has no tokens"),
        ([5, 9], "rows of token ids"),
        (["reverse this"], "tokenise texts first"),
        ({"ids": [[5]]}, "no input_ids, only ids"),
        ({"input_ids": [[5, 6]], "attention_mask": [[1]]}, "differ in shape"),
        ({"input_ids": [[5, 6]], "attention_mask": [[0, 0]]}, "row 0 has no tokens"),
    ],
)
def test_bad_inputs_are_refused(llama, inputs, words) -> None:
    with pytest.raises(IncompatibleError, match=words):
        llama.generate(inputs, max_new_tokens=2)


@pytest.mark.parametrize("option", ["return_dict_in_generate", "eos_token_id", "inputs_embeds", "stop_strings"])
def test_options_that_would_change_what_comes_out_are_refused(llama, option) -> None:
    with pytest.raises(IncompatibleError, match=option):
        llama.generate(PROMPTS, max_new_tokens=2, **{option: 1})


def test_a_model_that_does_not_generate_and_a_detached_handle_are_refused(tiny_model, make_bank) -> None:
    model = tiny_model("bert")
    with (
        compose.attach(model, make_bank(model)) as attached,
        pytest.raises(IncompatibleError, match="BertForSequenceClassification does not generate"),
    ):
        attached.generate(PROMPTS, max_new_tokens=2)
    model = tiny_model("llama")
    attached = compose.attach(model, make_bank(model))
    attached.detach()
    for adapters in (None, [None] * 5, ["expert-0"] * 5):
        with pytest.raises(IncompatibleError, match="detached"):
            attached.generate(PROMPTS, adapters, max_new_tokens=2)


def test_it_runs_in_inference_mode_and_leaves_nothing_of_it_in_the_model(llama) -> None:
    llama.model.double()
    llama.model.float()  # so that stacks are made anew, in the first call
    modes = []
    hook = llama.model.model.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    llama.generate(PROMPTS, ADAPTERS, max_new_tokens=3)
    hook.remove()
    assert modes
    assert all(modes)
    kept = [*llama.model.parameters(), *llama.model.buffers()]
    kept += [tensor for layer in llama.layers.values() for tensor in layer.stack.index]
    assert not any(tensor.is_inference() for tensor in kept)


def test_it_does_not_where_others_get_the_tensors(llama) -> None:
    """They may write to them later, or differentiate what they make of them."""
    from transformers import DynamicCache

    cache, modes = DynamicCache(config=llama.model.config), []
    hook = llama.model.model.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    found = llama.generate([[5, 9, 11]], max_new_tokens=4, stop_ids=[], past_key_values=cache)
    llama.generate([[5, 9, 11]], max_new_tokens=4, stop_ids=[], logits_processor=[lambda ids, scores: scores])
    llama.generate([[5, 9, 11]], max_new_tokens=4, stop_ids=[], inference_mode=False)
    hook.remove()
    assert not any(modes)
    cache.layers[0].keys.mul_(1)
    assert found == llama.generate([[5, 9, 11]], max_new_tokens=4, stop_ids=[])


@pytest.mark.parametrize("where", ["option", "settings"])
def test_a_cache_that_the_model_may_keep_is_made_outside_of_inference_mode(llama, where) -> None:
    """It is written to again by later calls, which need not be ours."""
    option, modes = {"cache_implementation": "static"}, []
    hook = llama.model.model.register_forward_pre_hook(lambda *_: modes.append(torch.is_inference_mode_enabled()))
    if where == "settings":
        llama.model.generation_config.cache_implementation = "static"
    found = llama.generate([[5, 9, 11]], max_new_tokens=4, stop_ids=[], **(option if where == "option" else {}))
    assert modes
    assert not any(modes)
    hook.remove()
    ids = torch.tensor([[5, 9, 11]])
    theirs = llama.model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, eos_token_id=[], pad_token_id=0,
        do_sample=False, **option,
    )  # fmt: skip
    assert theirs[0, 3:].tolist() == found[0]


@pytest.mark.parametrize("name", ["llama", "t5"])
@pytest.mark.parametrize("by_rows", [False, True])
def test_new_tokens_are_written_into_the_cache_on_a_cpu(tiny_model, make_bank, name, by_rows) -> None:
    """The states of the others stay where they are, and no hook stays behind."""
    model, places = tiny_model(name), []
    with compose.attach(model, make_bank(model)) as attached:

        def watch(_, args, kwargs):
            cache = kwargs["past_key_values"]
            layers = getattr(cache, "self_attention_cache", cache).layers
            places.append([layer.keys.data_ptr() for layer in layers if layer.is_initialized])

        hook = model.register_forward_pre_hook(watch, with_kwargs=True)
        if by_rows:
            batch = RunningBatch(attached, stop_ids=[])
            for prompt, adapter in zip(PROMPTS, ADAPTERS, strict=True):
                batch.add(Request(prompt, adapter, 8))
            assert len(list(batch.run())) == len(PROMPTS)
        else:
            attached.generate(PROMPTS, ADAPTERS, max_new_tokens=8, stop_ids=[])
        hook.remove()
    assert not places[0]
    assert len(places) == 8
    assert all(each == places[1] for each in places[1:])
    assert not model._forward_pre_hooks


@pytest.mark.parametrize("options", [{"num_beams": 2}, {"use_cache": False}, {"cache_implementation": "static"}, {}])
def test_what_a_call_wants_of_its_cache_is_left_to_it(llama, options) -> None:
    """Other kinds of caches, none, beams, and one of the caller's; the tokens are those of Transformers alone."""
    from transformers import DynamicCache

    from compose.kernels.growing_layer import GrowingLayer

    caches = []
    own = {} if options else {"past_key_values": DynamicCache(config=llama.model.config)}
    hook = llama.model.model.register_forward_pre_hook(
        lambda _, args, kwargs: caches.append(kwargs["past_key_values"]), with_kwargs=True
    )
    found = llama.generate([[5, 9, 11]], max_new_tokens=6, stop_ids=[], **options, **own)
    hook.remove()
    ids, plain = torch.tensor([[5, 9, 11]]), {"do_sample": False, "num_beams": 1, "pad_token_id": 1, **options}
    want = llama.model.generate(ids, max_new_tokens=6, eos_token_id=[], **plain)
    assert found == want[:, 3:].tolist()
    assert caches
    for cache in caches:
        assert (cache is None) == (options == {"use_cache": False})
        assert not any(isinstance(layer, GrowingLayer) for layer in getattr(cache, "layers", ()))


def test_beams_need_no_stop_token_where_padding_is_0(llama) -> None:
    assert llama.generate([[5, 9]], max_new_tokens=4, stop_ids=[], num_beams=2, pad_token_id=0) == llama.generate(
        [[5, 9]], max_new_tokens=4, stop_ids=[], num_beams=2, pad_token_id=3
    )


def test_no_hook_stays_behind_where_a_layer_fails(llama) -> None:
    def fail(*_) -> None:
        raise KeyboardInterrupt

    hook = llama.model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        llama.generate([[5, 9]], max_new_tokens=4, stop_ids=[])
    hook.remove()
    assert not llama.model._forward_pre_hooks


def test_the_cache_of_another_thread_is_left_to_it(llama) -> None:
    """While one thread generates, another one's call of the same model keeps the layers it came with."""
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    inside, done = Event(), Event()

    def pause(*_) -> None:
        inside.set()
        done.wait(20)

    hook = llama.model.lm_head.register_forward_pre_hook(pause)
    thread = Thread(target=lambda: llama.generate([[5, 9]], max_new_tokens=1, stop_ids=[]))
    thread.start()
    assert inside.wait(20)
    hook.remove()
    cache = DynamicCache(config=llama.model.config)
    llama.model(input_ids=torch.tensor([[5, 9]]), past_key_values=cache)
    done.set()
    thread.join()
    assert [type(layer) for layer in cache.layers] == [DynamicLayer] * len(cache.layers)


@pytest.mark.parametrize(("part", "by_rows"), [("model.layers.1", False), ("model.layers.1", True), ("", True)])
def test_what_is_compiled_is_traced_whole_and_as_often_as_without_room(llama, monkeypatch, part, by_rows) -> None:
    graphs = []

    def count(graph, inputs):
        graphs.append(graph)
        return graph

    def run() -> int:
        torch.compiler.reset()
        before = len(graphs)
        if by_rows:
            batch = RunningBatch(llama, stop_ids=[])
            batch.add(Request([5, 9, 11], None, 6))
            tokens.append(next(batch.run()).tokens)
        else:
            with llama.using({"expert-0": 0.7, "expert-2": 0.4}):
                tokens.append(llama.generate([[5, 9, 11]], max_new_tokens=6, stop_ids=[])[0])
        return len(graphs) - before

    tokens: list[list[int]] = []
    plain = run()
    assert plain == 0
    llama.model.get_submodule(part).compile(backend=count, fullgraph=True)
    with_room = run()
    monkeypatch.setattr("compose.kernels.growing_layer.make_room", lambda cache: None)
    assert with_room == run() > 0
    assert tokens[0] == tokens[1] == tokens[2]
    torch.compiler.reset()


def test_a_compiled_model_is_not_compiled_again_for_each_call(llama) -> None:
    calls = []
    llama.model._compiled_call_impl = lambda *args, **kwargs: (
        calls.append(1) or llama.model._call_impl(*args, **kwargs)
    )
    registered = RemovableHandle.next_id
    llama.generate([[5, 9, 11]], max_new_tokens=2, stop_ids=[])
    assert len(calls) == 2
    assert registered == RemovableHandle.next_id
