"""A paged bank gives what the whole bank gives, bit for bit on the reference backend, whatever was loaded before."""

import threading
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.testing import assert_close

import compose
from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.coefficients import AdapterIds, Coefficients
from compose.engine.paging import attach_paged
from compose.engine.paging_numbers import translated
from compose.engine.requests import Request, RunningBatch
from compose.errors import AdapterFormatError, IncompatibleError, UnknownNameError
from compose.formats.peft import write_adapter

RANKS = (3, 1, 8, 5, 2, 4, 8, 1)
SLOTS = {4: 2, 8: 2}
NAMES = tuple("abcdefgh")
EXACT = {"rtol": 0, "atol": 0}
BATCHES = st.lists(st.one_of(st.none(), st.sampled_from(NAMES)), min_size=3, max_size=3)


def adapter_over(model: nn.Module, name: str, rank: int, *, skip: str = "") -> Adapter:
    """Random factors at every linear layer and token embedding whose path does not hold ``skip``."""
    generator = torch.Generator().manual_seed(NAMES.index(name))
    targets = {}
    for path, module in model.named_modules():
        leave = any(part in path for part in ("position", "wpe", "token_type", "relative_attention", "lm_head", "cls"))
        if leave or (skip and skip in path):
            continue
        if isinstance(module, nn.Embedding):
            kind, width, out = "embedding", module.num_embeddings, module.embedding_dim
        elif isinstance(module, nn.Linear):
            kind, width, out = "linear", module.in_features, module.out_features
        elif type(module).__name__ == "Conv1D":
            kind, (width, out) = "linear", module.weight.shape
        else:
            continue
        a = torch.randn(rank, width, generator=generator) / width**0.5
        targets[path] = LowRank(a, torch.randn(out, rank, generator=generator) / rank, 0.25 + 0.25 * rank, kind)
    return Adapter(name, "tiny", targets)


def bank_over(model: nn.Module) -> Bank:
    """Eight adapters; the second misses the first layer."""
    skips = ("", "0", *[""] * 6)
    return Bank.from_adapters(
        [adapter_over(model, *one, skip=skip) for *one, skip in zip(NAMES, RANKS, skips, strict=True)]
    )


def test_there_are_three_tiny_layers(tiny_model) -> None:
    assert len(bank_over(tiny_model("llama")).targets) == 3 * 7 + 1


@pytest.fixture
def pair(tiny_model):
    """A factory: the same Llama twice, one with a paged bank and one with the whole bank, on the reference backend."""

    def make(**options):
        bank = bank_over(tiny_model("llama"))
        options = {"slots": SLOTS, "backend": "reference", **options}
        whole = compose.attach(tiny_model("llama"), bank, backend="reference")
        return attach_paged(tiny_model("llama"), bank, **options), whole

    return make


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(st.tuples(BATCHES, st.lists(st.sampled_from(NAMES), max_size=5)), min_size=1, max_size=6),
    host_bytes=st.sampled_from([0, 60_000, 1 << 30]),
)
def test_any_history_gives_what_the_whole_bank_gives(pair, run_model, steps, host_bytes) -> None:
    """Batches of three rows, each followed by a prefetch while it is in force, over four slots."""
    paged, whole = pair(slots={4: 1, 8: 3}, host_bytes=host_bytes)
    with torch.no_grad():
        for rows, ahead in steps:
            whole.set(rows)
            with paged.using(rows):
                paged.prefetch(ahead)
                assert_close(run_model(paged.model), run_model(whole.model), **EXACT)


@pytest.mark.parametrize("combine", ["outputs", "parameters"])
@pytest.mark.parametrize("scope", ["batch", "row", "token", "groups", "sparse", "sparse groups"])
def test_weighted_sets_of_every_scope_give_what_the_whole_bank_gives(pair, run_model, combine, scope) -> None:
    paged, whole = pair(slots={4: 2, 8: 3})
    paged.prefetch(["h", "e", "g", "a"])
    shape = {"batch": (8,), "row": (3, 8), "token": (3, 7, 8), "groups": (3, 3, 8)}.get(scope)
    groups = whole.layer_groups(3) if "groups" in scope else None
    if shape is None:
        values = torch.randn(*([3] if groups else []), 3, 2)
        chosen = Coefficients(values, combine, groups, torch.tensor([[6, 2], [3, -1], [2, 2]]))
    else:
        values = torch.randn(shape)
        values[..., [0, 1, 4, 7]] = 0.0
        values.view(-1, 8)[0, 5] = 0.0
        chosen = Coefficients(values, combine, groups)
    with torch.no_grad(), paged.using(chosen), whole.using(chosen):
        assert_close(run_model(paged.model), run_model(whole.model), **EXACT)
    assert paged.counters.misses + paged.counters.prefetched >= 3


