"""A random-weight Llama, a bank for it, and the two steps that are timed: one decode step and one prompt pass."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AttentionInterface, Cache, LlamaConfig, LlamaForCausalLM
from transformers.cache_utils import StaticLayer
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from compose.adapter import Adapter, LowRank

QV = ("q_proj", "v_proj")
ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
_STRENGTH = 0.2  # an adapter's update of a layer's output, relative to the layer's output


@dataclass(frozen=True)
class Size:
    """What is run.

    Attributes:
        config: Arguments of ``LlamaConfig``.
        adapters: Adapters in the bank; a decode batch has one row for each.
        rank: Of every adapter.
        context: Tokens that each row of the decode batch has in its cache.
        prompt: Rows and tokens of the prompt pass.
        dtype: Of weights and factors.
    """

    config: dict[str, Any]
    adapters: int
    rank: int
    context: int
    prompt: tuple[int, int]
    dtype: torch.dtype


LLAMA_8B = Size(
    {
        "vocab_size": 128256, "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
        "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 8192, "rope_theta": 500000.0,
    },
    adapters=32, rank=16, context=128, prompt=(8, 512), dtype=torch.bfloat16,
)  # fmt: skip
TINY = Size(
    {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64,
    },
    adapters=3, rank=4, context=5, prompt=(2, 6), dtype=torch.float32,
)  # fmt: skip


def build_model(size: Size, device: str) -> Any:
    """Return the model in evaluation mode: small random weights, made on the device, nothing downloaded.

    Its attention is torch's without a mask, which Transformers makes for names it knows: no row is padded, a prompt is
    causal, and a decode step sees the whole cache. So eager runs and graphs take the same kernels.
    """
    AttentionInterface.register("unmasked_sdpa", sdpa_attention_forward)
    torch.manual_seed(0)
    before = torch.get_default_dtype()
    torch.set_default_dtype(size.dtype)
    try:
        with torch.device(device):
            model = LlamaForCausalLM(LlamaConfig(**size.config, attn_implementation="unmasked_sdpa"))
    finally:
        torch.set_default_dtype(before)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.eval()


def make_adapters(model: Any, size: Size, targets: Sequence[str], device: str) -> list[Adapter]:
    """Return random adapters on the device, in the model's dtype, all of alpha = 2 * rank."""
    generator = torch.Generator(device).manual_seed(1)
    updates: list[dict[str, LowRank]] = [{} for _ in range(size.adapters)]
    for path, layer in model.named_modules():
        if path.split(".")[-1] not in targets:
            continue
        width, out = layer.in_features, layer.out_features
        down = torch.randn(size.adapters, size.rank, width, device=device, generator=generator) * width**-0.5
        up = torch.randn(size.adapters, out, size.rank, device=device, generator=generator)
        up *= _STRENGTH * float(layer.weight.float().std()) * width**0.5 / (2.0 * size.rank**0.5)
        for update, a_RD, b_OR in zip(updates, down.to(size.dtype), up.to(size.dtype), strict=True):
            update[path] = LowRank(a_RD, b_OR, 2.0)
    config = {"peft_type": "LORA", "r": size.rank, "lora_alpha": 2 * size.rank, "target_modules": list(targets)}
    return [Adapter(f"adapter-{number}", "benchmark", one, config) for number, one in enumerate(updates)]


class _StillLayer(StaticLayer):
    """A static cache layer whose step can be repeated: the newest token always goes to the last place."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *_: Any, **__: Any) -> Any:
        """Write one token's keys and values into the last place; return all."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys.normal_()
            self.values.normal_()
        self.keys[:, :, -1:].copy_(key_states)
        self.values[:, :, -1:].copy_(value_states)
        return self.keys, self.values


def decode_step(model: Any, size: Size, device: str) -> Callable[..., torch.Tensor]:
    """Return a function that runs one token of every row against a filled cache and returns the logits.

    The same step every time, from static tensors, so that it can be captured and replayed.
    """
    rows, length = size.adapters, size.context + 1
    torch.manual_seed(2)
    ids = torch.randint(3, size.config["vocab_size"], (rows, 1), device=device)
    positions = torch.full((rows, 1), size.context, device=device)
    cache = Cache(layers=[_StillLayer(length) for _ in range(size.config["num_hidden_layers"])])

    def step(**more: Any) -> torch.Tensor:
        found = model(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, **more)
        return found.logits

    with torch.no_grad():
        step()  # fills the cache, so that everyone attends to the same keys and values
    return step


def prompt_pass(model: Any, size: Size, device: str) -> Callable[..., torch.Tensor]:
    """Return a function that runs whole prompts without a cache and returns the last tokens' logits."""
    torch.manual_seed(3)
    ids = torch.randint(3, size.config["vocab_size"], size.prompt, device=device)
    return lambda **more: model(input_ids=ids, use_cache=False, logits_to_keep=1, **more).logits


def parameter_bytes(model: Any) -> int:
    """Bytes of the weights a step reads: all but the embedding table, of which it reads a few rows."""
    skipped = model.get_input_embeddings().weight
    return sum(one.numel() * one.element_size() for one in model.parameters() if one is not skipped)


def update_bytes(adapters: Sequence[Adapter], tokens: int) -> tuple[int, int]:
    """Return the bytes of the adapters' factors, and of the x and y rows an update of every target has to move.

    x is read; y is read and written.
    """
    factors = sum(
        one.a.numel() * one.a.element_size() + one.b.numel() * one.b.element_size()
        for adapter in adapters
        for one in adapter.targets.values()
    )
    targets = adapters[0].targets.values()
    moved = sum((one.in_features + 2 * one.out_features) * one.a.element_size() for one in targets)
    return factors, moved * tokens
