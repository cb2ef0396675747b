"""Correctness first: results against float64 of the same rounded inputs, in poisoned memory; red is not timed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

from gpu.operands import SCALING, Operands

FORWARD_LIMITS = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
BACKWARD_LIMITS = {torch.bfloat16: 6e-3, torch.float16: 2e-3, torch.float32: 1e-5}


class RedGateError(AssertionError):
    """A result differs from the reference; says by how much."""


def reference(
    x_TD: torch.Tensor, a_RD: torch.Tensor, b_RD: torch.Tensor, coefficients_TE: torch.Tensor, operands: Operands
) -> torch.Tensor:
    """Return base plus update in float64; the first four tensors are float64, and it is differentiable in them."""
    rows_TR = coefficients_TE.index_select(1, operands.stack.index.adapter_R) * SCALING
    return operands.base_TD.double() + (x_TD @ a_RD.T * rows_TR) @ b_RD


def expected(operands: Operands) -> torch.Tensor:
    """The result of one call in float64."""
    stack = operands.stack
    wide = (operands.x_TD, stack.a_RD, stack.b_RO, operands.coefficients())
    x_TD, a_RD, b_RD, coefficients_TE = (tensor.double() for tensor in wide)
    return reference(x_TD, a_RD, b_RD, coefficients_TE, operands)


def require_close(what: str, found: torch.Tensor, wanted: torch.Tensor, limit: float) -> float:
    """Return the relative error in the Frobenius norm.

    Raises:
        RedGateError: It exceeds ``limit`` or is not a number.
    """
    error = float((found.double() - wanted).norm() / wanted.norm())
    if not error <= limit:
        raise RedGateError(f"{what}: {error:.2e} of the norm away from float64, allowed {limit:.0e}")
    return error


@contextmanager
def poisoned_memory() -> Iterator[None]:
    """Inside, memory that torch hands out starts as NaN."""
    allocators = [(torch, "empty"), (torch, "empty_like"), (torch, "empty_strided"), (torch.Tensor, "new_empty")]
    originals = [getattr(owner, name) for owner, name in allocators]

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned(*arguments: object, **options: object) -> torch.Tensor:
            tensor = allocate(*arguments, **options)
            with torch.no_grad():
                return tensor.fill_(float("nan")) if tensor.is_floating_point() else tensor

        return poisoned

    try:
        for (owner, name), original in zip(allocators, originals, strict=True):
            setattr(owner, name, poison(original))
        yield
    finally:
        for (owner, name), original in zip(allocators, originals, strict=True):
            setattr(owner, name, original)


def check_call(
    what: str,
    operands: Operands,
    wanted: torch.Tensor,
    run: Sequence[Callable[[], object]],
    limit: float,
) -> float:
    """Run ``run`` on a fresh ``base`` in place and compare; ``base`` is as before afterwards.

    Returns the largest error of the runs.

    Raises:
        RedGateError: A result differs.
    """
    saved = operands.base_TD.clone()
    errors = []
    for one in run:
        operands.base_TD.copy_(saved)
        one()
        try:
            errors.append(require_close(what, operands.base_TD, wanted, limit))
        finally:
            operands.base_TD.copy_(saved)
    return max(errors)
