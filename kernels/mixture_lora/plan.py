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


class _Kept(NamedTuple):
    """Factors and what they were made from: versions of the stack, place and version of the gates."""

    made_from: tuple[Any, ...]
    factors: Factors


@dataclass(frozen=True, eq=False)
class MixturePlan:
    """Kept factors of one set of gates (with its indices), by stack; held as long as plan and stack live.

    Pass one plan per set of gates. Writing to the gates, the factors or the scaling in place is noticed.
    """

    kept: WeakKeyDictionary[LoraStack, _Kept] = field(default_factory=WeakKeyDictionary, repr=False)


def keeps(plan: MixturePlan | None, stack: LoraStack, gates: torch.Tensor, rows: int) -> bool:
    """Whether factors of ``rows`` rank rows, over all batch rows, are kept.

    They are not without a plan, while tracing, where a gradient must reach gates or factors, or where they would be
    larger than the stack itself.
    """
    if plan is None or torch.compiler.is_compiling() or rows > stack.num_rows:
        return False
    return not gates.requires_grad and not gates.is_inference() and stack.versions() is not None


def prepared(
    plan: MixturePlan | None, stack: LoraStack, gates: torch.Tensor, rows: int, make: Callable[[], Factors]
) -> Factors:
    """Return ``make()``, from the plan where it holds the result; see ``keeps``."""
    if plan is None or not keeps(plan, stack, gates, rows):
        return make()
    made_from = (*(stack.versions() or ()), gates.data_ptr(), gates._version)
    found = plan.kept.get(stack)
    if found is None or found.made_from != made_from:
        with torch.inference_mode(False):
            found = plan.kept[stack] = _Kept(made_from, make())
    return found.factors
