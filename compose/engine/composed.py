"""A bank and coefficients turned into one static adapter."""

from __future__ import annotations

from typing import NamedTuple

from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.coefficients import Coefficients
from compose.errors import IncompatibleError
from compose.merging.ops import concatenate, recompress, sum_factors


class ComposedAdapter(NamedTuple):
    """The adapter, and the relative Frobenius error of the recompression over all targets (0.0 without one)."""

    adapter: Adapter
    relative_error: float


def composed_adapter(bank: Bank, coefficients: Coefficients, *, name: str, rank: int | None = None) -> ComposedAdapter:
    """Return the adapter that computes what ``coefficients`` over ``bank`` compute.

    With outputs combined the factors are concatenated: exact. With parameters combined they are summed. Coefficients
    per layer group give every target its own weights. A target without any weight is left out.

    Args:
        bank: The adapters.
        coefficients: Values ``(E,)``, or ``(G, E)`` with groups; coefficients per row or token have no static form.
        name: Name of the new adapter.
        rank: Recompress every target to at most this rank (Eckart-Young).
    """
    per_target = coefficients.values.dim() - (coefficients.groups is not None)
    if per_target != 1 or coefficients.indices is not None:
        raise IncompatibleError(
            f"only dense coefficients for the whole batch have a static form, got {tuple(coefficients.values.shape)}"
        )
    adapters = [bank[member] for member in bank.names]
    targets: dict[str, LowRank] = {}
    lost = total = 0.0
    for target in bank.targets:
        update = _compose_target(adapters, target, coefficients)
        if update is None:
            continue
        if rank is not None:
            squared = update.norm() ** 2
            update, error = recompress(update, rank)
            lost, total = lost + error**2 * squared, total + squared
        targets[target] = update
    if not targets:
        raise IncompatibleError("all coefficients are 0: the result is the base model, there is no adapter to write")
    return ComposedAdapter(Adapter(name, bank.base, targets), (lost / total) ** 0.5 if total else 0.0)


def _compose_target(adapters: list[Adapter], target: str, coefficients: Coefficients) -> LowRank | None:
    values = coefficients.values if coefficients.groups is None else coefficients.values[coefficients.groups[target]]
    present = [
        (adapter.targets[target], weight)
        for adapter, weight in zip(adapters, values.tolist(), strict=True)
        if target in adapter.targets and weight != 0
    ]
    if not present:
        return None
    updates, weights = [update for update, _ in present], [weight for _, weight in present]
    return concatenate(updates, weights) if coefficients.combine == "outputs" else sum_factors(updates, weights)
