"""Coefficients: who contributes how much, at every scope from the whole batch to one token.

Shape letters: ``E`` adapters of the bank, ``B`` batch rows, ``T`` tokens, ``G`` groups of targets.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal, NamedTuple, Protocol, runtime_checkable

import torch

from compose.errors import IncompatibleError
from compose.kernels.grouped_lora.op import GroupPlan, grouped_lora, plan_groups
from compose.kernels.mixture_lora.op import MixturePlan, mixture_lora
from compose.kernels.mixture_lora.plan import captured
from compose.kernels.stack import LoraStack

Combine = Literal["outputs", "parameters"]


class LayerCall(NamedTuple):
    """What one layer hands to the coefficients in force.

    Attributes:
        stack: The target's factors.
        base: The base layer's output, ``None`` where the update alone is wanted.
        target: The target's path, for groups and messages.
        backend: Kernel backend.
        owns_base: Nothing else holds ``base``, so the update may be added in place.
    """

    stack: LoraStack
    base: torch.Tensor | None
    target: str
    backend: str
    owns_base: bool


@runtime_checkable
class Selection(Protocol):
    """What can be in force on an attached model: coefficients, ids, or a router that computes gates in the forward."""

    def check(self, targets: list[str], num_adapters: int) -> None:
        """Raise unless it fits a bank of ``num_adapters`` with these targets."""

    def to(self, device: torch.device) -> Selection:
        """Return the same on ``device``."""

    def apply(self, x: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Return the base output plus the contribution at one target: ``x (B, D)`` or ``(B, T, D)``."""


class _FittedGates(NamedTuple):
    """Gates and indices for a number of rows, what is kept for them, and how often values and indices were written."""

    gates: torch.Tensor
    indices: torch.Tensor | None
    plan: MixturePlan | None = None
    version: int = 0