def test_every_architecture_gives_what_the_whole_bank_gives(any_model, run_model) -> None:
    import copy

    bank, other = bank_over(any_model), copy.deepcopy(any_model)
    paged = attach_paged(any_model, bank, slots={8: 2}, backend="reference")
    with torch.no_grad(), compose.attach(other, bank, backend="reference") as whole:
        for rows in (["b", None, "c"], ["g", "c", "g"], ["b", "b", "a"]):
            with paged.using(rows), whole.using(rows):
                assert_close(run_model(any_model), run_model(other), **EXACT)


def test_the_fast_path_agrees_after_many_loads(tiny_model, run_model) -> None:
    """It reads whole capacities, so this is up to rounding."""
    model, other = tiny_model("llama"), tiny_model("llama")
    paged = attach_paged(model, bank_over(model), slots=SLOTS)
    whole = compose.attach(other, bank_over(other))
    with torch.no_grad():
        for first in range(8):
            rows = [NAMES[first], NAMES[(first * 3 + 1) % 8], None]
            paged.set(rows)
            whole.set(rows)
            assert_close(run_model(model), run_model(other))
            whole.set({NAMES[first]: 0.5, NAMES[first - 1]: -1.0})
            paged.set({NAMES[first]: 0.5, NAMES[first - 1]: -1.0})
            assert_close(run_model(model), run_model(other))


def test_the_bare_model_needs_no_slot(pair, run_model) -> None:
    paged, whole = pair()
    with torch.no_grad():
        for chosen in (None, [None] * 3, Coefficients(torch.zeros(8))):
            with paged.using(chosen):
                assert_close(run_model(paged.model), run_model(whole.model), **EXACT)
    assert paged.resident == ()


def test_the_handle_shows_the_banks_numbers(pair) -> None:
    paged, _ = pair()
    with paged.using(["g", None, "b"]):
        assert paged.active.ids.tolist() == [6, -1, 1]
        with paged.using("c"):
            assert paged.resident == ("b", "c", "g")
        assert paged.active.ids.tolist() == [6, -1, 1]


def test_placed_shows_the_slots_numbers(pair) -> None:
    """What a captured graph reads: c and g need the large slots, 2 and 3, b fits slot 0."""
    paged, _ = pair()
    paged.set(["g", None, "c", "b"])
    assert paged.placed.ids.tolist() == [3, -1, 2, 0]
    paged.set(None)
    assert paged.placed is None


def test_an_inner_block_may_take_the_slots_of_the_outer_one(pair, run_model) -> None:
    paged, whole = pair(slots={8: 1})
    with torch.no_grad(), paged.using("c"):
        with paged.using("d"), whole.using("d"):
            assert paged.resident == ("d",)
            assert_close(run_model(paged.model), run_model(whole.model), **EXACT)
        with whole.using("c"):
            assert_close(run_model(paged.model), run_model(whole.model), **EXACT)


def test_values_written_in_place_take_effect(pair, run_model) -> None:
    paged, whole = pair()
    chosen = Coefficients(torch.randn(3, 1), indices=torch.tensor([[0], [1], [2]]))
    paged.set(chosen)
    whole.set(chosen)
    with torch.no_grad():
        run_model(paged.model)
        chosen.values.mul_(0.5)
        assert_close(run_model(paged.model), run_model(whole.model), **EXACT)


def test_numbers_written_between_two_uses_of_one_selection_take_effect(pair, run_model) -> None:
    paged, whole = pair()
    ids = AdapterIds(torch.tensor([0, 1, 2]))
    with torch.no_grad():
        with paged.using(ids):
            run_model(paged.model)
        ids.ids[0] = 5
        with paged.using(ids), whole.using(AdapterIds(ids.ids.clone())):
            assert_close(run_model(paged.model), run_model(whole.model), **EXACT)


def test_gradients_reach_sparse_values(pair, run_model) -> None:
    paged, whole = pair(slots={8: 4})
    grads = []
    for handle in (paged, whole):
        values = torch.ones(3, 2, requires_grad=True)
        with handle.using(Coefficients(values, indices=torch.tensor([[6, 2], [3, 0], [2, 3]]))):
            run_model(handle.model).square().sum().backward()
        grads.append(values.grad)
    assert_close(*grads)


