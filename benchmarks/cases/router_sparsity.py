"""What choosing a few of many experts saves."""

from __future__ import annotations

from collections.abc import Iterator

from registry import Point, Settings, case

from cases._router_side import Mixtures, random_batch, ratio


@case(
    "router_sparsity",
    description="forward of the same Llama over 64 experts, 16 rows of 64 tokens, top-2 and dense gates",
    baseline="the same router with all 64 experts",
    targets="top-2 < 1.0 of dense gates",
)
def router_sparsity(settings: Settings) -> Iterator[Point]:
    """Yield one point per rank: what choosing 2 of 64 saves."""
    name, rows, tokens, experts = ("llama-tiny", 2, 8, 4) if settings.quick else ("llama-20m", 16, 64, 64)
    batch = random_batch(name, rows, tokens)
    for rank in (8,) if settings.quick else (8, 32):
        few, every = Mixtures(name, "top2", experts, rank), Mixtures(name, "dense", experts, rank)
        yield Point(
            f"2 of {experts}, rank {rank}",
            lambda few=few: few.check(None),
            lambda few=few, every=every: ratio(
                "top-2 / dense",
                lambda: few.forward(batch),
                lambda: every.forward(batch),
                None if settings.quick else 1.0,
                settings,
            ),
        )
