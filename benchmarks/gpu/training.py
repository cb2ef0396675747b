"""Forward and backward with all gradients, ours and the baselines'; each maker returns a call that yields gradients.

Shape letters: ``T`` tokens, ``E`` adapters, ``R`` rank rows of all adapters, ``D`` width.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from compose.kernels.stack import LoraStack
from gpu.baselines import Call, add_adapter, grouped_update, spread, tokens_of_adapters
from gpu.gate import reference
from gpu.operands import SCALING, Operands
from gpu.ours import output

Gradients = dict[str, torch.Tensor]


def output_gradient(operands: Operands) -> torch.Tensor:
    """A random gradient of the output, the same for everyone."""
    generator = torch.Generator(operands.x_TD.device).manual_seed(7)
    shape, device = operands.base_TD.shape, operands.base_TD.device
    return torch.randn(shape, device=device, generator=generator).to(operands.base_TD.dtype)


def ours(operands: Operands, dy_TD: torch.Tensor, backend: str) -> Callable[[], Gradients]:
    """Our op; gradients of x, A, B and, where there are any, gates."""
    old = operands.stack
    x_TD, a_RD, b_RD, gates = (_leaf(one) for one in (operands.x_TD, old.a_RD, old.b_RO, operands.gates))
    assert x_TD is not None and a_RD is not None and b_RD is not None  # noqa: S101, PT018 - leaves of tensors
    stack = LoraStack(a_RD, b_RD, old.scaling_E, old.ranks, old.index)
    return _gradients(lambda: output(x_TD, stack, gates, operands, backend), dy_TD, x_TD, [a_RD], [b_RD], gates)


def stacked(operands: Operands, dy_TD: torch.Tensor) -> Callable[[], Gradients]:
    """Autograd through two products with all rank rows."""
    old = operands.stack
    x_TD, a_RD, b_RD, gates = (_leaf(one) for one in (operands.x_TD, old.a_RD, old.b_RO, operands.gates))
    assert x_TD is not None and a_RD is not None and b_RD is not None  # noqa: S101, PT018 - leaves of tensors
    given = operands.coefficients() if gates is None else None

    def forward() -> torch.Tensor:
        coefficients_TE = given
        if gates is not None:
            coefficients_TE = gates
            if operands.indices_TK is not None:
                empty_TE = gates.new_zeros(len(gates), old.num_adapters)
                coefficients_TE = empty_TE.scatter_add(1, operands.indices_TK, gates)
        z_TR = spread(x_TD @ a_RD.T, coefficients_TE, old.ranks)
        return torch.addmm(operands.base_TD, z_TR, b_RD, alpha=SCALING)

    return _gradients(forward, dy_TD, x_TD, [a_RD], [b_RD], gates)


def grouped(operands: Operands, dy_TD: torch.Tensor) -> Callable[[], Gradients]:
    """Autograd through a sort, a gather, two ``grouped_mm`` and the way back."""
    parts = (
        part.unflatten(0, (operands.stack.num_adapters, -1)) for part in (operands.stack.a_RD, operands.stack.b_RO)
    )
    x_TD, a_ErD, b_ErD, gates = (_leaf(one) for one in (operands.x_TD, *parts, operands.gates))
    assert x_TD is not None and a_ErD is not None and b_ErD is not None  # noqa: S101, PT018 - leaves of tensors

    def forward() -> torch.Tensor:
        return operands.base_TD + grouped_update(x_TD, a_ErD, b_ErD, operands, gates)

    return _gradients(forward, dy_TD, x_TD, [a_ErD], [b_ErD], gates)


def loop(operands: Operands, dy_TD: torch.Tensor) -> Callable[[], Gradients]:
    """Autograd through one adapter after the other; every adapter has parameters of its own, as in PEFT."""
    x_TD, gates = _leaf(operands.x_TD), _leaf(operands.gates)
    assert x_TD is not None  # noqa: S101 - a leaf of a tensor
    factors = [operands.stack.factors(adapter) for adapter in range(operands.stack.num_adapters)]
    downs = [a_rD.detach().clone().requires_grad_() for a_rD, _ in factors]
    ups = [b_rD.detach().clone().requires_grad_() for _, b_rD in factors]
    tokens = tokens_of_adapters(operands)

    def forward() -> torch.Tensor:
        y_TD = operands.base_TD.clone()
        for number, (a_rD, b_rD, own) in enumerate(zip(downs, ups, tokens, strict=True)):
            gate = None
            if gates is not None:
                gate = gates[:, number, None] if own is None else gates[own][:, None]
            add_adapter(y_TD, x_TD, a_rD, b_rD, own, gate)
        return y_TD

    return _gradients(forward, dy_TD, x_TD, downs, ups, gates)


BASELINES: dict[str, Callable[[Operands, torch.Tensor], Callable[[], Gradients]]] = {
    "stacked": stacked,
    "grouped_mm": grouped,
    "loop": loop,
}


def expected(operands: Operands, dy_TD: torch.Tensor) -> Gradients:
    """Gradients in float64 of the same rounded inputs."""
    old = operands.stack
    x_TD, a_RD, b_RD = (part.double().requires_grad_() for part in (operands.x_TD, old.a_RD, old.b_RO))
    gates = None if operands.gates is None else operands.gates.double().requires_grad_()

    def forward() -> torch.Tensor:
        coefficients_TE = operands.coefficients().double() if gates is None else gates
        if gates is not None and operands.indices_TK is not None:
            empty_TE = gates.new_zeros(len(gates), old.num_adapters)
            coefficients_TE = empty_TE.scatter_add(1, operands.indices_TK, gates)
        return reference(x_TD, a_RD, b_RD, coefficients_TE, operands)

    return _gradients(forward, dy_TD.double(), x_TD, [a_RD], [b_RD], gates)()


def flat(gradients: Gradients) -> Gradients:
    """Gradients of the factors as ``(R, D)``, whatever shape they were computed in."""
    return {name: one.flatten(0, -2) if name in ("A", "B") else one for name, one in gradients.items()}


def _leaf(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.detach().requires_grad_()


def _gradients(
    forward: Callable[[], torch.Tensor],
    dy_TD: torch.Tensor,
    x_TD: torch.Tensor,
    downs: list[torch.Tensor],
    ups: list[torch.Tensor],
    gates: torch.Tensor | None,
) -> Callable[[], Gradients]:
    """Return a call that runs forward and backward and returns the gradients by name."""
    leaves = [x_TD, *downs, *ups, *([] if gates is None else [gates])]
    count = len(downs)

    def call() -> Gradients:
        found = torch.autograd.grad(forward(), leaves, dy_TD)
        down, up = found[1 : 1 + count], found[1 + count : 1 + 2 * count]
        named = {"x": found[0], "A": _joined(down), "B": _joined(up)}
        return named if gates is None else {**named, "gates": found[-1]}

    return call


def _joined(parts: tuple[torch.Tensor, ...]) -> torch.Tensor:
    return parts[0] if len(parts) == 1 else torch.cat(parts)


__all__ = ["BASELINES", "Call", "Gradients", "expected", "flat", "ours", "output_gradient"]
