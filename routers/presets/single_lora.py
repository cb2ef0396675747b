"""One LoRA without a router: the baseline every mixture is compared with, and Align-LoRA."""

from __future__ import annotations

from functools import partial

from compose.routers.losses.task_alignment import KlAlign, MmdAlign
from compose.routers.presets.registry import FreshExperts, Preset, enter
from compose.routers.spec import MixtureSpec

RANKS = (4, 8, 16, 32, 64, 128)


def none_r(rank: int) -> Preset:
    """One LoRA of any rank; alpha is twice the rank. Registered as ``none_r4`` ... ``none_r128``.

    A mixture is compared with the one whose rank is the sum of its experts' (Align-LoRA, arXiv:2508.05078).
    """
    spec = MixtureSpec(preset=f"none_r{rank}", scope="static", gate_input="none", gate=None, train="experts")
    return Preset(
        paper="", summary=f"baseline: one LoRA of rank {rank}, no router", spec=spec,
        experts=FreshExperts(num_experts=1, rank=rank, alpha=2.0 * rank),
    )  # fmt: skip


for _rank in RANKS:
    enter(f"none_r{_rank}")(partial(none_r, _rank))


@enter("align_lora")
def align_lora() -> Preset:
    """Align-LoRA (arXiv:2508.05078): one LoRA whose ``A x`` is drawn together over tasks by their MMD.

    Batches should hold equally many rows of each task (``sampling="balanced"``).
    """
    spec = MixtureSpec(
        scope="static", gate_input="none", gate=None, train="experts", losses=(MmdAlign(coefficient=0.2),),
        departures=("recalled, not verified: rank 64 (the paper compares high ranks)",),
    )  # fmt: skip
    return Preset(
        paper="2508.05078", summary="one LoRA, tasks aligned by MMD of A x", spec=spec, needs=("tasks",),
        experts=FreshExperts(num_experts=1, rank=64, alpha=128.0),
    )  # fmt: skip


@enter("align_lora_kl")
def align_lora_kl() -> Preset:
    """Align-LoRA (arXiv:2508.05078) with the KL divergence between tasks in place of the MMD."""
    spec = MixtureSpec(
        scope="static", gate_input="none", gate=None, train="experts", losses=(KlAlign(coefficient=0.2),),
        departures=("recalled, not verified: rank 64 (the paper compares high ranks)",),
    )  # fmt: skip
    return Preset(
        paper="2508.05078", summary="one LoRA, tasks aligned by KL divergence of A x", spec=spec, needs=("tasks",),
        experts=FreshExperts(num_experts=1, rank=64, alpha=128.0),
    )  # fmt: skip