def test_trained_dense_values_are_refused(pair) -> None:
    paged, _ = pair()
    with pytest.raises(IncompatibleError, match="trained coefficients of a paged bank must be sparse"):
        paged.set(Coefficients(torch.zeros(8, requires_grad=True)))


def test_too_many_adapters_are_refused_and_change_nothing(pair, run_model) -> None:
    paged, whole = pair()
    paged.set("c")
    whole.set("c")
    with pytest.raises(IncompatibleError, match=r"5 adapters are named.*\(2 of rank 4, 2 of rank 8\).*split"):
        paged.set(list("abdef"))
    with pytest.raises(IncompatibleError, match="3 adapters are named"):  # three of rank above 4
        paged.set(["c", "d", "g"])
    assert paged.active.values[2] == 1.0
    with torch.no_grad():
        assert_close(run_model(paged.model), run_model(whole.model), **EXACT)


def test_an_adapter_too_large_for_every_slot_is_refused_by_name(pair) -> None:
    paged, _ = pair(slots={4: 3})
    with pytest.raises(IncompatibleError, match=r"adapter 'd' has rank 5, the largest slot holds 4; .*slots=\{5: n\}"):
        paged.set(["a", "d"])
    with pytest.raises(IncompatibleError, match="row 1: adapter 'd' has rank 5"):
        list(paged.split(["a", "d"]))
    assert paged.prefetch(["d", "a"]) == 1
    assert paged.resident == ("a",)


def test_split_makes_parts_that_fit_and_keeps_every_row(pair) -> None:
    paged, _ = pair()
    rows = ["c", "d", "g", None, {"a": 0.5, "c": 0.5}, "b", "e", "f", "c"]
    parts = list(paged.split(rows))
    assert sorted(row for part in parts for row in part) == list(range(9))
    assert parts[0] == [0, 1, 3, 4, 5, 8]
    for part in parts:
        paged.set([rows[row] for row in part if not isinstance(rows[row], dict)])


def test_split_refuses_a_row_that_fits_nowhere_and_unknown_names(pair) -> None:
    paged, _ = pair()
    with pytest.raises(IncompatibleError, match="row 1: 5 adapters are named"):
        list(paged.split(["a", dict.fromkeys("abefh", 1.0)]))
    with pytest.raises(UnknownNameError, match="unknown adapter 'z'"):
        list(paged.split(["z"]))


PROMPTS = [[5, 9, 11, 4], [7, 8, 6], [40, 41], [12, 13, 14], [21, 22], [33, 3]]


