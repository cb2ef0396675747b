"""Time our ops on the GPU: ``python benchmarks/gpu/ops.py [--case NAME ...] [--quick] [--device cuda] [--out FILE]``.

Every case's correctness gate runs first; on a red gate no time is measured and the exit code is 1. A missed goal is
reported, not an error. ``--smoke`` runs everything but the clock in tiny shapes on a CPU.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

BENCHMARKS = Path(__file__).resolve().parents[1]
COLUMNS = ("stream", "null", "ours", "ours_plan", "stacked", "gather_bmm", "grouped_mm", "loop", "padded")


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen cases; returns 1 when a gate was red or ours could not run, else 0."""
    options = _parser().parse_args(arguments)
    if options.smoke:
        os.environ["TRITON_INTERPRET"] = "1"  # read when a kernel's module is imported
    make_importable()
    import torch
    from run import describe_environment

    from gpu.cases import CASES
    from gpu.measure import Settings, run_case

    known = {case.name: case for case in CASES}
    unknown = sorted(set(options.case) - known.keys())
    if unknown:
        print(f"unknown cases {unknown}; known: {', '.join(known)}", file=sys.stderr)
        return 2
    chosen = [known[name] for name in options.case or known]
    settings = Settings(options.device, torch.bfloat16, options.backend, 5 if options.quick else 20, options.quick)
    if options.smoke:
        chosen = [case.shrunk() for case in chosen]
        settings = Settings("cpu", torch.float32, options.backend, 1)
    environment = {**describe_environment(settings.device, torch.get_num_threads()), "triton": triton_version()}
    if options.commit:
        environment["commit"] = options.commit
    print("  ".join(f"{key} {value}" for key, value in environment.items()))
    print(heading())
    records = []
    for case in chosen:
        started = time.perf_counter()
        record = {**run_case(case, settings), "backend": settings.backend}
        record["took_s"] = round(time.perf_counter() - started, 2)
        print(format_record(record), flush=True)
        records.append(record)
        if options.out:
            write_record(record, environment, Path(options.out))
        if settings.device.startswith("cuda"):
            torch.cuda.empty_cache()
    return 1 if any(record["status"] != "ok" for record in records) else 0


def make_importable() -> None:
    """Put ``benchmarks/`` on the path, as the first entry, in place of this file's folder; and find ``compose``."""
    here = Path(__file__).resolve().parent
    sys.path[:] = [entry for entry in sys.path if Path(entry or Path.cwd()).resolve() != here]
    if str(BENCHMARKS) not in sys.path:
        sys.path.insert(0, str(BENCHMARKS))
    from run import make_compose_importable

    make_compose_importable()


def triton_version() -> str:
    """Of the installed Triton."""
    import triton

    return triton.__version__


def heading() -> str:
    """The table's first line; all times are microseconds per call."""
    return f"\n{'case (us, graph | eager below)':<30}" + "".join(f"{name:>11}" for name in COLUMNS) + "  goals"


def format_record(record: dict[str, Any]) -> str:
    """Lines of the table: graph times with goals, eager times, reference figures, and what could not run."""
    if record["status"] != "ok":
        return f"{record['case']:<30} {record['status'].upper()}: {record['reason']}"
    goals = "  ".join(_goal(check) for check in record["checks"])
    lines = [f"{record['case']:<30}" + "".join(_cell(record["graph_us"], name) for name in COLUMNS) + f"  {goals}"]
    lines.append(f"{'  eager':<30}" + "".join(_cell(record["eager_us"], name) for name in COLUMNS))
    peers = ", ".join(f"{name} {value:g}" for name, value in record["reference_us"].items())
    notes = f"error {record['error']:.1e}, {record['copies']} copies, {record['took_s']} s"
    lines.append(f"    {notes}" + (f"; reference figures: {peers}" if peers else ""))
    lines += [f"    no {name}: {reason}" for name, reason in record["missing"].items()]
    return "\n".join(lines)


def _cell(times: dict[str, dict[str, float]], name: str) -> str:
    return f"{times[name]['median']:>11.1f}" if name in times else f"{'-':>11}"


def _goal(check: dict[str, Any]) -> str:
    if check["met"] is None:
        return f"({check['name']}: {check['value']:.2f})"
    return f"{check['name']} {check['value']:.2f} goal {check['target']:g} {'met' if check['met'] else 'MISSED'}"


def write_record(record: dict[str, Any], environment: dict[str, Any], path: Path) -> None:
    """Append one JSON line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({"environment": environment, **record}) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], help="run this case only; may be given several times")
    parser.add_argument("--quick", action="store_true", help="5 replays, and of the baselines the stacked one only")
    parser.add_argument("--smoke", action="store_true", help="tiny float32 shapes on a CPU: a check, no measurement")
    parser.add_argument("--device", default="cuda", help="torch device (default: cuda)")
    parser.add_argument("--backend", default="triton", help="backend of our ops (default: triton)")
    parser.add_argument("--commit", default=None, help="what to record where git cannot tell")
    parser.add_argument("--out", default=None, help="file for JSON lines, appended to")
    return parser


if __name__ == "__main__":
    sys.exit(main())
