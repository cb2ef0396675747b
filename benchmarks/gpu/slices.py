"""Several outputs of one input by one call (`SlicedStack`) against a call per output, in the same run.

Widths are those of Llama-3-8B: q, k and v read 4096 and write 4096, 1024 and 1024; gate and up write 14336 each.
Run ``python benchmarks/gpu/slices.py [--smoke] [--device cuda] [--out FILE]``. Gate: fused, in new memory and in
place, against float64 of the same rounded inputs.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))

_LIMIT = 4e-3  # bfloat16, relative Frobenius norm


@dataclass(frozen=True)
class Case:
    """One line: ``tokens`` rows of a decode step (one adapter each), or one example with an id per token.

    Attributes:
        name: What is printed.
        tokens: Rows or tokens.
        adapters: How many.
        widths: Of the outputs.
        example: The tokens are one example's.
        rank: Of every adapter in every slice.
        width: Of the input.
    """

    name: str
    tokens: int
    adapters: int
    widths: tuple[int, ...]
    example: bool = False
    rank: int = 16
    width: int = 4096


_QKV, _GATE_UP = (4096, 1024, 1024), (14336, 14336)
CASES = tuple(
    Case(f"{name}-{shape}", tokens, adapters, widths, example)
    for name, widths in (("qkv", _QKV), ("gate-up", _GATE_UP))
    for shape, tokens, adapters, example in (
        ("t1", 1, 1, False),
        ("t32-e32", 32, 32, False),
        ("t128-e8", 128, 8, False),
        ("t128-e128", 128, 128, False),
        ("t4096-e8", 4096, 8, True),
        ("t4096-e64", 4096, 64, True),
    )
)


def run_case(case: Case, device: str, backend: str) -> dict[str, Any]:
    """Gate a case and return its times in µs: fused and separate, forward from a graph and by the host's clock."""
    import torch

    from gpu.graph_timing import cycled, eager_time, graph_time

    cuda = device.startswith("cuda")
    dtype = torch.bfloat16 if cuda else torch.float32
    first = _operands(case, device, dtype, 0)
    error = _gate(first, backend)
    moved = _bytes(case)
    cache = torch.cuda.get_device_properties(device).L2_cache_size if cuda else 1
    copies = [
        first,
        *(_operands(case, device, dtype, seed) for seed in range(1, max(2, min(256, 2 * cache // moved + 2)))),
    ]
    count = (64 if moved < 64 << 20 else 16) if cuda else 2
    found: dict[str, Any] = {"case": case.name, "error": error, "bytes": moved, "copies": len(copies)}
    for kind in ("fused", "separate"):
        calls = cycled([getattr(one, kind)(backend) for one in copies], count)
        found[f"{kind}_us"] = round(graph_time(calls, device).median * 1e6, 2)
        found[f"{kind}_eager_us"] = round(eager_time(calls, device).median * 1e6, 1)
    if cuda:
        from gpu import yardsticks

        written = case.tokens * sum(case.widths) * 2
        times = [
            graph_time(
                cycled(yardsticks.stream_calls(moved, written, len(copies), device, shape), count), device
            ).median
            for shape in yardsticks.STREAM_SHAPES
        ]
        found["stream_us"] = round(min(times) * 1e6, 2)
    return found


@dataclass(frozen=True)
class _Operands:
    """Operands of both ways; ``base`` of all slices side by side, and one per slice."""

    x: Any
    stacks: tuple[Any, ...]
    sliced: Any
    ids: Any
    base: Any
    bases: tuple[Any, ...]

    def fused(self, backend: str) -> Any:
        from compose.kernels.grouped_lora.op import grouped_lora

        return lambda: grouped_lora(self.x, self.sliced, self.ids, base=self.base, reuse_base=True, backend=backend)

    def separate(self, backend: str) -> Any:
        from compose.kernels.grouped_lora.op import grouped_lora

        return lambda: [
            grouped_lora(self.x, stack, self.ids, base=base, reuse_base=True, backend=backend)
            for stack, base in zip(self.stacks, self.bases, strict=True)
        ]


def _operands(case: Case, device: str, dtype: Any, seed: int) -> _Operands:
    import torch

    from compose.kernels.slices import SlicedStack
    from compose.kernels.stack import LoraStack

    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int, scale: float = 1.0) -> Any:
        return (torch.randn(shape, device=device, generator=generator) * scale).to(dtype)

    rows, scaling = case.adapters * case.rank, torch.full((case.adapters,), 2.0, device=device)
    stacks = tuple(
        LoraStack(normal(rows, case.width, scale=case.width**-0.5), normal(rows, out, scale=0.5 * case.rank**-0.5),
                  scaling.clone(), (case.rank,) * case.adapters)
        for out in case.widths
    )  # fmt: skip
    lead = (1, case.tokens) if case.example else (case.tokens,)
    order = torch.randperm(case.tokens, device=device, generator=generator)
    base = normal(*lead, sum(case.widths))
    bases = tuple(part.contiguous() for part in base.split(case.widths, -1))
    ids = (order % case.adapters).view(lead)
    return _Operands(normal(*lead, case.width), stacks, SlicedStack.of(stacks), ids, base, bases)


def _gate(one: _Operands, backend: str) -> float:
    """The fused result's relative error; raises where it is too large or in place differs from new memory."""
    import torch

    from compose.kernels.grouped_lora.op import grouped_lora

    x, ids = one.x.double().flatten(0, -2), one.ids.flatten()
    wanted = one.base.double().flatten(0, -2).clone()
    for adapter in ids.unique().tolist():
        own = (ids == adapter).nonzero().flatten()
        parts = [
            2.0 * (x[own] @ stack.factors(adapter)[0].double().T @ stack.factors(adapter)[1].double())
            for stack in one.stacks
        ]
        wanted[own] += torch.cat(parts, -1)
    y = grouped_lora(one.x, one.sliced, one.ids, base=one.base, backend=backend)
    error = float((y.double().flatten(0, -2) - wanted).norm() / wanted.norm())
    saved = one.base.clone()
    replaced = one.fused(backend)()
    same = torch.equal(replaced, y)
    one.base.copy_(saved)
    if not error <= _LIMIT or not same:
        raise AssertionError(f"fused slices are {error:.1e} of the norm away from float64; in place the same: {same}")
    return error


def _bytes(case: Case) -> int:
    """What has to be read: x, base, and the factors of adapters that occur."""
    live = min(case.adapters, case.tokens)
    factors = live * case.rank * (case.width * len(case.widths) + sum(case.widths))
    return 2 * (factors + case.tokens * (case.width + sum(case.widths)))


def main(arguments: list[str] | None = None) -> int:
    """Run the cases; returns 1 when a gate was red."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--smoke", action="store_true", help="tiny float32 shapes on a CPU: a check, no measurement")
    parser.add_argument("--commit", default=None, help="what to record where git cannot tell")
    parser.add_argument("--out", default=None, help="file for JSON lines, appended to")
    options = parser.parse_args(arguments)
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
    from ops import make_importable

    make_importable()
    import torch
    from run import describe_environment

    from gpu.ops import triton_version, write_record

    device, backend = ("cpu", "cpu") if options.smoke else (options.device, "triton")
    environment = {**describe_environment(device, torch.get_num_threads()), "triton": triton_version()}
    if options.commit:
        environment["commit"] = options.commit
    print("  ".join(f"{key} {value}" for key, value in environment.items()))
    columns = ("stream_us", "fused_us", "separate_us", "fused_eager_us", "separate_eager_us")
    print(f"{'case':<20}" + "".join(f"{name:>19}" for name in columns))
    red = False
    for case in CASES:
        small = replace(case, tokens=min(case.tokens, 20), adapters=min(case.adapters, 3), width=64,
                        widths=tuple(one // 64 for one in case.widths), rank=4)  # fmt: skip
        try:
            record = {**run_case(small if options.smoke else case, device, backend), "status": "ok"}
        except AssertionError as error:
            record, red = {"case": case.name, "status": "red", "reason": str(error)}, True
        print(
            f"{case.name:<20}" + "".join(f"{record.get(name, '-'):>19}" for name in columns) + record.get("reason", "")
        )
        if options.out:
            write_record(record, environment, Path(options.out))
        if device.startswith("cuda"):
            torch.cuda.empty_cache()
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
