"""A bank that does not fit: ``python benchmarks/gpu/paging.py [--device cuda] [--out FILE]``.

2,000 random adapters of rank 16 on q_proj and v_proj of a random-weight Llama of 8B shapes, in pinned host memory.
Batches of 32 rows ask for adapters by Zipf's law with exponent 1.1 and decode some tokens each from a replayed CUDA
graph, with a fixed number of slots on the device: loading while the batch waits, or loading the next batch's adapters
while this one decodes. Beside them in the same run: all adapters in slots, and the base model alone. Every mode has to
give the all-resident logits for the last batch; exit code 1 otherwise.
``--smoke`` runs everything but the clock in a tiny size on a CPU.
"""

from __future__ import annotations

import argparse
import gc
import os
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

_LIMIT = {"bfloat16": 2e-2, "float32": 1e-4}  # relative Frobenius norm of logits, over all layers


@dataclass(frozen=True)
class Load:
    """What is asked of the model.

    Attributes:
        adapters: Adapters in the bank.
        rows: Rows of a batch.
        steps: Tokens that every batch decodes.
        warm: Batches whose adapters are brought in before the clock starts.
        batches: Batches that are timed.
        exponent: Of Zipf's law.
    """

    adapters: int
    rows: int
    steps: int
    warm: int
    batches: int
    exponent: float


def main(arguments: list[str] | None = None) -> int:
    """Run all modes; returns 1 when one of them gave other logits than all adapters in slots, else 0."""
    options = _parser().parse_args(arguments)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _find_benchmarks()
    from gpu.ops import make_importable, write_record

    make_importable()
    import torch
    from run import describe_environment

    device = "cpu" if options.smoke else options.device
    environment = describe_environment(device, torch.get_num_threads())
    if options.commit:
        environment["commit"] = options.commit
    print("  ".join(f"{key} {value}" for key, value in environment.items()))
    load = Load(options.adapters, 32, options.steps, 60, options.batches, 1.1)
    slots = options.slots or [64, 256, 512]
    if options.smoke:
        load, slots = Load(20, 3, 2, 4, 4, 1.1), [4, 10]
    backend = "cpu" if options.smoke else options.backend
    red = False
    with torch.no_grad():
        for record in run_modes(load, slots, device, backend, smoke=options.smoke):
            print(format_record(record), flush=True)
            red |= record.get("gate") == "red"
            if options.out:
                write_record({**record, "backend": backend, "smoke": options.smoke}, environment, Path(options.out))
    return 1 if red else 0


def run_modes(load: Load, slots: list[int], device: str, backend: str, *, smoke: bool) -> Iterator[dict[str, Any]]:
    """Yield one record per mode: set-up, base model, all adapters in slots, then each number of slots in both ways."""
    from gpu import llama_model
    from gpu.paging_bank import page_bytes, random_bank

    size = replace(llama_model.TINY if smoke else llama_model.LLAMA_8B, adapters=load.rows)
    began = time.perf_counter()
    model = llama_model.build_model(size, device)
    built = time.perf_counter()
    bank = random_bank(model, llama_model.QV, load.adapters, size.rank, device)
    _wait(device)
    yield {
        "mode": "set-up", "adapters": load.adapters, "rank": size.rank, "rows": load.rows, "steps": load.steps,
        "zipf": load.exponent, "bytes_per_adapter": page_bytes(bank), "model_s": built - began,
        "bank_s": time.perf_counter() - built,
    }  # fmt: skip
    batches = draw_batches(bank.names, load)
    setting = _Setting(model, bank, load, size, batches, device, backend)
    base = _base(setting)
    yield {"mode": "base", "tokens_per_s": base}
    whole, wanted = _run(setting, load.adapters, ahead=False, wanted=None)
    yield {**whole, "mode": "resident", "vs_base": whole["tokens_per_s"] / base}
    for count in slots:
        for ahead in (False, True):
            record, _ = _run(setting, count, ahead=ahead, wanted=wanted)
            ratios = {"vs_base": record["tokens_per_s"] / base}
            ratios["vs_resident"] = record["tokens_per_s"] / whole["tokens_per_s"]
            yield {**record, "mode": "prefetch" if ahead else "wait", **ratios}


def draw_batches(names: tuple[str, ...], load: Load) -> list[list[str]]:
    """Return warm-up and timed batches: rows drawn independently, the n-th adapter with weight ``n ** -exponent``."""
    import torch

    generator = torch.Generator().manual_seed(5)
    weights = torch.arange(1, len(names) + 1, dtype=torch.float64) ** -load.exponent
    order = torch.randperm(len(names), generator=generator)
    count = (load.warm + load.batches) * load.rows
    drawn = order[torch.multinomial(weights, count, replacement=True, generator=generator)].tolist()
    return [[names[number] for number in drawn[at : at + load.rows]] for at in range(0, count, load.rows)]


def format_record(record: dict[str, Any]) -> str:
    """One line per mode."""
    if record["mode"] == "set-up":
        head = (
            f"{record['adapters']} adapters of rank {record['rank']}, {record['bytes_per_adapter'] / 1e6:.1f} MB each"
        )
        return f"{head}; model {record['model_s']:.1f} s, bank {record['bank_s']:.1f} s"
    line = f"{record['mode']:<9} {record.get('slots', ''):>5} {record['tokens_per_s']:>9.0f} tokens/s"
    if record["mode"] == "base":
        return line
    line += f"  {record['vs_base']:.3f} of base"
    if "vs_resident" in record:
        line += (
            f"  {record['vs_resident']:.3f} of resident  hits {record['hit_rate']:.3f}  "
            f"loads {record['loads']}  {record['bytes'] / 1e9:.2f} GB  logits off by {record['error']:.1e}"
        )
    return line + ("  RED" if record.get("gate") == "red" else "")


