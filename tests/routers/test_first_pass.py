"""The base pass keeps a cache for the gates beside the model's, however the model's came about."""

from __future__ import annotations

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers import preset


def _routed(routed_over, name):
    routed = routed_over(name, preset("xlora"))
    generator = torch.Generator().manual_seed(5)
    for parameter in routed.router.parameters():
        parameter.data = torch.randn(parameter.shape, generator=generator)
    return routed


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [{}, {"use_cache": None}, {"use_cache": True}], ids=["unsaid", "none", "true"])
def test_a_cache_that_the_model_made_can_be_continued(routed_over, batch, use_cache):
    routed, ids = _routed(routed_over, "llama"), batch("llama")["input_ids"][:2]
    whole = routed(input_ids=ids, use_cache=False).logits
    cache = routed(input_ids=ids[:, :4], **use_cache).past_key_values
    rest = routed(input_ids=ids[:, 4:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 4:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("use_cache", [{}, {"use_cache": True}], ids=["unsaid", "true"])
def test_a_cache_of_encoder_and_decoder_can_be_continued(routed_over, batch, use_cache):
    routed, inputs = _routed(routed_over, "t5"), batch("t5")
    known = {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"]}
    decoded = inputs["input_ids"][:, :5]
    whole = routed(**known, decoder_input_ids=decoded, use_cache=False).logits
    cache = routed(**known, decoder_input_ids=decoded[:, :3], **use_cache).past_key_values
    rest = routed(**known, decoder_input_ids=decoded[:, 3:], past_key_values=cache).logits
    torch.testing.assert_close(rest, whole[:, 3:], atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_cache_that_was_filled_without_the_router_is_refused(routed_over, batch):
    routed, ids = _routed(routed_over, "llama"), batch("llama")["input_ids"]
    with routed.disable():
        cache = routed.model(input_ids=ids[:, :4], use_cache=True).past_key_values
    with pytest.raises(IncompatibleError, match=r"holds 4 tokens, and the pass .* saw 0 of them; fill the cache"):
        routed(input_ids=ids[:, 4:], past_key_values=cache)


@pytest.mark.parametrize("name", ["xlora", "molora"])
@pytest.mark.parametrize("kind", ["llama", "t5"])
def test_a_cache_with_room_can_be_handed_in(kind, name, routed_over, batch):
    """It stays the caller's and can be continued without gradients and with them."""
    from transformers import DynamicCache, EncoderDecoderCache

    from compose.kernels.growing_layer import make_room

    routed, inputs = routed_over(kind, preset(name)), batch(kind)
    known = {"input_ids": inputs["input_ids"]} if kind == "t5" else {}
    ids, given = inputs["input_ids"][:, :6], "decoder_input_ids" if kind == "t5" else "input_ids"
    config = routed.config
    cache = DynamicCache(config=config)
    if kind == "t5":
        cache = EncoderDecoderCache(cache, DynamicCache(config=config))
    make_room(cache)
    own = cache.self_attention_cache if kind == "t5" else cache
    with torch.no_grad():
        whole = routed(**known, **{given: ids}, use_cache=False).logits
        first = routed(**known, **{given: ids[:, :3]}, past_key_values=cache, use_cache=True)
        places = [layer.keys.data_ptr() for layer in own.layers]
        second = routed(**known, **{given: ids[:, 3:5]}, past_key_values=cache, use_cache=True)
        assert places == [layer.keys.data_ptr() for layer in own.layers]
    assert first.past_key_values is cache
    third = routed(**known, **{given: ids[:, 5:]}, past_key_values=cache, use_cache=True)
    found = torch.cat([first.logits, second.logits, third.logits], dim=1)
    torch.testing.assert_close(found, whole, atol=1e-5, rtol=1e-5)
    assert own.get_seq_length() == 6


@torch.no_grad()
def test_generation_copies_neither_cache(routed_over):
    routed, seen = routed_over("llama", preset("xlora")), []

    def watch(_, args, kwargs):
        layers = kwargs["past_key_values"].layers
        seen.append([layer.keys.data_ptr() for layer in layers if layer.is_initialized])

    hook = routed.model.register_forward_pre_hook(watch, with_kwargs=True)
    routed.generate([[5, 6, 7]], max_new_tokens=8, stop_ids=[])
    hook.remove()
    assert not seen[0]
    assert len(seen[1]) == 2 * routed.config.num_hidden_layers
    assert all(places == seen[1] for places in seen[1:])
