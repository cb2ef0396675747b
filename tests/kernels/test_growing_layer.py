"""The layer with room holds what Transformers' layer holds, whatever is done to a cache between tokens."""

from __future__ import annotations

import copy
from contextlib import nullcontext

import pytest
import torch
from transformers.cache_utils import DynamicLayer

from compose.kernels.growing_layer import GrowingLayer

STEPS = {
    "crop": lambda layer: layer.crop(-2),
    "reorder": lambda layer: layer.reorder_cache(torch.tensor([1, 0])),
    "repeat": lambda layer: layer.batch_repeat_interleave(2),
    "select": lambda layer: layer.batch_select_indices(torch.tensor([1, 1])),
    "reset": lambda layer: layer.reset(),
    "offload": lambda layer: layer.offload(),
    "nothing": lambda layer: None,
}


def states(rows: int, tokens: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    keys, values = torch.randn(2, rows, 3, tokens, 4, generator=generator)
    return keys, values


def rows_of(layer) -> int:
    return 2 if not layer.is_initialized else layer.keys.shape[0]


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode, nullcontext])
@pytest.mark.parametrize("step", STEPS.values(), ids=STEPS)
def test_it_holds_what_a_dynamic_layer_holds(step, mode):
    mine, theirs = GrowingLayer(), DynamicLayer()
    with mode():
        for number in range(140):
            rows, tokens = rows_of(theirs), 5 if number == 0 else 1 + number % 2
            got, want = (layer.update(*states(rows, tokens, number)) for layer in (mine, theirs))
            torch.testing.assert_close(got, want, rtol=0, atol=0)
            if number % 40 == 7 and rows < 8:
                for layer in (mine, theirs):
                    step(layer)
            assert mine.get_seq_length() == theirs.get_seq_length()
            assert mine.get_mask_sizes(1) == theirs.get_mask_sizes(1)


@torch.no_grad()
def test_tokens_are_written_not_copied():
    layer = GrowingLayer()
    layer.update(*states(2, 5, 0))
    places = set()
    for number in range(40):
        layer.update(*states(2, 1, number))
        places.add(layer.keys.data_ptr())
    assert len(places) == 1


@torch.no_grad()
def test_a_copy_goes_its_own_way():
    first = GrowingLayer()
    first.update(*states(2, 5, 0))
    second = copy.deepcopy(first)
    before = first.update(*states(2, 1, 1))[0].clone()
    second.update(*states(2, 1, 2))
    torch.testing.assert_close(first.keys, before, rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("kind", [DynamicLayer, GrowingLayer])
def test_what_others_hold_stays_as_it_was(kind):
    """A shallow copy goes on, a snapshot is put back, tokens are cropped: nothing is written over."""
    layer = kind()
    layer.update(*states(2, 5, 0))
    held, snapshot = copy.copy(layer), (layer.keys, layer.values)
    longer = layer.update(*states(2, 2, 1))[0]
    want = longer.clone()
    held.update(*states(2, 2, 2))
    torch.testing.assert_close(longer, want, rtol=0, atol=0)
    layer.crop(-1)
    layer.update(*states(2, 1, 3))
    torch.testing.assert_close(longer, want, rtol=0, atol=0)
    layer.keys, layer.values = snapshot
    layer.update(*states(2, 1, 4))
    torch.testing.assert_close(longer, want, rtol=0, atol=0)


def test_modes_may_change_between_tokens():
    mine, theirs = GrowingLayer(), DynamicLayer()
    for number, mode in enumerate([torch.inference_mode, torch.no_grad, torch.inference_mode, torch.no_grad]):
        with mode():
            got, want = (layer.update(*states(2, 2, number)) for layer in (mine, theirs))
            torch.testing.assert_close(got, want, rtol=0, atol=0)


@torch.no_grad()
def test_other_rows_and_other_types_are_refused_or_promoted_as_by_a_dynamic_layer():
    mine, theirs = GrowingLayer(), DynamicLayer()
    for layer in (mine, theirs):
        layer.update(*states(1, 5, 0))
        with pytest.raises(RuntimeError, match="must match"):
            layer.update(*states(2, 1, 1))
    got, want = (layer.update(*(each.double() for each in states(1, 1, 2))) for layer in (mine, theirs))
    torch.testing.assert_close(got, want)


@torch.no_grad()
def test_memory_that_was_put_in_place_of_its_own_counts():
    layer = GrowingLayer()
    layer.update(*states(2, 5, 0))
    layer.update(*states(2, 1, 1))
    layer.keys.data = torch.zeros_like(layer.keys)
    keys, _ = layer.update(*states(2, 1, 2))
    assert not keys[:, :, :6].any()
