"""MixLoRA as published: experts are whole feed-forward parts (arXiv:2404.15159)."""

from __future__ import annotations

import re
from typing import Any

from compose.adapter import Adapter
from compose.errors import IncompatibleError
from compose.routers.experts import fresh_experts, linear_targets
from compose.routers.gates.linear import LinearGate
from compose.routers.losses.load_balance import MixtralLoadBalance
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec
from compose.routers.target_patterns import ATTENTION, FEED_FORWARD

RANK, ALPHA, EXPERTS = 16, 32.0, 8


@enter("mixlora_ffn")
def mixlora_ffn() -> Preset:
    """MixLoRA (arXiv:2404.15159): one top-2 gate per feed-forward part, whose experts are the part with own updates.

    The plain LoRA on attention is an option: `with_attention` makes the experts and that adapter, and
    ``preset("mixlora_ffn", targets="", always_on=("attention",))`` routes them.
    """
    spec = MixtureSpec(
        site="block_part", targets=FEED_FORWARD, structure="ffn", gate=LinearGate(init="normal", std=0.02),
        select=TopK(k=2), renormalise="sum", losses=(MixtralLoadBalance(coefficient=1e-3),), train="both",
        departures=(
            "the plain LoRA on attention is an option",
            "the balance loss is one value per layer; upstream averages over layers first",
            "recalled, not verified: rank 16, alpha 32",
        ),
    )  # fmt: skip
    return Preset(
        paper="2404.15159", summary="top-2 gate over whole feed-forward parts with updates of their own", spec=spec,
        experts=FreshExperts(num_experts=EXPERTS, rank=RANK, alpha=ALPHA),
        limits="feed-forward parts of Llama-like, T5, GPT-2, Phi and BERT models; others are refused",
    )  # fmt: skip


def with_attention(
    model: Any, *, num_experts: int = EXPERTS, rank: int = RANK, alpha: float = ALPHA, seed: int = 0
) -> list[Adapter]:
    """Return MixLoRA's experts and, last, one adapter ``attention`` for the attention part of every layer.

    Args:
        model: Not attached.
        num_experts: Behind the gates.
        rank: Of all.
        alpha: Scaling is ``alpha / rank``.
        seed: Of the factors' values.

    Raises:
        IncompatibleError: The model has no such linear layers.
    """
    targets = linear_targets(model)
    feed_forward = [target for target in targets if re.search(FEED_FORWARD, target)]
    attention = [target for target in targets if re.search(ATTENTION, target)]
    if not feed_forward or not attention:
        raise IncompatibleError(f"{type(model).__name__} has no linear layers of attention and feed-forward parts")
    experts = fresh_experts(model, feed_forward, num_experts=num_experts, rank=rank, alpha=alpha, seed=seed)
    shared = fresh_experts(
        model, attention, num_experts=1, rank=rank, alpha=alpha, seed=seed, names=["attention"]
    )  # fmt: skip
    return [*experts, *shared]
