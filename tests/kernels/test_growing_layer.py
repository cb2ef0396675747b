"""The layer with room holds what Transformers' layer holds, whatever is done to a cache between tokens."""

from __future__ import annotations

import copy
import gc
import weakref
from contextlib import nullcontext

import pytest
import torch
from transformers import DynamicCache, EncoderDecoderCache, Gemma2Config, LlamaConfig, StaticCache
from transformers.cache_utils import DynamicLayer

from compose.kernels.growing_layer import GrowingLayer, make_room

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


@torch.no_grad()
@pytest.mark.parametrize("step", [name for name in STEPS if name not in ("crop", "nothing", "offload")])
def test_memory_that_was_replaced_is_not_kept(step):
    layer = GrowingLayer()
    layer.update(*states(2, 5, 0))
    whole = weakref.ref(layer.keys.untyped_storage())
    STEPS[step](layer)
    gc.collect()
    assert whole() is None


def _kinds(cache):
    return [type(layer) for layer in cache.layers]


@torch.no_grad()
def test_room_is_made_in_empty_layers_alone():
    make_room(None)
    cache = DynamicCache(config=LlamaConfig(num_hidden_layers=3))
    held = cache.update(*states(2, 5, 0), 1)[0].clone()
    make_room(cache)
    assert _kinds(cache) == [GrowingLayer, DynamicLayer, GrowingLayer]
    torch.testing.assert_close(cache.layers[1].keys, held, rtol=0, atol=0)


@torch.no_grad()
def test_layers_that_come_later_have_room_too():
    cache = DynamicCache()
    make_room(cache)
    for layer in range(2):
        cache.update(*states(2, 5, layer), layer)
    assert _kinds(cache) == [GrowingLayer] * 2


def test_other_layers_and_other_caches_stay_as_they_are():
    sliding = DynamicCache(config=Gemma2Config(num_hidden_layers=4))
    before = _kinds(sliding)
    make_room(sliding)
    assert _kinds(sliding) == [GrowingLayer if kind is DynamicLayer else kind for kind in before]
    assert len(set(before)) == 2
    offloaded, static = DynamicCache(config=LlamaConfig()), StaticCache(LlamaConfig(), max_cache_len=8)
    offloaded.offloading = True
    pair = EncoderDecoderCache(DynamicCache(config=LlamaConfig()), DynamicCache(config=LlamaConfig()))
    before = _kinds(static)
    for cache in (offloaded, static, pair):
        make_room(cache)
    assert set(_kinds(offloaded)) == set(_kinds(pair.cross_attention_cache)) == {DynamicLayer}
    assert _kinds(static) == before
    assert set(_kinds(pair.self_attention_cache)) == {GrowingLayer}
