"""Run benchmark cases: ``python benchmarks/run.py [--case NAME ...] [--quick] [--device cuda] [--out DIR] [--list]``.

Every point's correctness gate runs first; on a red gate no time is measured and the exit code is 1. Results are
printed and, with ``--out``, written as JSON lines.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
CHECKOUT = HERE.parent


def make_compose_importable() -> None:
    """Where the package is not installed, import it through a link: the checkout itself stays off ``sys.path``.

    On the path it would let ``import kernels`` find our folder instead of Hugging Face's.
    """
    sys.path[:] = [entry for entry in sys.path if Path(entry or Path.cwd()).resolve() != CHECKOUT]
    if str(HERE) not in sys.path:
        sys.path.insert(0, str(HERE))
    if importlib.util.find_spec("compose") is None:
        link = Path(tempfile.mkdtemp(prefix="compose-link-")) / "compose"
        link.symlink_to(CHECKOUT / "compose", target_is_directory=True)
        sys.path.append(str(link.parent))


def main(arguments: list[str] | None = None) -> int:
    """Run the chosen cases; returns 1 when a gate was red or a case raised, else 0 (a missed target is reported)."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    make_compose_importable()
    import torch
    import transformers
    from registry import Settings, load_cases

    transformers.logging.disable_progress_bar()
    cases = load_cases()
    options = _parser().parse_args(arguments)
    if options.list:
        for case in cases.values():
            print(f"{case.name:<24} {case.description}\n{'':<24} baseline: {case.baseline}; target: {case.targets}")
        return 0
    unknown = sorted(set(options.case) - cases.keys())
    if unknown:
        print(f"unknown cases {unknown}; known: {', '.join(cases)}", file=sys.stderr)
        return 2
    torch.set_num_threads(options.threads)
    settings = Settings(quick=options.quick, full=options.full, device=options.device, rounds=options.rounds)
    environment = describe_environment(settings.device, options.threads)
    print("  ".join(f"{key} {value}" for key, value in environment.items()))
    records: list[dict[str, Any]] = []
    for name in options.case or cases:
        records += run_case(cases[name], settings)
    if options.out:
        write_records(records, environment, Path(options.out))
    return 1 if any(record["status"] == "failed" for record in records) else 0


def run_case(case: Any, settings: Any) -> list[dict[str, Any]]:
    """Run one case, print its table, and return one record per point."""
    print(f"\n{case.name}: {case.description}\n  baseline: {case.baseline}; target: {case.targets}")
    head = {"case": case.name, "quick": settings.quick}
    reason = case.reason_to_skip(settings)
    if reason is not None:
        print(f"  skipped: {reason}")
        return [{**head, "point": "", "status": "skipped", "reason": reason}]
    records = []
    for point in case.points(settings):
        record = {**head, "point": point.label, **run_point(point)}
        print(format_record(record))
        records.append(record)
    return records


def run_point(point: Any) -> dict[str, Any]:
    """Gate one point, and time it only when the gate is green."""
    started = time.time()
    try:
        point.gate()
    except AssertionError as error:
        return {"status": "failed", "reason": f"gate is red: {str(error).strip()}"}
    except Exception as error:  # noqa: BLE001 - recorded, so that the other cases still run
        return {"status": "failed", "reason": f"{type(error).__name__}: {error}"}
    measured = point.measure()
    timings = {
        name: {"best": timing.best, "median": timing.median, "spread": timing.spread, "rounds": len(timing.samples)}
        for name, timing in (("ours", measured.ours), ("baseline", measured.baseline))
        if timing is not None
    }
    checks = [{**asdict(check), "met": check.met} for check in measured.checks]
    took = round(time.time() - started, 2)
    cells = {"cells": measured.cells} if measured.cells else {}
    return {"status": "ok", "checks": checks, **timings, "note": measured.note, **cells, "took_s": took}


def format_record(record: dict[str, Any]) -> str:
    """One block of lines for the terminal."""
    label = f"  {record['point']:<44}"
    if record["status"] != "ok":
        return f"{label} {record['status'].upper()}: {record['reason']}"
    if "ours" in record:
        label += f" ours {_time(record['ours'])}"
    if "baseline" in record:
        label += f"  baseline {_time(record['baseline'])}"
    lines = [label]
    for check in record["checks"]:
        target = "" if check["met"] is None else f"  target {check['relation']} {check['target']:g}"
        verdict = {None: "", True: "  met", False: "  MISSED"}[check["met"]]
        lines.append(f"      {check['name']:<46} {check['value']:.4g} {check['unit']}{target}{verdict}")
    if record["note"]:
        lines.append(f"      {record['note']}")
    return "\n".join(lines)


def _time(timing: dict[str, float]) -> str:
    return f"{timing['best'] * 1e3:.3f} ms (median {timing['median'] * 1e3:.3f}, spread {timing['spread']:.0%})"


def describe_environment(device: str, threads: int) -> dict[str, Any]:
    """Versions, hardware and commit: what a reader needs to judge the numbers."""
    import torch
    import transformers

    found: dict[str, Any] = {"torch": torch.__version__, "transformers": transformers.__version__}
    if importlib.util.find_spec("peft") is not None:
        from importlib.metadata import version

        found["peft"] = version("peft")
    cuda = device.startswith("cuda")
    found["device"] = torch.cuda.get_device_name() if cuda else f"cpu ({_processor()}, {os.cpu_count()} cores)"
    found["threads"] = threads
    found["python"] = platform.python_version()
    found["commit"] = _commit()
    return found


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    names = [line.split(":")[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit() -> str:
    def git(*words: str) -> str:
        done = subprocess.run(["git", "-C", str(CHECKOUT), *words], capture_output=True, text=True, check=False)
        return done.stdout.strip()

    changed = "+changes" if git("status", "--porcelain", "--untracked-files=no") else ""
    return (git("rev-parse", "--short", "HEAD") or "unknown") + changed


def write_records(records: list[dict[str, Any]], environment: dict[str, Any], folder: Path) -> Path:
    """Append one JSON line per point to a file named by the time of the run."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{time.strftime('%Y%m%dT%H%M%S')}.jsonl"
    with path.open("a", encoding="utf-8") as file:
        for record in records:
            file.write(json.dumps({"environment": environment, **record}) + "\n")
    print(f"\nwrote {path}")
    return path


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--case", action="append", default=[], help="run this case only; may be given several times")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, one round: a check, not a measurement")
    parser.add_argument("--full", action="store_true", help="also what takes minutes (PEFT loading all 200 adapters)")
    parser.add_argument("--device", default="cpu", help="torch device (default: cpu)")
    parser.add_argument("--threads", type=int, default=1, help="torch threads (default: 1)")
    parser.add_argument("--rounds", type=int, default=None, help="rounds of interleaved timing")
    parser.add_argument("--out", default=None, help="folder for JSON lines")
    parser.add_argument("--list", action="store_true", help="list the cases and exit")
    return parser


if __name__ == "__main__":
    sys.exit(main())
