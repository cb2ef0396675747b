"""Llama-3-8B shapes, end to end: ``python benchmarks/gpu/llama.py [--targets qv|all] [--device cuda] [--out FILE]``.

Decode of a batch with a different adapter in every row, and a prompt pass with a different adapter in every row: the
base model alone, ours, and PEFT's ``adapter_names=``. Random weights, nothing is downloaded. Ours has to give PEFT's
logits before it is timed; exit code 1 otherwise. ``--smoke`` runs everything but the clock in a tiny size on a CPU.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path
from typing import Any


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen targets; returns 1 when our logits were not PEFT's or something could not run, else 0."""
    options = _parser().parse_args(arguments)
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    _find_benchmarks()
    from gpu.ops import make_importable, triton_version, write_record

    make_importable()
    import torch
    from run import describe_environment

    from gpu import llama_measure, llama_model

    size, device = (llama_model.TINY, "cpu") if options.smoke else (llama_model.LLAMA_8B, options.device)
    environment = {**describe_environment(device, torch.get_num_threads()), "triton": triton_version()}
    if options.commit:
        environment["commit"] = options.commit
    print("  ".join(f"{key} {value}" for key, value in environment.items()))
    targets = {"qv": llama_model.QV, "all": llama_model.ALL_LINEAR}
    records = []
    with torch.no_grad():
        started = time.perf_counter()
        model = llama_model.build_model(size, device)
        steps = llama_measure.STEPS.items()
        base = {step: llama_measure.time_step(make(model, size, device), device) for step, make in steps}
        bandwidth = llama_measure.measured_bandwidth(device)
        print(f"model built and base timed in {time.perf_counter() - started:.1f} s", flush=True)
        setting = llama_measure.Setting(model, size, device, options.backend, not options.no_peft, bandwidth)
        for name in options.targets or targets:
            for record in llama_measure.run_targets(name, targets[name], setting, base):
                print(format_record(record), flush=True)
                records.append({**record, "backend": options.backend, "smoke": options.smoke})
                if options.out:
                    write_record(records[-1], environment, Path(options.out))
    return 1 if any(record["status"] != "ok" for record in records) else 0


def format_record(record: dict[str, Any]) -> str:
    """Lines of one step: times in milliseconds, then ratios with their goals."""
    head = f"\n{record['step']}, targets {record['targets']}, {record['adapters']} adapters of rank {record['rank']}"
    if record["status"] != "ok":
        return f"{head}: {record['status'].upper()}: {record['reason']}"
    lines = [f"{head}, batch {' x '.join(map(str, record['batch']))} ({record['took_s']} s in all)"]
    for kind in ("graph", "eager"):
        times = record[f"{kind}_ms"].items()
        lines.append(f"  {kind} ms: " + ", ".join(f"{name} {timing['median']:.3f}" for name, timing in times))
    for check in record["checks"]:
        verdict = {None: "", True: f"goal {check['target']}  met", False: f"goal {check['target']}  MISSED"}[
            check["met"]
        ]
        lines.append(f"  {check['name']:<62} {check['value']:8.3f}x  {verdict}".rstrip())
    gate = "not run" if record["error"] is None else f"{record['error']:.1e} of the adapters' change away from PEFT"
    return "\n".join([*lines, f"  gate: {gate}"])


def _find_benchmarks() -> None:
    """Put ``benchmarks/`` on the path, where the package ``gpu`` lies."""
    folder = str(Path(__file__).resolve().parents[1])
    if folder not in sys.path:
        sys.path.insert(0, folder)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--targets", action="append", choices=("qv", "all"), help="adapters on these only; default both"
    )
    parser.add_argument(
        "--no-peft", action="store_true", help="neither gate nor baseline: ours and the base model only"
    )
    parser.add_argument("--smoke", action="store_true", help="a tiny float32 model on a CPU: a check, no measurement")
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--backend", default="triton", help="backend of our ops (default: triton)")
    parser.add_argument("--commit", default=None, help="what to record where git cannot tell")
    parser.add_argument("--out", default=None, help="file for JSON lines, appended to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