@pytest.mark.parametrize("options", [{}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generate_splits_what_the_slots_cannot_hold(pair, options) -> None:
    rows = ["c", {"d": 0.5, "a": 1.5}, "g", None, "c", "b"]
    paged, whole = pair(slots={8: 2}, overflow="split")
    chosen = {"max_new_tokens": 4, "stop_ids": [2], **options}
    assert paged.generate(PROMPTS, rows, **chosen) == whole.generate(PROMPTS, rows, **chosen)
    refusing, _ = pair(slots={8: 2})
    with pytest.raises(IncompatibleError, match="5 adapters are named"):
        refusing.generate(PROMPTS, rows, **chosen)
    assert refusing.generate(PROMPTS[:2], ["c", "a"], **chosen) == whole.generate(PROMPTS[:2], ["c", "a"], **chosen)
    with pytest.raises(IncompatibleError, match="one entry for each of the 6 rows"):
        paged.generate(PROMPTS, rows[:2], **chosen)


def test_rows_may_be_weighted_sets(pair, run_model) -> None:
    paged, whole = pair()
    rows = [{"c": 0.5, "a": 2.0}, None, "d"]
    sparse = Coefficients(
        torch.tensor([[0.5, 2.0], [0.0, 0.0], [1.0, 0.0]]), indices=torch.tensor([[2, 0], [-1, -1], [3, -1]])
    )
    with torch.no_grad(), paged.using(rows), whole.using(sparse):
        assert_close(run_model(paged.model), run_model(whole.model), **EXACT)


def test_a_running_batch_moves_through_few_slots(pair) -> None:
    """Six requests, two rows at a time, two slots: what one after another gives."""
    paged, whole = pair(slots={8: 2})
    running = RunningBatch(paged, max_rows=2, stop_ids=[])
    requests = [Request(prompt, name, 3) for prompt, name in zip(PROMPTS, "cdgcba", strict=True)]
    for request in requests:
        running.add(request)
    done = {id(finished.request): finished.tokens for finished in running.run()}
    for request in requests:
        alone = whole.generate([request.prompt], [request.adapter], max_new_tokens=3, stop_ids=[])
        assert done[id(request)] == alone[0]
    assert paged.counters.misses >= 5


def test_counters_tell_hits_from_prefetched_and_misses(pair) -> None:
    paged, _ = pair(slots={8: 2})
    paged.set(["a", "b", "a"])
    assert paged.prefetch(["c"]) == 0  # both slots are in force
    paged.set(["b"])
    assert paged.prefetch(["c"]) == 1
    paged.set(["c", "b"])
    paged.set(["c", "d"])
    counted = paged.reset_counters()
    assert (counted.hits, counted.prefetched, counted.misses) == (3, 1, 3)
    assert (counted.loads, counted.evictions, counted.reads, counted.host_hits) == (4, 2, 4, 0)
    assert counted.hit_rate == 3 / 7
    size = {name: 4 * sum(u.a.numel() + u.b.numel() for u in paged.bank[name].targets.values()) for name in "abcd"}
    assert 0 <= counted.bytes - sum(size.values()) < 4 * 22 * 16
    assert counted.bytes_read == counted.bytes
    assert counted.seconds > 0
    paged.set("a")
    assert (paged.counters.misses, paged.counters.host_hits, paged.counters.reads) == (1, 1, 0)


def test_one_selection_used_again_and_again_counts_once(pair) -> None:
    paged, _ = pair()
    ids = AdapterIds(torch.tensor([0, 1]))
    for _ in range(3):
        with paged.using(ids):
            pass
    assert (paged.counters.misses, paged.counters.hits) == (2, 0)


def test_the_adapters_used_longest_ago_leave_first(pair) -> None:
    paged, _ = pair(slots={8: 3})
    for rows in ("c", "d", "g", "c"):
        paged.set(rows)
    paged.set(["a", None])
    assert paged.resident == ("a", "c", "g")
    paged.prefetch(["g"])
    paged.prefetch(["b"])
    assert paged.resident == ("a", "b", "g")


def test_dense_rows_become_sparse_ones_in_the_banks_order() -> None:
    values = torch.zeros(2, 200)
    values[0, [150, 3, 77]] = torch.tensor([1.0, 2.0, 3.0])
    values[1, 9] = 4.0
    slots = {150: 0, 3: 1, 77: 2, 9: 3}
    sparse = translated(Coefficients(values), slots, 200)
    assert sparse.values.tolist() == [[2.0, 3.0, 1.0], [4.0, 0.0, 0.0]]
    assert sparse.indices.tolist() == [[1, 2, 0], [3, -1, -1]]


def test_host_memory_is_bounded(pair) -> None:
    paged, _ = pair(slots={8: 1}, host_bytes=60_000)
    for name in NAMES:
        paged.set(name)
        assert paged._pager.host.held <= 60_000
    assert paged._pager.host.held > 0


@pytest.fixture
def folder(tiny_model, tmp_path):
    bank = bank_over(tiny_model("llama"))
    for name in bank.names:
        write_adapter(bank[name], tmp_path / name)
    return tmp_path


def test_files_are_read_one_by_one_when_they_are_needed(tiny_model, run_model, folder, monkeypatch) -> None:
    from compose.formats.entry import FileEntry

    read, original = [], FileEntry.read
    monkeypatch.setattr(FileEntry, "read", lambda entry: (read.append(entry.name), original(entry))[1])
    model, other = tiny_model("llama"), tiny_model("llama")
    bank = Bank.open(folder)
    paged = attach_paged(model, bank, slots={8: 2}, backend="reference")
    whole = compose.attach(other, bank_over(other), backend="reference")
    assert read == []
    with torch.no_grad():
        for rows in (["c", "f", None], ["c", "a", "a"], ["f", "c", "c"]):
            with paged.using(rows), whole.using(rows):
                assert_close(run_model(model), run_model(other), **EXACT)
    assert sorted(read) == ["a", "c", "f"]
    assert paged.counters.reads == 3


def test_a_file_that_changed_is_refused_and_what_was_in_force_stays(tiny_model, run_model, folder) -> None:
    model = tiny_model("llama")
    paged = attach_paged(model, Bank.open(folder), slots={8: 2}, host_bytes=0)
    with torch.no_grad():
        paged.set("c")
        before = run_model(model)
        write_adapter(adapter_over(tiny_model("llama"), "d", 6), folder / "d", overwrite=True)
        with pytest.raises(AdapterFormatError, match="changed"):
            paged.set(["a", "d"])
        assert paged.resident == ("c",)
        assert_close(run_model(model), before, **EXACT)
        assert paged.counters.misses == 1


def test_a_model_cast_after_attaching_is_refused_and_detaches_all_the_same(pair, tiny_model) -> None:
    paged, _ = pair()
    paged.set("a")
    paged.model.double()
    with pytest.raises(IncompatibleError, match="was moved or cast after attach_paged"):
        paged.set("b")
    assert type(paged.detach().model.layers[0].self_attn.q_proj) is nn.Linear


def test_a_move_that_moves_nothing_is_no_hindrance(pair, run_model) -> None:
    paged, whole = pair()
    paged.model.to("cpu", torch.float32)
    with torch.no_grad(), paged.using(["b", "b", "c"]), whole.using(["b", "b", "c"]):
        assert_close(run_model(paged.model), run_model(whole.model), **EXACT)


def test_detach_restores_the_model_and_frees_host_memory(tiny_model, run_model) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        before = run_model(model)
        with attach_paged(model, bank_over(model), slots=2) as paged:
            paged.set("a")
            assert not torch.equal(run_model(model), before)
        assert torch.equal(run_model(model), before)
    assert paged._pager.host.held == 0
    with pytest.raises(IncompatibleError, match="detached"):
        paged.set("a")


def test_export_gives_the_banks_adapters(pair) -> None:
    paged, _ = pair(slots={8: 1})
    exported = paged.export()
    assert [one.name for one in exported] == list(NAMES)
    for one in exported:
        for target, update in one.targets.items():
            assert torch.equal(update.a, paged.bank[one.name].targets[target].a)


@pytest.mark.parametrize("slots", [0, -1, {}, {0: 2}, {8: 0}])
def test_slots_that_are_none_are_refused(tiny_model, slots) -> None:
    model = tiny_model("llama")
    with pytest.raises(IncompatibleError, match="slots must be"):
        attach_paged(model, bank_over(model), slots=slots)


@pytest.mark.parametrize("options", [{"overflow": "drop"}, {"host_bytes": -1}])
def test_options_out_of_range_are_refused(pair, options) -> None:
    with pytest.raises(IncompatibleError, match=next(iter(options))):
        pair(**options)


def test_one_number_of_slots_has_the_largest_rank_of_the_bank(pair) -> None:
    paged, _ = pair(slots=3)
    assert next(iter(paged.layers.values())).stack.ranks == (8, 8, 8)


def test_a_thread_may_prefetch_while_another_runs(pair, run_model) -> None:
    paged, whole = pair()
    stop = threading.Event()

    def prefetch() -> int:
        turn = 0
        while not stop.is_set():
            paged.prefetch([NAMES[turn % 8], NAMES[(turn + 3) % 8]])
            turn += 1
        return turn

    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(prefetch)
        try:
            with torch.no_grad():
                for turn in range(20):
                    rows = [NAMES[turn % 8], None, NAMES[(turn * 5 + 2) % 8]]
                    with paged.using(rows), whole.using(rows):
                        assert_close(run_model(paged.model), run_model(whole.model), **EXACT)
        finally:
            stop.set()
        assert ahead.result() > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: side stream, pinned memory, events")
def test_copies_on_the_side_stream_are_ordered_on_a_gpu(tiny_model, run_model) -> None:
    """No synchronisation of ours but the events: 300 batches, each prefetched during the one before."""
    model, other = tiny_model("llama").cuda(), tiny_model("llama").cuda()
    bank = bank_over(tiny_model("llama"))
    paged = attach_paged(model, bank, slots={4: 1, 8: 3}, host_bytes=200_000, backend="reference")
    whole = compose.attach(other, bank, backend="reference")
    generator = torch.Generator().manual_seed(3)
    draws = torch.randint(0, 8, (301, 2), generator=generator).tolist()
    batches = [[NAMES[first], NAMES[second]] for first, second in draws]
    tokens = torch.randint(3, 67, (2, 7), generator=generator).cuda()
    ours, theirs = [], []
    with torch.no_grad():
        for rows, ahead in pairwise(batches):
            paged.set(rows)
            paged.prefetch(ahead)
            ours.append(model(input_ids=tokens).logits)
        for rows in batches[:-1]:
            whole.set(rows)
            theirs.append(other(input_ids=tokens).logits)
    assert_close(torch.stack(ours), torch.stack(theirs), rtol=1e-5, atol=1e-5)
    assert paged.counters.prefetched > 0
