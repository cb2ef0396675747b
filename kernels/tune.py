"""Tune the block sizes of the Triton kernels for this GPU: ``python -m compose.kernels.tune --device cuda``.

Nothing is ever tuned by itself. What is measured is written to the user's cache folder and used from then on by every
process on this model of GPU; blocks that decide the order of sums may change with it, so results may differ in their
last bits from those before.
"""

from __future__ import annotations

import argparse
import logging
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

logger = logging.getLogger(__name__)

Timer = Callable[[Sequence[Callable[[], object]]], float]
_ALIKE = 2e-2  # relative Frobenius norm between results of two block sizes; wrong blocks are off by about 1


def tune(
    *,
    device: str | torch.device = "cuda",
    dtype: torch.dtype = torch.bfloat16,
    names: Sequence[str] = (),
    path: Path | None = None,
    timer: Timer | None = None,
    device_name: str | None = None,
) -> Path:
    """Measure candidates, write the best to the table of this GPU and use them from now on.

    Args:
        device: A CUDA device.
        dtype: Of inputs and factors; entries of bfloat16 serve float16 too.
        names: Of the trials, see ``TRIALS``; all by default.
        path: The table; by default the user's own, below ``XDG_CACHE_HOME`` or ``~/.cache``.
        timer: Seconds per call of a round of calls; by default from replays of a CUDA graph.
        device_name: What the table is for; by default the GPU's name.

    Returns:
        Where the table lies.

    Raises:
        RuntimeError: A CUDA graph is being captured, or the device is no GPU and no timer was given.
        UnknownNameError: No such trial.
    """
    from compose.kernels.packed import tables, trials, tuning
    from compose.kernels.packed import timer as timing
    from compose.kernels.packed.search import search

    where = torch.device(device)
    timing.refuse_capture()
    if where.type != "cuda" and timer is None:
        raise RuntimeError(f"block sizes are measured on a GPU, not on {where}; give a CUDA device")
    device_name = device_name or torch.cuda.get_device_name(where)
    for trial in chosen(names):
        started = time.perf_counter()
        operands = trials.Operands(trial, dtype, where)
        start = trial.start(dtype, where)
        measure = _measure(trial, operands, start, timer or timing.graph_seconds)
        found = search(trials.space(trial, dtype), start, measure)
        entry = {
            "kind": trial.kind, "dtype": str(dtype).removeprefix("torch."), "exact": list(trial.exact),
            "sizes": list(trial.sizes), "config": found.config._asdict(), "us": found.us,
            "before": start._asdict(), "timed": [list(lead) for lead in trial.lead], "candidates": found.candidates,
        }  # fmt: skip
        path = tables.save(device_name, [entry], path)
        tuning.forget()
        before = next(one["us"] for one in found.candidates if one["config"] == start._asdict())
        logger.info("%s: %s -> %s us in %.0f s, %d tried: %s", trial.name, before, found.us,
                    time.perf_counter() - started, len(found.candidates), found.config)  # fmt: skip
    return tables.cache_folder() if path is None else path


def chosen(names: Sequence[str]) -> list[Any]:
    """The trials of these names, in their own order; all for none.

    Raises:
        UnknownNameError: No such trial.
    """
    from compose.errors import UnknownNameError
    from compose.kernels.packed.trials import TRIALS

    known = {trial.name: trial for trial in TRIALS}
    unknown = [name for name in names if name not in known]
    if unknown:
        raise UnknownNameError(f"unknown trial {unknown[0]!r}; known: {', '.join(known)}")
    return [trial for trial in TRIALS if not names or trial.name in names]


def _measure(trial: Any, operands: Any, start: Any, timer: Timer) -> Callable[[Any], list[float] | str]:
    """A function that times a configuration and refuses one that cannot run or computes something else."""
    from compose.kernels.packed import tuning

    calls = [operands.calls(lead) for lead in trial.lead]
    with tuning.trying({trial.kind: start}):
        expected = [one[0]() for one in calls]

    def measure(config: Any) -> list[float] | str:
        with tuning.trying({trial.kind: config}):
            try:
                for own, wanted in zip(calls, expected, strict=True):
                    y = own[0]()
                    apart = float((y.float() - wanted.float()).norm() / wanted.float().norm())
                    if not apart <= _ALIKE:
                        return f"its result is {apart:.1e} of the norm away"
                    if trial.kind == "dense few" and not torch.equal(y, wanted):
                        return "its result has other bits"
                return [timer(own) for own in calls]
            except _too_large() as error:
                return str(error).splitlines()[0]

    return measure


def _too_large() -> tuple[type[Exception], ...]:
    """What Triton raises for blocks that the GPU has no room for."""
    from triton.runtime.errors import OutOfResources, PTXASError

    return OutOfResources, PTXASError


def compile_share(share: int, shares: int, *, device: str, dtype: torch.dtype, names: Sequence[str]) -> None:
    """Compile every ``shares``-th candidate into Triton's cache on disk, so that tuning finds them there."""
    from compose.kernels.packed import trials, tuning

    where = torch.device(device)
    number = 0
    for trial in chosen(names):
        operands = None
        for config in trials.space(trial, dtype).all(trial.start(dtype, where)):
            number += 1
            if number % shares != share:
                continue
            operands = operands or trials.Operands(trial, dtype, where)
            with tuning.trying({trial.kind: config}):
                for lead in trial.lead:
                    try:
                        operands.first(lead)()
                    except _too_large():
                        break


def main(arguments: list[str] | None = None) -> int:
    """The command; returns 0, or 2 with one line on stderr for what a user can mend."""
    from compose.errors import ComposeError

    options = _parser().parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    dtype = getattr(torch, options.dtype)
    try:
        if options.share is not None:
            compile_share(options.share, options.processes, device=options.device, dtype=dtype, names=options.trial)
            return 0
        if options.processes > 1:
            _compile_in_processes(options)
        path = tune(device=options.device, dtype=dtype, names=options.trial, path=options.out)
    except (ComposeError, RuntimeError) as error:
        logger.error("%s", error)
        return 2
    logger.info("written to %s", path)
    return 0


def _compile_in_processes(options: argparse.Namespace) -> None:
    """Compile all candidates in several processes at once."""
    given = [part for name in options.trial for part in ("--trial", name)]
    own = ["--device", options.device, "--dtype", options.dtype, "--processes", str(options.processes), *given]
    command = [sys.executable, "-P", "-m", "compose.kernels.tune", *own]
    started = time.perf_counter()
    running = [subprocess.Popen([*command, "--share", str(share)]) for share in range(options.processes)]
    failed = sum(one.wait() != 0 for one in running)
    logger.info("compiled in %d processes in %.0f s; %d of them failed", len(running), time.perf_counter() - started,
                failed)  # fmt: skip


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m compose.kernels.tune", description=__doc__)
    parser.add_argument("--device", default="cuda", help="a CUDA device (default: cuda)")
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument(
        "--trial", action="append", default=[], help="measure this one only; may be given several times"
    )
    parser.add_argument("--processes", type=int, default=1, help="compile candidates in so many processes first")
    parser.add_argument("--out", type=Path, default=None, help="the table (default: in the user's cache folder)")
    parser.add_argument("--share", type=int, default=None, help=argparse.SUPPRESS)
    return parser


if __name__ == "__main__":
    sys.exit(main())
