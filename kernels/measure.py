"""``python -m compose.kernels.measure``: CPU time of every strategy of both ops, the table behind ``policy.py``.

One thread, float32, rank 8, ``D = O``; process time, minimum over repeats, so other jobs disturb it little.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from compose.kernels.grouped_lora import cpu as grouped
from compose.kernels.grouped_lora.plan import plan_groups
from compose.kernels.mixture_lora import cpu as mixture
from compose.kernels.stack import LoraStack

_SECONDS = 0.04  # per repeat
_REPEATS = 3


def microseconds(call: Callable[[], Any]) -> float:
    """CPU time of one call, the least of three averages."""
    call()
    start = time.process_time()
    call()
    number = max(1, int(_SECONDS / max(time.process_time() - start, 1e-6)))
    samples = []
    for _ in range(_REPEATS):
        start = time.process_time()
        for _ in range(number):
            call()
        samples.append((time.process_time() - start) / number)
    return 1e6 * min(samples)


def random_stack(adapters: int, width: int, rank: int = 8) -> LoraStack:
    """A random frozen stack of equal ranks."""
    rows = adapters * rank
    return LoraStack(torch.randn(rows, width), torch.randn(rows, width), torch.ones(adapters), (rank,) * adapters)


def grouped_lines() -> Iterator[str]:
    """One line per shape of ``grouped_lora``: every strategy and the policy's choice."""
    for width in (256, 512):
        stack = random_stack(64, width)
        for batch, tokens in ((32, 1), (32, 64), (64, 1), (1024, 1), (64, 16)):
            for used in (2, 4, 8, 32):
                plan = plan_groups(torch.randint(0, used, (batch,)))
                x, base = torch.randn(batch, tokens, width), torch.randn(batch, tokens, width)
                figures = [
                    f"{strategy} {_grouped(x, stack, base, plan, strategy):.0f}"
                    for strategy in ("rows", "stacked", "segments")
                ]
                chosen = grouped.choose(stack, plan, batch * tokens, cached=True)
                yield f"grouped D={width} {batch}x{tokens} U={used}: {', '.join(figures)}; chosen {chosen}"


def mixture_lines() -> Iterator[str]:
    """One line per shape of ``mixture_lora`` with sparse gates: every strategy and the policy's choice."""
    for adapters in (8, 32, 200):
        stack = random_stack(adapters, 256)
        for batch, tokens, lead in ((32, 1, (32, 1)), (32, 64, (32, 1)), (8, 64, (8, 64))):
            gates, indices = torch.rand(*lead, 2), torch.randint(0, adapters, (*lead, 2))
            x, base = torch.randn(batch, tokens, 256), torch.randn(batch, tokens, 256)
            strategies = ("gather", "scatter", "pairs") if lead == (batch, tokens) else ("gather", "scatter")
            figures = [f"{name} {_mixture(x, stack, gates, indices, base, name):.0f}" for name in strategies]
            chosen = mixture.choose_sparse(stack, gates, batch * tokens)
            yield f"mixture E={adapters} {batch}x{tokens} gates {(*lead, 2)}: {', '.join(figures)}; chosen {chosen}"


def _grouped(x: torch.Tensor, stack: LoraStack, base: torch.Tensor, plan: Any, strategy: Any) -> float:
    return microseconds(lambda: grouped.forward(x, stack, plan.ids, base=base, plan=plan, strategy=strategy))


def _mixture(
    x: torch.Tensor, stack: LoraStack, gates: torch.Tensor, indices: torch.Tensor, base: torch.Tensor, strategy: Any
) -> float:
    return microseconds(
        lambda: mixture.forward(x, stack, gates, indices, base=base, combine="outputs", strategy=strategy)
    )


def main() -> None:
    """Print all lines, in microseconds."""
    torch.set_num_threads(1)
    torch.manual_seed(0)
    with torch.no_grad():
        for lines in (grouped_lines(), mixture_lines()):
            for line in lines:
                sys.stdout.write(line + "\n")
                sys.stdout.flush()


if __name__ == "__main__":
    main()
