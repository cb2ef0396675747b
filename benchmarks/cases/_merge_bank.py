"""Adapters for the merging cases, and the child process that measures memory: ``_merge_bank.py METHOD COUNT SHAPES``.

``SHAPES`` is ``110m`` (the whole model), ``110m-layer`` or ``8b`` (one layer each).

The child prints one JSON object, in bytes: ``adapters`` (their factors), ``peak`` (the most the process ever held),
``growth`` (how much of it came with the merge, adapters in memory before it).
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

WIDTHS_110M = {
    "self_attn.q_proj": (768, 768), "self_attn.k_proj": (768, 768), "self_attn.v_proj": (768, 768),
    "self_attn.o_proj": (768, 768), "mlp.gate_proj": (768, 2048), "mlp.up_proj": (768, 2048),
    "mlp.down_proj": (2048, 768),
}  # fmt: skip
WIDTHS_8B = {
    "self_attn.q_proj": (4096, 4096), "self_attn.k_proj": (4096, 1024), "self_attn.v_proj": (4096, 1024),
    "self_attn.o_proj": (4096, 4096), "mlp.gate_proj": (4096, 14336), "mlp.up_proj": (4096, 14336),
    "mlp.down_proj": (14336, 4096),
}  # fmt: skip


def random_adapters(
    count: int, widths: dict[str, tuple[int, int]], layers: int, *, rank: int = 16, shrink: int = 1
) -> list[Any]:
    """Return adapters with normal factors over every linear layer of a Llama; ``widths`` holds (in, out) per kind."""
    from compose.adapter import Adapter, LowRank

    adapters = []
    for number in range(count):
        generator = torch.Generator().manual_seed(1000 + number)
        targets = {}
        for layer in range(layers):
            for kind, (width, out) in widths.items():
                a = torch.randn(rank, width // shrink, generator=generator)
                b = torch.randn(out // shrink, rank, generator=generator)
                targets[f"model.layers.{layer}.{kind}"] = LowRank(a, b, 2.0)
        adapters.append(Adapter(f"adapter-{number}", "benchmark", targets))
    return adapters


def merge_all(adapters: list[Any], method: str, **options: Any) -> None:
    """Merge all targets; lines that are computed on demand are, as when they are added to a weight."""
    import compose
    from compose.merging.deltas import Streamed

    for target in compose.merge(adapters, method, **options).targets.values():
        if isinstance(target.delta, Streamed):
            for _ in target.delta.chunks(512):
                pass


def _memory(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def memory_of_merge(method: str, count: int, shapes: str) -> dict[str, int]:
    """Run the child process and return what it prints."""
    command = [sys.executable, __file__, method, str(count), shapes]
    return json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)


def _measured(method: str, count: int, shapes: str) -> dict[str, int]:
    """Memory of one merge; a small one goes first, so that imports and first calls are not counted."""
    merge_all(random_adapters(2, WIDTHS_110M, 1, rank=2, shrink=16), method)
    widths, layers = {"110m": (WIDTHS_110M, 12), "110m-layer": (WIDTHS_110M, 1), "8b": (WIDTHS_8B, 1)}[shapes]
    adapters = random_adapters(count, widths, layers)
    size = sum(4 * adapter.num_parameters for adapter in adapters)
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    before = _memory("VmRSS")
    merge_all(adapters, method)
    peak = _memory("VmHWM")
    return {"adapters": size, "peak": peak, "growth": peak - before}


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
    import run

    run.make_compose_importable()
    torch.set_num_threads(1)
    print(json.dumps(_measured(sys.argv[1], int(sys.argv[2]), sys.argv[3])))
