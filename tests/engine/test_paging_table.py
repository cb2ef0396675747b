"""Which adapter goes into which slot: every set that fits is held, nothing busy moves, the oldest leaves first."""

from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from compose.engine.paging_table import Load, SlotTable

CAPACITIES = st.lists(st.sampled_from([2, 4, 8]), min_size=1, max_size=5)
RANKS = (0, 1, 2, 3, 4, 4, 7, 8)  # by number of the adapter; its name is the letter


def name(number: int) -> str:
    return "abcdefgh"[number]


def bring(table: SlotTable, wanted: dict[str, int]) -> list[Load] | None:
    loads = table.place(wanted)
    for load in loads or []:
        table.hold(load)
    table.touch(wanted)
    return loads


def by_trying(capacities: list[int], ranks: list[int]) -> bool:
    """Whether some assignment works, by trying all of them."""
    return any(
        all(rank <= most for rank, most in zip(ranks, order, strict=False))
        for order in permutations(capacities, len(ranks))
    )


@settings(max_examples=200, deadline=None)
@given(CAPACITIES, st.lists(st.sets(st.integers(0, 7), max_size=5), max_size=8))
def test_every_set_that_fits_is_held_whatever_was_there_before(capacities, batches) -> None:
    table = SlotTable(capacities)
    for batch in batches:
        wanted = {name(number): RANKS[number] for number in sorted(batch)}
        fits = by_trying(capacities, list(wanted.values()))
        assert table.fits(wanted.values()) == fits
        loads = bring(table, wanted)
        assert (loads is not None) == fits
        if loads is None:
            continue
        slots = [table.slot(one) for one in wanted]
        assert len(set(slots)) == len(slots)
        assert all(wanted[one] <= capacities[table.slot(one)] for one in wanted)
        assert len(table) <= len(capacities)


@settings(max_examples=200, deadline=None)
@given(CAPACITIES, st.lists(st.integers(0, 7), max_size=5), st.sets(st.integers(0, 4)), st.integers(0, 7))
def test_busy_slots_are_never_written(capacities, before, busy, number) -> None:
    table = SlotTable(capacities)
    for one in before:
        bring(table, {name(one): RANKS[one]})
    busy = {slot for slot in busy if slot < len(capacities)}
    loads = table.place({name(number): RANKS[number]}, busy)
    if loads is None:
        assert all(most < RANKS[number] for slot, most in enumerate(capacities) if slot not in busy)
    else:
        assert not busy & {load.slot for load in loads}


def test_the_least_recently_used_leaves() -> None:
    table = SlotTable([4, 4])
    for one in ("a", "b", "a"):
        bring(table, {one: 4})
    assert bring(table, {"c": 4}) == [Load("c", 1)]
    assert "a" in table
    assert "b" not in table


def test_an_empty_slot_is_taken_first_and_the_smallest_that_is_large_enough() -> None:
    table = SlotTable([8, 2, 4])
    assert bring(table, {"a": 1}) == [Load("a", 1)]
    assert bring(table, {"b": 3}) == [Load("b", 2)]
    assert bring(table, {"c": 1}) == [Load("c", 0)]
    assert bring(table, {"d": 1}) == [Load("d", 1)]


def test_a_small_adapter_moves_when_a_large_one_needs_its_slot() -> None:
    table = SlotTable([2, 8])
    bring(table, {"small": 1})
    bring(table, {"other": 2})
    assert table.slot("other") == 1
    assert bring(table, {"other": 2, "large": 8}) == [Load("large", 1), Load("other", 0)]
    assert "small" not in table


@pytest.mark.parametrize("ranks", [[9], [8, 8], [3, 3], [1, 1, 1]])
def test_what_does_not_fit_changes_nothing(ranks) -> None:
    table = SlotTable([2, 8])
    bring(table, {"a": 1})
    assert bring(table, {f"new-{number}": rank for number, rank in enumerate(ranks)}) is None
    assert table.slot("a") == 0