@dataclass(frozen=True)
class _Setting:
    """What every mode shares."""

    model: Any
    bank: Any
    load: Load
    size: Any
    batches: list[list[str]]
    device: str
    backend: str


class _Decoder:
    """One decode step, captured once; a batch writes its slots' numbers into the tensor that the graph reads."""

    def __init__(self, step: Callable[[], Any], device: str, handle: Any = None) -> None:
        from gpu.graph_timing import captured

        self._handle = handle
        self._first = None if handle is None else handle.placed
        self._copies = device.startswith("cuda")
        self._logits: list[Any] = []
        self._replay = captured([lambda: self._logits.__setitem__(slice(None), [step()])], device)

    def run(self, rows: list[str], steps: int) -> Any:
        """Decode ``steps`` tokens of every row; return the logits of the last."""
        if self._handle is not None:
            self._handle.set(rows)
            if self._copies and self._handle.placed is not self._first:
                self._first.ids.copy_(self._handle.placed.ids)
        for _ in range(steps):
            self._replay()
        return self._logits[0]


def _base(setting: _Setting) -> float:
    """Tokens per second of the model without adapters."""
    from gpu.llama_model import decode_step

    decoder = _Decoder(decode_step(setting.model, setting.size, setting.device), setting.device)
    timed = setting.batches[setting.load.warm :]
    decoder.run(timed[0], setting.load.steps)
    _wait(setting.device)
    began = time.perf_counter()
    for rows in timed:
        decoder.run(rows, setting.load.steps)
    _wait(setting.device)
    return _tokens(setting) / (time.perf_counter() - began)


def _run(setting: _Setting, slots: int, *, ahead: bool, wanted: Any) -> tuple[dict[str, Any], Any]:
    """Return the record of one number of slots, and the logits of the last batch to compare with.

    Args:
        setting: What every mode shares.
        slots: How many.
        ahead: Whether the next batch's adapters are brought in while a batch decodes.
        wanted: Logits of the last batch; ``None``: take them here, from a call outside the graph.
    """
    import torch

    from compose.engine.paging import attach_paged
    from gpu.llama_model import decode_step
    from gpu.paging_bank import fill_host

    warm, timed = setting.batches[: setting.load.warm], setting.batches[setting.load.warm :]
    with attach_paged(setting.model, setting.bank, slots=slots, host_bytes=1 << 40, backend=setting.backend) as handle:
        fill_host(handle, setting.bank)
        if slots >= len(setting.bank):
            names, rows_each = setting.bank.names, setting.load.rows
            for at in range(0, len(names), rows_each):
                handle.set(names[at : at + rows_each])
        for rows in warm:
            handle.set(rows)
        step = decode_step(setting.model, setting.size, setting.device)
        decoder = _Decoder(step, setting.device, handle)
        _wait(setting.device)
        handle.reset_counters()
        began = time.perf_counter()
        for number, rows in enumerate(timed):
            logits = decoder.run(rows, setting.load.steps)
            if ahead and number + 1 < len(timed):
                handle.prefetch(timed[number + 1])
        _wait(setting.device)
        seconds = time.perf_counter() - began
        counted, logits = handle.reset_counters(), logits.clone()
        wanted = step().clone() if wanted is None else wanted
    error = float((logits.float() - wanted.float()).norm() / wanted.float().norm())
    record = {
        "slots": slots, "tokens_per_s": _tokens(setting) / seconds, "seconds": seconds, "hit_rate": counted.hit_rate,
        **{name: getattr(counted, name) for name in ("hits", "prefetched", "misses", "evictions", "loads", "bytes")},
        "load_s": counted.seconds, "error": error, "exact": torch.equal(logits, wanted),
        "gate": "ok" if error <= _LIMIT[str(wanted.dtype).removeprefix("torch.")] else "red",
    }  # fmt: skip
    if setting.device.startswith("cuda"):
        del handle, decoder, step, logits
        gc.collect()
        torch.cuda.empty_cache()
    return record, wanted


def _tokens(setting: _Setting) -> int:
    return setting.load.rows * setting.load.steps * setting.load.batches


def _wait(device: str) -> None:
    import torch

    if device.startswith("cuda"):
        torch.cuda.synchronize()


def _find_benchmarks() -> None:
    """Put ``benchmarks/`` on the path, where the package ``gpu`` lies."""
    folder = str(Path(__file__).resolve().parents[1])
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--slots", action="append", type=int, help="numbers of slots; default 64, 256 and 512")
    parser.add_argument("--adapters", type=int, default=2000, help="adapters in the bank (default: 2000)")
    parser.add_argument("--batches", type=int, default=24, help="timed batches of each mode (default: 24)")
    parser.add_argument("--steps", type=int, default=32, help="tokens that every batch decodes (default: 32)")
    parser.add_argument("--smoke", action="store_true", help="a tiny float32 model on a CPU: a check, no measurement")
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--backend", default="triton", help="backend of our ops (default: triton)")
    parser.add_argument("--commit", default=None, help="what to record where git cannot tell")
    parser.add_argument("--out", default=None, help="file for JSON lines, appended to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
