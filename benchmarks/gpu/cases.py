"""The table of shapes: what is run, what the goal is, and what the peers took on the same kind of machine.

Shape letters: ``T`` tokens, ``E`` adapters, ``K`` chosen per token, ``R`` rank rows of all adapters, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Literal

Routing = Literal["ids", "dense", "topk"]

REFERENCE_SOURCE = "issue 4, measured on an H200 on 2026-11-22 (torch 2.11, triton 3.6), not part of this run"


@dataclass(frozen=True)
class Case:
    """One line of the table; ``D = O = width``.

    Attributes:
        name: What ``--case`` takes.
        tokens: ``T``.
        ranks: One rank per adapter.
        routing: One adapter per token, dense gates, or the ``top`` largest of random scores.
        top: ``K`` of top-k routing.
        width: ``D``.
        goal_us: Graph time per call that is wanted, in µs.
        ratios: Baseline -> how many times our time it has to take.
        reference: Peer -> its graph time per call in µs, see ``REFERENCE_SOURCE``.
        training: Forward and backward with all gradients instead of the forward pass alone.
        runs: Tokens of one adapter lie together, as in prompts; otherwise they are shuffled.
    """

    name: str
    tokens: int
    ranks: tuple[int, ...]
    routing: Routing = "ids"
    top: int = 1
    width: int = 4096
    goal_us: float | None = None
    ratios: Mapping[str, float] = field(default_factory=dict)
    reference: Mapping[str, float] = field(default_factory=dict)
    training: bool = False
    runs: bool = False

    @property
    def adapters(self) -> int:
        """``E``."""
        return len(self.ranks)

    @property
    def uniform(self) -> bool:
        """Whether all ranks are equal."""
        return len(set(self.ranks)) == 1

    def shrunk(self) -> Case:
        """Return the same kind of case in a size that an interpreter on a CPU can run."""
        adapters = min(self.adapters, 6)
        ranks = tuple(min(rank, 16) for rank in self.ranks[:adapters])
        return replace(self, tokens=min(self.tokens, 20), ranks=ranks, width=64)


def _peers(vllm: float, triton: float, csgmv: float | None, newest: float) -> dict[str, float]:
    found = {"vLLM": vllm, "SGLang triton": triton, "SGLang v2": newest}
    return found if csgmv is None else {**found, "SGLang csgmv": csgmv}


_MIXED = tuple((4, 8, 16, 32, 64)[number % 5] for number in range(128))

CASES = (
    Case("t1", 1, (16,), goal_us=5.5, reference=_peers(7.8, 11.4, 13.0, 8.3)),
    Case("t32-e32", 32, (16,) * 32, goal_us=9, reference=_peers(22.7, 20.3, 19.7, 14.1)),
    Case("t128-e128", 128, (16,) * 128, goal_us=19, reference=_peers(61.1, 43.6, 41.6, 30.5)),
    Case("t512-e512", 512, (16,) * 512, goal_us=60, reference=_peers(316, 142, 491, 90.7)),
    Case("t128-e8", 128, (16,) * 8, goal_us=8, reference=_peers(20.5, 16.2, 30.1, 12.0)),
    Case("t128-e128-r64", 128, (64,) * 128, goal_us=50, reference=_peers(100, 127, None, 52.7)),
    Case("t32-e8-dense", 32, (16,) * 8, "dense", goal_us=7, reference={"vLLM": 52.4}),
    Case("t128-e64-top2", 128, (16,) * 64, "topk", 2, goal_us=14, reference={"vLLM": 56.9}),
    Case("t128-mixed", 128, _MIXED, ratios={"padded": 2.5}),
    Case("t16384-e8", 16384, (16,) * 8, goal_us=128, reference=_peers(208, 260, 1245, 154)),
    Case("t16384-e8-runs", 16384, (16,) * 8, goal_us=128, runs=True),
    Case("t16384-e8-dense", 16384, (16,) * 8, "dense", goal_us=135, reference={"vLLM": 13417}),
    Case("t16384-e64-top2", 16384, (16,) * 64, "topk", 2, goal_us=280, reference={"vLLM": 3583}),
    Case("train-t16384-e8", 16384, (16,) * 8, ratios={"grouped_mm": 1.5, "loop": 3}, training=True),
    Case("train-t16384-e8-dense", 16384, (16,) * 8, "dense", ratios={"stacked": 1.2, "loop": 3}, training=True),
    Case("train-t16384-e64-top2", 16384, (16,) * 64, "topk", 2, ratios={"loop": 3}, training=True),
)
