"""``python -m compose.kernels.measure [SECTION ...] [--cells FILE]``: measure the strategies, fit the policy.

A section is an op, a dtype and a mode, as in ``"grouped float32 inference"``; without one, all that this CPU can run
are measured (a few minutes). Each ends with its regret: how much slower than the fastest strategy the fitted policy is
on the cells it was fitted to. One thread; process time, minimum over repeats, so other jobs disturb it little.

``bfloat16`` sections are for CPUs without AMX tiles; where there are some, oneDNN can be kept from using them:
``ONEDNN_MAX_CPU_ISA=AVX512_CORE_BF16 python -m compose.kernels.measure "grouped bfloat16 inference"``.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from compose.kernels import policy, policy_table
from compose.kernels.grouped_lora import cpu as grouped
from compose.kernels.grouped_lora.plan import plan_groups
from compose.kernels.mixture_lora import cpu as mixture
from compose.kernels.stack import LoraStack

_LIMIT = "ONEDNN_MAX_CPU_ISA"  # read by oneDNN when it is loaded
_SECONDS = 0.01  # per repeat
_REPEATS = 3
_MOST_WORK = 4e9  # multiply-adds of one product with all rows; beyond it that is never the fastest
SECTIONS = tuple(
    f"{op} {dtype} {mode}"
    for op in ("grouped", "mixture")
    for dtype in ("float32", "bfloat16", "bfloat16_amx")
    for mode in ("inference", "training")
)


class Cell(NamedTuple):
    """One shape that is measured.

    Attributes:
        batch: Batch rows; ``tokens`` each.
        tokens: See ``batch``.
        adapters: In the stack.
        used: How many of them occur, at most.
        chosen: ``K``; 1 for ``grouped_lora``.
        width: ``D`` and ``O``.
        rank: Of every adapter.
        skewed: The first adapter takes half of the entries.
    """

    batch: int
    tokens: int
    adapters: int
    used: int
    chosen: int
    width: int
    rank: int
    skewed: bool = False


class Measured(NamedTuple):
    """Microseconds of every strategy of one cell, and what the policy knows about the cell."""

    cell: Cell
    work: policy.Work
    times: dict[policy.Strategy, float]


def cells(op: str) -> Iterator[Cell]:
    """The shapes of one op."""
    for width, ranks, batches, counts in (
        (256, (8, 32), (4, 32, 256, 2048), (2, 8, 64)),
        (1024, (8, 16, 64), (32, 128, 512, 2048), (2, 4, 16, 64)),
        (4096, (16,), (32, 256, 2048), (4, 64)),
    ):
        for rank in ranks:
            for batch in batches:
                for adapters in counts:
                    chosen = (1, 2) if op == "mixture" and rank <= 16 else (1 if op == "grouped" else 2,)
                    for number in chosen:
                        yield Cell(batch, 1, adapters, adapters, number, width, rank)
    for batch in (64, 512):
        for skewed in (False, True):
            yield Cell(batch, 1, 32, 32, 1, 512, 8, skewed)
        yield Cell(batch, 1, 200, 8, 1, 512, 8)
    if op == "grouped":
        for batch, tokens, adapters in ((8, 64, 4), (32, 16, 8), (32, 64, 32)):
            yield Cell(batch, tokens, adapters, adapters, 1, 512, 8)


def random_stack(cell: Cell, dtype: torch.dtype, *, trained: bool) -> LoraStack:
    """A random stack of equal ranks."""
    rows = cell.adapters * cell.rank
    a = (torch.randn(rows, cell.width) / cell.width**0.5).to(dtype).requires_grad_(trained)
    b = torch.randn(rows, cell.width).to(dtype).requires_grad_(trained)
    return LoraStack(a, b, torch.full((cell.adapters,), 0.5), (cell.rank,) * cell.adapters)


def random_ids(cell: Cell) -> torch.Tensor:
    """``(batch, chosen)`` adapters, all different in a row."""
    ids = torch.rand(cell.batch, cell.used).topk(cell.chosen, dim=1).indices
    if cell.skewed:
        ids[: cell.batch // 2] = 0
    return ids


def measure(op: str, cell: Cell, dtype: torch.dtype, *, training: bool) -> Measured:
    """Time all strategies that can run a cell."""
    stack = random_stack(cell, dtype, trained=training)
    ids, shape = random_ids(cell), (cell.batch, cell.tokens, cell.width)
    x, base = torch.randn(shape).to(dtype).requires_grad_(training), torch.randn(shape).to(dtype)
    leaves = [x, stack.a_RD, stack.b_RO]
    if op == "grouped":
        plan = plan_groups(ids[:, 0])
        work = grouped.work_of(stack, plan, cell.batch * cell.tokens)

        def run(strategy: Any) -> torch.Tensor:
            return grouped.forward(x, stack, plan.ids, base=base, plan=plan, strategy=strategy)

    else:
        gates, indices = torch.rand(cell.batch, 1, cell.chosen, requires_grad=training), ids[:, None]
        leaves.append(gates)
        work = mixture.sparse_work(stack, indices, cell.batch, count=True)

        def run(strategy: Any) -> torch.Tensor:
            return mixture.forward(x, stack, gates, indices, base=base, combine="outputs", strategy=strategy)

    def step(strategy: Any) -> object:
        if not training:
            with torch.no_grad():
                return run(strategy)
        return torch.autograd.grad(run(strategy), leaves, base)

    heavy = work.tokens * work.all_rows * work.width > _MOST_WORK
    names = [
        name
        for name in policy.allowed(work, stack, kept=op == "grouped")
        if not (heavy and name in ("stacked", "bag"))
    ]
    return Measured(cell, work, {name: microseconds(lambda name=name: step(name)) for name in names})  # type: ignore[misc]


def microseconds(call: Callable[[], Any]) -> float:
    """CPU time of one call, the least of a few averages."""
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


def fit(measured: list[Measured]) -> dict[policy.Strategy, tuple[float, ...]]:
    """Constants of every strategy: the least relative errors, none below 0."""
    import numpy as np
    from scipy.optimize import nnls

    constants = {}
    for strategy in sorted({name for one in measured for name in one.times}):
        rows = [(policy.features(strategy, m.work), m.times[strategy]) for m in measured if strategy in m.times]
        relative = np.array([np.array(counts) / spent for counts, spent in rows])
        size = relative.max(axis=0).clip(min=1e-30)
        weights, _ = nnls(relative / size, np.ones(len(rows)))
        constants[strategy] = tuple(float(f"{value:.4g}") for value in weights / size)
    return cast("dict[policy.Strategy, tuple[float, ...]]", constants)


def regrets(measured: list[Measured], constants: dict[policy.Strategy, tuple[float, ...]]) -> list[float]:
    """Per cell: time of the strategy that the constants choose, over the least time."""
    found = []
    for one in measured:
        chosen = min(one.times, key=lambda name: policy.cost(name, one.work, constants[name]))
        found.append(one.times[chosen] / min(one.times.values()))
    return found


def report(section: str, measured: list[Measured], constants: dict[policy.Strategy, tuple[float, ...]]) -> list[str]:
    """One line per cell, the fastest strategy starred and the chosen one named where it differs; then the regret."""
    lines = []
    for one, regret in zip(measured, regrets(measured, constants), strict=True):
        best = min(one.times, key=one.times.__getitem__)
        figures = " ".join(f"{'*' if name == best else ''}{name} {spent:.0f}" for name, spent in one.times.items())
        lines.append(f"{section} {' '.join(map(str, one.cell))}: {figures}" + f" regret {regret:.2f}" * (regret > 1))
    values = regrets(measured, constants)
    mean, worst = sum(values) / len(values), max(values)
    wins = {name: sum(min(m.times, key=m.times.__getitem__) == name for m in measured) for name in constants}
    lines.append(f"{section}: {len(values)} cells, mean regret {mean - 1:.1%}, worst {worst:.2f}; wins {wins}")
    return lines


def write_table(costs: dict[str, dict[str, tuple[float, ...]]], path: Path) -> None:
    """Write the constants as the Python module that ``policy.py`` imports."""
    lines = [
        '"""Written by ``python -m compose.kernels.measure``: constants of ``policy.py``, microseconds per count."""'
    ]
    lines += ["", "COSTS: dict[str, dict[str, tuple[float, ...]]] = {"]
    for section, constants in sorted(costs.items()):
        lines.append(f'    "{section}": {{')
        lines += [f'        "{name}": ({", ".join(map(repr, values))}),' for name, values in constants.items()]
        lines.append("    },")
    path.write_text("\n".join([*lines, "}", ""]), encoding="utf-8")


def main(arguments: list[str] | None = None) -> None:
    """Measure, fit, print and store the sections asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"any of: {', '.join(SECTIONS)}")
    parser.add_argument("--cells", type=Path, help="append what was measured to this file, as JSON lines")
    options = parser.parse_args(arguments)
    if unknown := set(options.sections) - set(SECTIONS):
        parser.error(f"unknown sections {sorted(unknown)}; known: {', '.join(SECTIONS)}")
    tiles = policy.multiplies_in_tiles() and not os.environ.get(_LIMIT)
    runnable = [name for name in SECTIONS if name.split()[1] != ("bfloat16" if tiles else "bfloat16_amx")]
    if wrong := set(options.sections) - set(runnable):
        parser.error(
            f"{sorted(wrong)} cannot be measured: AMX tiles {'are' if tiles else 'are not'} used (see {_LIMIT})"
        )
    torch.set_num_threads(1)
    torch.manual_seed(0)
    costs: dict[str, Any] = dict(policy_table.COSTS)
    for section in options.sections or runnable:
        op, dtype, mode = section.split()
        numbers = getattr(torch, dtype.removesuffix("_amx"))
        measured = [measure(op, cell, numbers, training=mode == "training") for cell in cells(op)]
        costs[section] = fit(measured)
        sys.stdout.write("\n".join(report(section, measured, costs[section])) + "\n")
        if options.cells:
            with options.cells.open("a", encoding="utf-8") as file:
                file.writelines(json.dumps([section, *one]) + "\n" for one in measured)
        write_table(costs, Path(policy_table.__file__))


if __name__ == "__main__":
    main()