@dataclass(frozen=True, eq=False)
class Coefficients:
    """One number per adapter: for the whole batch, per row, or per token; optionally one set per group of targets.

    The leading dimensions say how often the numbers change: ``(E,)``, ``(B, E)`` or ``(B, T, E)``. With ``groups`` the
    values have one more leading dimension ``G`` and a target uses the slice of its group. During ``generate`` a batch
    that holds each row ``k`` times (beams, returned sequences) uses the row's coefficients ``k`` times, and a step of
    one token uses the last token's.

    With ``indices`` the values are sparse: ``K`` numbers for the adapters named, at any of these scopes, so a row that
    uses three of a thousand adapters costs three.

    Attributes:
        values: The numbers; any floating dtype, may require gradients.
        combine: ``"outputs"``: sum of the adapters' outputs, linear and exact for any ranks. ``"parameters"``: product
            of summed factors (LoRAHub, arXiv:2307.13269), with cross terms. They are different functions.
        groups: Target path -> group number, or ``None`` for one set of values for all targets.
        indices: int64, the shape of ``values`` without ``G``: the adapters the last dimension's entries belong to, -1
            for none; ``None``: all adapters in the bank's order.
    """

    values: torch.Tensor
    combine: Combine = "outputs"
    groups: Mapping[str, int] | None = None
    indices: torch.Tensor | None = None
    _plans: dict[tuple[int, int], _FittedGates] = field(default_factory=dict, init=False, repr=False)

    def __post_init__(self) -> None:
        if self.combine not in ("outputs", "parameters"):
            raise IncompatibleError(f"combine must be 'outputs' or 'parameters', got {self.combine!r}")
        scope = self.values.dim() - (self.groups is not None)
        if not self.values.is_floating_point() or scope not in (1, 2, 3):
            raise IncompatibleError(
                "coefficients must be floating point of shape (E,), (B, E) or (B, T, E), with groups (G, ...); "
                f"got {self.values.dtype} {tuple(self.values.shape)}{' with groups' if self.groups else ''}"
            )
        if self.groups is not None and (bad := [g for g in self.groups.values() if not 0 <= g < len(self.values)]):
            raise IncompatibleError(f"group numbers must lie in [0, {len(self.values)}), got {bad[0]}")
        wanted = self.values.shape[self.groups is not None :]
        if self.indices is not None and (self.indices.dtype != torch.int64 or self.indices.shape != wanted):
            raise IncompatibleError(
                f"indices must be int64 of shape {tuple(wanted)}, got {self.indices.dtype} {tuple(self.indices.shape)}"
            )

    def __getstate__(self) -> dict[str, object]:
        """What is kept between calls is not pickled."""
        return {**self.__dict__, "_plans": {}}

    def check(self, targets: list[str], num_adapters: int) -> None:
        """Raise unless the values fit a bank of ``num_adapters`` and the groups cover ``targets``."""
        if self.indices is not None:
            _check_range("indices", self.indices, num_adapters)
        elif self.values.shape[-1] != num_adapters:
            raise IncompatibleError(
                f"the bank holds {num_adapters} adapters, the coefficients have {self.values.shape[-1]}"
            )
        missing = [] if self.groups is None else [target for target in targets if target not in self.groups]
        if missing:
            raise IncompatibleError(f"groups name no group for target {missing[0]!r} (and {len(missing) - 1} more)")

    def to(self, device: torch.device) -> Coefficients:
        """Return the same coefficients on ``device`` (``self`` when they are there)."""
        if self.values.device == device:
            return self
        indices = None if self.indices is None else self.indices.to(device)
        return Coefficients(self.values.to(device), self.combine, self.groups, indices)

    def apply(self, x: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Return the base output plus the mixture's contribution for one target: ``x (B, D)`` or ``(B, T, D)``."""
        fitted = self._fitted(x, call.target)
        return mixture_lora(
            x,
            call.stack,
            fitted.gates,
            fitted.indices,
            base=call.base,
            combine=self.combine,
            plan=fitted.plan,
            backend=call.backend,
            reuse_base=call.owns_base,
        )

    def _fitted(self, x: torch.Tensor, target: str) -> _FittedGates:
        """Gates and indices for an input, with a plan; the same for every target of a group and every later call.

        Gates that are trained, traced or given per token are made anew in every call and have no plan.
        """
        group = 0 if self.groups is None else self.groups[target]
        scope = self.values.dim() - (self.groups is not None)
        if torch.compiler.is_compiling() or scope == 3 or self.values.requires_grad or captured(x):
            return self._fit(x, group, target)
        given = [self.values] if self.indices is None else [self.values, self.indices]
        if any(tensor.is_inference() for tensor in given):
            return self._fit(x, group, target)
        key, version = (group, x.shape[0] if scope == 2 else 0), sum(tensor._version for tensor in given)
        found = self._plans.get(key)
        if found is None or found.version != version or found.gates.device != x.device:
            with torch.inference_mode(False):
                found = self._fit(x, group, target)._replace(plan=MixturePlan(), version=version)
            self._plans[key] = found
        return found

    def _fit(self, x: torch.Tensor, group: int, target: str) -> _FittedGates:
        values = self.values if self.groups is None else self.values[group]
        gates = _fit(values, x.shape[:-1], target).to(x.device)
        indices = None if self.indices is None else _fit(self.indices, x.shape[:-1], target).to(x.device)
        return _FittedGates(gates, indices)


@dataclass(frozen=True, eq=False)
class AdapterIds:
    """One adapter per row at its full strength (serving): ``ids (B,)`` int64, ``-1`` for the bare base model."""

    ids: torch.Tensor
    _plans: dict[tuple[int, torch.device], tuple[torch.Tensor, GroupPlan]] = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if self.ids.dtype != torch.int64 or self.ids.dim() != 1:
            raise IncompatibleError(f"ids must be int64 of shape (B,), got {self.ids.dtype} {tuple(self.ids.shape)}")

    def check(self, targets: list[str], num_adapters: int) -> None:
        """Raise unless every id is ``-1`` or names one of ``num_adapters``."""
        _check_range("ids", self.ids, num_adapters)

    def to(self, device: torch.device) -> AdapterIds:
        """Return the same ids on ``device`` (``self`` when they are there)."""
        return self if self.ids.device == device else AdapterIds(self.ids.to(device))

    def apply(self, x: torch.Tensor, call: LayerCall) -> torch.Tensor:
        """Return the base output plus each row's adapter for one target: ``x (B, D)`` or ``(B, T, D)``."""
        ids, plan = self._plan(x.shape[0], x.device, call.target)
        return grouped_lora(
            x, call.stack, ids, base=call.base, plan=plan, backend=call.backend, reuse_base=call.owns_base
        )

    def _plan(self, rows: int, device: torch.device, target: str) -> tuple[torch.Tensor, GroupPlan]:
        if (rows, device) not in self._plans:
            ids = _repeat_rows(self.ids, rows, target).to(device)
            self._plans[rows, device] = (ids, plan_groups(ids))
        return self._plans[rows, device]


def _check_range(what: str, ids: torch.Tensor, num_adapters: int) -> None:
    bad = ids[(ids < -1) | (ids >= num_adapters)]
    if len(bad):
        raise IncompatibleError(f"{what} must lie in [-1, {num_adapters}), got {int(bad[0])}")


def _fit(values: torch.Tensor, leading: torch.Size, target: str) -> torch.Tensor:
    """Return values ``(K,)``, ``(B, K)`` or ``(B, T, K)`` for an input with leading shape ``(B,)`` or ``(B, T)``."""
    if values.dim() == 1:
        return values
    fitting = _repeat_rows(values, leading[0], target)
    if fitting.dim() == 2 or (len(leading) == 2 and leading[1] == fitting.shape[1]):
        return fitting
    if len(leading) == 2 and leading[1] == 1:
        return fitting[:, -1:]
    raise IncompatibleError(
        f"{target}: coefficients per token have shape {tuple(values.shape)}, the input has {tuple(leading)} "
        "rows and tokens; give coefficients of the same length"
    )


def _repeat_rows(values: torch.Tensor, rows: int, target: str) -> torch.Tensor:
    """Repeat ``values (B, ...)`` row by row to ``rows``; generate lays out the copies of a row next to each other."""
    if values.shape[0] == rows:
        return values
    if values.shape[0] == 0 or rows % values.shape[0]:
        raise IncompatibleError(
            f"{target}: coefficients are set for {values.shape[0]} rows, the batch has {rows}; give one set per row"
        )
    return values.repeat_interleave(rows // values.shape[0], dim=0)
