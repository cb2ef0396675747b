"""Slots: what a sequence of loads, replacements and evictions leaves is what a fresh stack of the same adapters is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.kernels.grouped_lora.op import grouped_lora
from compose.kernels.mixture_lora.op import mixture_lora
from compose.kernels.slots import LoraSlots, Rows, SlotGroup, live_ranks
from compose.kernels.stack import LoraStack

CAPACITIES = (4, 4, 9)
WIDTH, OUT = 16, 8


def factors(seed: int, rank: int) -> tuple[torch.Tensor, torch.Tensor, float]:
    generator = torch.Generator().manual_seed(100 * seed + rank)
    return torch.randn(rank, WIDTH, generator=generator), torch.randn(OUT, rank, generator=generator), 0.5 + seed


def empty_slots() -> LoraSlots:
    return LoraSlots.empty(CAPACITIES, WIDTH, OUT)


def fresh_stack(held: dict[int, tuple[torch.Tensor, torch.Tensor, float]]) -> LoraStack:
    none = (torch.zeros(0, WIDTH), torch.zeros(OUT, 0), 0.0)
    each = [held.get(slot, none) for slot in range(len(CAPACITIES))]
    return LoraStack(
        torch.cat([a for a, _, _ in each]),
        torch.cat([b.T for _, b, _ in each]),
        torch.tensor([scaling for _, _, scaling in each]),
        tuple(a.shape[0] for a, _, _ in each),
    )


def test_empty_slots_add_nothing() -> None:
    x = torch.randn(3, WIDTH)
    assert torch.equal(grouped_lora(x, empty_slots().stack, torch.tensor([0, 2, -1])), torch.zeros(3, OUT))


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(st.integers(0, 2), st.integers(0, 5), st.one_of(st.none(), st.integers(0, 9))), max_size=8
    ),
    backend=st.sampled_from(["reference", "cpu"]),
)
def test_any_history_leaves_the_stack_of_what_is_held(steps, backend) -> None:
    """A rank of None stands for an eviction. The reference reads live ranks: bit for bit; cpu reads capacities."""
    slots, held = empty_slots(), {}
    for slot, seed, rank in steps:
        if rank is None:
            if slot in held:
                slots.evict(slot)
                del held[slot]
            continue
        rank = min(rank, CAPACITIES[slot])
        one = factors(seed, rank)
        (slots.replace if slot in held else slots.load)(slot, *one)
        held[slot] = one
    expected, ids = fresh_stack(held), torch.tensor([2, 0, -1, 1])
    generator = torch.Generator().manual_seed(1)
    x, gates = torch.randn(4, WIDTH, generator=generator), torch.randn(4, 3, generator=generator)
    assert live_ranks(slots.stack) == expected.ranks
    assert [slots.rank(slot) for slot in range(3)] == [held[s][0].shape[0] if s in held else None for s in range(3)]
    assert_close(slots.stack.scaling_E, expected.scaling_E, rtol=0, atol=0)
    bound = 0 if backend == "reference" else 1e-4  # float32 sums of other lengths
    exact = {"rtol": bound, "atol": bound}
    for combine in ("outputs", "parameters"):
        ours = mixture_lora(x, slots.stack, gates, combine=combine, backend=backend)
        assert_close(ours, mixture_lora(x, expected, gates, combine=combine, backend=backend), **exact)
    ours = grouped_lora(x, slots.stack, ids, backend=backend)
    assert_close(ours, grouped_lora(x, expected, ids, backend=backend), **exact)
    a, b = slots.stack.factors(2)
    beyond = slice(expected.ranks[2], None)
    assert not a[beyond].any()
    assert not b[beyond].any()


def test_writes_go_into_the_same_memory() -> None:
    slots = empty_slots()
    stack = slots.stack
    tensors = (stack.a_RD, stack.b_RO, stack.scaling_E, stack.index.ranks_E)
    before = [tensor.data_ptr() for tensor in tensors]
    slots.load(2, *factors(1, 9))
    slots.replace(2, *factors(2, 3))
    slots.evict(2)
    assert [tensor.data_ptr() for tensor in tensors] == before
    assert slots.stack is stack


@pytest.mark.parametrize("inference", [False, True])
def test_every_write_is_seen_by_caches(inference) -> None:
    """Casts and gathered factors are kept as long as versions stand still."""
    slots, x = empty_slots(), torch.randn(2, WIDTH, dtype=torch.float64)
    ids = torch.tensor([0, 0])
    seen = [slots.stack.versions()]

    def update() -> torch.Tensor:
        seen.append(slots.stack.versions())
        return grouped_lora(x, slots.stack.cast(torch.float64), ids)

    with torch.inference_mode(inference):
        slots.load(0, *factors(1, 4))
        loaded = update()
        slots.replace(0, *factors(2, 0))
        emptied = update()
        slots.replace(0, *factors(1, 4))
        again = update()
        slots.evict(0)
        evicted = update()
    assert None not in seen
    assert len(set(seen)) == len(seen)
    assert loaded.any()
    assert torch.equal(loaded, again)
    assert not emptied.any()
    assert not evicted.any()


def test_a_rank_above_the_capacity_is_refused_and_nothing_is_written() -> None:
    slots = empty_slots()
    slots.load(0, *factors(1, 3))
    before, versions = slots.stack.a_RD.clone(), slots.stack.versions()
    with pytest.raises(
        IncompatibleError, match="rank 5 exceeds the capacity 4 of slot 0; the largest slot holds rank"
    ):
        slots.replace(0, *factors(2, 5))
    assert torch.equal(slots.stack.a_RD, before)
    assert slots.stack.versions() == versions
    assert slots.rank(0) == 3


def test_a_full_slot_is_not_overwritten_by_load() -> None:
    slots = empty_slots()
    slots.load(1, *factors(1, 2))
    with pytest.raises(IncompatibleError, match="slot 1 holds an adapter of rank 2; use replace"):
        slots.load(1, *factors(2, 2))


@pytest.mark.parametrize(("name", "arguments"), [("replace", factors(1, 2)), ("evict", ())])
def test_an_empty_slot_is_neither_replaced_nor_evicted(name, arguments) -> None:
    with pytest.raises(IncompatibleError, match="slot 1 is empty"):
        getattr(empty_slots(), name)(1, *arguments)


@pytest.mark.parametrize("slot", [-1, 3])
def test_a_slot_that_does_not_exist_is_refused(slot) -> None:
    with pytest.raises(IncompatibleError, match=f"slot {slot} does not exist; this stack has slots 0 to 2"):
        empty_slots().load(slot, *factors(1, 2))


@pytest.mark.parametrize(
    ("a", "b"), [((2, 5), (OUT, 2)), ((2, WIDTH), (2, OUT)), ((2, WIDTH), (OUT, 3)), ((WIDTH,), (OUT, 2))]
)
def test_factors_of_another_shape_are_refused(a, b) -> None:
    with pytest.raises(IncompatibleError, match=r"a must be \(r, 16\) and b \(8, r\) with one r"):
        empty_slots().load(0, torch.zeros(a), torch.zeros(b), 1.0)


@pytest.mark.parametrize("capacities", [(), (4, 0)])
def test_slots_without_room_are_refused(capacities) -> None:
    with pytest.raises(IncompatibleError, match="at least one capacity and none below 1"):
        LoraSlots.empty(capacities, WIDTH, OUT)


def test_an_adapter_of_a_packed_stack_is_replaced_in_place(make_stack) -> None:
    """A stack made without slots has full ones."""
    stack = make_stack((3, 2), WIDTH, OUT, dtype=torch.float32)
    slots, other = LoraSlots(stack), factors(4, 2)
    untouched = stack.a_RD[3:].clone()
    slots.replace(0, *other)
    x = torch.randn(1, WIDTH)
    expected = other[2] * x @ other[0].T @ other[1].T
    assert_close(grouped_lora(x, stack, torch.tensor([0])), expected)
    assert torch.equal(stack.a_RD[3:], untouched)


def test_a_group_writes_an_adapter_at_every_target_at_once() -> None:
    """The second adapter misses the second target, so nothing of the first may stay there."""
    group = SlotGroup.empty(CAPACITIES, {"q": (WIDTH, OUT), "v": (WIDTH, 5)}, dtype=torch.float64)

    def write(slot: int, ranks: tuple[int, int], scalings: tuple[float, float]) -> list[Rows | None]:
        rows = [
            Rows(torch.randn(rank, WIDTH, dtype=torch.float64), torch.randn(rank, out, dtype=torch.float64))
            for rank, out in zip(ranks, (OUT, 5), strict=True)
        ]
        sources = [one if one.a_rD.shape[0] else None for one in rows]
        group.write(slot, sources, torch.tensor(scalings), torch.tensor(ranks, dtype=torch.int32))
        return sources

    write(2, (9, 7), (0.5, 2.0))
    before = group.slots["v"].stack.versions()
    only_q, _ = write(2, (3, 0), (3.0, 0.0))
    q, v = group.slots["q"].stack, group.slots["v"].stack
    assert v.versions() != before
    assert live_ranks(q) == (0, 0, 3)
    assert live_ranks(v) == (0, 0, 0)
    assert (group.slots["q"].rank(2), group.slots["v"].rank(2), group.slots["q"].rank(0)) == (3, 0, None)
    x, ids = torch.randn(2, WIDTH, dtype=torch.float64), torch.tensor([2, 0])
    expected = torch.cat([3.0 * x[:1] @ only_q.a_rD.T @ only_q.b_rO, torch.zeros(1, OUT, dtype=torch.float64)])
    for backend in ("cpu", "reference"):
        assert_close(grouped_lora(x, q, ids, backend=backend), expected)
        assert not grouped_lora(x, v, ids, backend=backend).any()
    assert not v.a_RD.any()


def test_a_group_refuses_a_rank_above_the_capacity_before_it_writes() -> None:
    group = SlotGroup.empty((2, 4), {"q": (WIDTH, OUT), "v": (WIDTH, OUT)})
    sources = [Rows(torch.ones(rank, WIDTH), torch.ones(rank, OUT)) for rank in (2, 3)]
    with pytest.raises(IncompatibleError, match="rank 3 exceeds the capacity 2 of slot 0"):
        group.write(0, sources, torch.ones(2), torch.tensor([2, 3], dtype=torch.int32))
    assert not group.slots["q"].stack.a_RD.any()


def test_weighted_sums_do_not_depend_on_the_numbers_of_the_slots() -> None:
    """The reference adds in the order in which a row names its adapters: bit for bit the same from any slots."""
    x, gates = torch.randn(5, WIDTH), torch.randn(5, 3)
    kept = []
    for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
        slots = LoraSlots.empty((4, 4, 4), WIDTH, OUT)
        for seed, slot in enumerate(order):
            slots.load(slot, *factors(seed, 2 + seed))
        indices = torch.tensor(order).expand(5, 3)
        kept.append(
            [
                mixture_lora(x, slots.stack, gates, indices, combine=combine, backend="reference")
                for combine in ("outputs", "parameters")
            ]
        )
    for other in kept[1:]:
        assert torch.equal(other[0], kept[0][0])
        assert torch.equal(other[1], kept[0][1])
