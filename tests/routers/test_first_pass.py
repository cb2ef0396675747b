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
