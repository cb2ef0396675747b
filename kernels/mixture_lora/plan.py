"""MixturePlan: what follows from gates and factors alone, kept between calls with the same gates."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch

from compose.kernels.stack import LoraStack


class Factors(NamedTuple):
    """Factors shared by the batch, ``(r, D)`` and ``(r, O)``, or per batch row with a leading ``B``; coefficients."""

    a: torch.Tensor
    b: torch.Tensor
    c: torch.Tensor | float


class Lines(NamedTuple):
    """Rank rows of the adapters that indices name, at one line per batch row (or one for the whole batch).

    Attributes:
        rows: int64 ``(K r,)`` or ``(B, K r)``: rank rows; unused places hold some row.
        unused: bool, of the same shape: which places are not used; None when all are.
        adapters: int64, the shape of the gates: the indices with 0 for "no adapter".
    """

    rows: torch.Tensor
    unused: torch.Tensor | None
    adapters: torch.Tensor


class _Kept(NamedTuple):
    """Factors and what they were made from: versions of the stack, place and version of gates and indices."""

    made_from: tuple[Any, ...]
    factors: Factors


@dataclass(frozen=True, eq=False)
class MixturePlan:
    """What is kept for one set of gates (with its indices).

    Writing to a tensor in place is noticed, except through ``tensor.data`` or a NumPy view.

    Attributes:
        kept: Factors by stack, held as long as plan and stack live.
        lines: Rank rows by the stack's ranks: targets with equal ranks share them.
        tables: Version of the indices, and tokens sorted by adapter on the device (Triton).
    """

    kept: WeakKeyDictionary[LoraStack, _Kept] = field(default_factory=WeakKeyDictionary, repr=False)
    lines: dict[tuple[int, ...], tuple[int, Lines]] = field(default_factory=dict, repr=False)
    tables: dict[int, dict[tuple[int, int], Any]] = field(default_factory=dict, repr=False)

    def sorted_tables(self, indices: torch.Tensor) -> dict[tuple[int, int], Any] | None:
        """Where tables of these indices are kept; None where writes to them would go unnoticed."""
        if indices.is_inference() or captured(indices) or torch.compiler.is_compiling():
            return None
        if indices._version not in self.tables:
            self.tables.clear()
        return self.tables.setdefault(indices._version, {})


def keeps(plan: MixturePlan | None, stack: LoraStack, gates: torch.Tensor, rows: int) -> bool:
    """Whether factors of ``rows`` rank rows, over all batch rows, are kept.

    They are not without a plan, while tracing, where a gradient must reach gates or factors, or where they would be
    larger than the stack itself.
    """
    if plan is None or torch.compiler.is_compiling() or rows > stack.num_rows or captured(gates):
        return False
    return not gates.requires_grad and not gates.is_inference() and stack.versions() is not None


def captured(tensor: torch.Tensor) -> bool:
    """Whether a CUDA graph is being captured, whose replays must see what is written to gates later."""
    return tensor.is_cuda and torch.cuda.is_current_stream_capturing()


def prepared(
    plan: MixturePlan | None,
    stack: LoraStack,
    gates: torch.Tensor,
    rows: int,
    make: Callable[[], Factors],
    *,
    kind: str,
    indices: torch.Tensor | None = None,
) -> Factors:
    """Return ``make()``, from the plan where it holds the result of this kind; see ``keeps``."""
    if plan is None or not keeps(plan, stack, gates, rows) or (indices is not None and indices.is_inference()):
        return make()
    chosen = () if indices is None else (indices.data_ptr(), indices._version)
    made_from = (kind, *(stack.versions() or ()), gates.data_ptr(), gates._version, *chosen)
    found = plan.kept.get(stack)
    if found is None or found.made_from != made_from:
        with torch.inference_mode(False):
            found = plan.kept[stack] = _Kept(made_from, make())
    return found.factors


def chosen_lines(plan: MixturePlan | None, stack: LoraStack, indices: torch.Tensor) -> Lines:
    """Return the rank rows of the chosen adapters: ``indices (K,)`` or ``(B, 1, K)``."""
    if plan is None or torch.compiler.is_compiling() or indices.is_inference():
        return _lines(stack, indices)
    found = plan.lines.get(stack.ranks)
    if found is None or found[0] != indices._version or found[1].rows.device != indices.device:
        with torch.inference_mode(False):
            found = plan.lines[stack.ranks] = (indices._version, _lines(stack, indices))
    return found[1]


def _lines(stack: LoraStack, indices: torch.Tensor) -> Lines:
    line = torch.where(indices < 0, stack.num_adapters, indices)
    line = line.squeeze(1) if line.dim() == 3 else line
    rows = stack.index.table_Er[line].flatten(-2)
    valid = stack.index.valid_Er[line].flatten(-2)
    on_host = valid.device.type == "cpu" and not torch.compiler.is_compiling()
    unused = None if on_host and bool(valid.all()) else ~valid
    return Lines(rows, unused, indices.clamp(min=0))
