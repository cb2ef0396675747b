"""The values of the weights: what no header tells and no group of siblings is needed for."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch

from compose.adapter import Adapter
from compose.hub_index.audit.evidence import Evidence
from compose.hub_index.audit.rule import Remark, rule
from compose.hub_index.audit.tensor_names import factor_of

_HALF_MAX = 65504.0


@rule("values.finite", "critical", hard=True)
def values_are_finite(evidence: Evidence) -> Iterator[Remark]:
    """A value is NaN or infinite."""
    if isinstance(evidence.adapter, Adapter):
        return
    for name, tensor in evidence.tensors.items():
        if tensor.is_floating_point() and (bad := int((~torch.isfinite(tensor)).sum())):
            factor = factor_of(name)
            yield Remark(f"{name}: {bad:,} of {tensor.numel():,} values are not finite", factor[0] if factor else "")


@rule("values.changed", "critical", hard=True)
def weights_are_those_of_the_index(evidence: Evidence) -> Iterator[Remark]:
    """The weight file is not the one that the index knows under this name."""
    if evidence.record is not None and isinstance(evidence.adapter, Adapter):
        known, found = evidence.record.sha256_weights, evidence.adapter.sha256
        if known and known != found:
            yield Remark(f"sha256 is {found[:12]}, the index has {known[:12]}; add it again or restore the file")


@rule("values.overflow", "high")
def delta_fits_half_precision(evidence: Evidence) -> Iterator[Remark]:
    """Entries of the update can overflow float16: factors of wild magnitude."""
    if not isinstance(evidence.adapter, Adapter):
        return
    for module, update in evidence.adapter.targets.items():
        largest = float(update.a.abs().max()) * float(update.b.abs().max()) * abs(update.scaling)
        if largest > _HALF_MAX or not math.isfinite(largest):
            yield Remark(f"{module}: entries of A, B and the scaling multiply to {largest:.3g}", module)


@rule("values.zero", "medium")
def adapter_changes_something(evidence: Evidence) -> Iterator[Remark]:
    """Every B (or every A) is zero: the adapter changes nothing, it was never trained or was emptied."""
    zero, all_modules = _zero_modules(evidence)
    if zero and len(zero) == all_modules:
        yield Remark(f"the update of all {all_modules} modules is zero")


@rule("values.zero-part", "low")
def every_module_changes_something(evidence: Evidence) -> Iterator[Remark]:
    """Some modules have a B (or an A) of zeros and others do not."""
    zero, all_modules = _zero_modules(evidence)
    if zero and len(zero) < all_modules:
        shown = ", ".join(zero[:5]) + (" ..." if len(zero) > 5 else "")
        yield Remark(f"the update of {len(zero)} of {all_modules} modules is zero: {shown}", zero[0])


def _zero_modules(evidence: Evidence) -> tuple[list[str], int]:
    """Return the modules with an all-zero factor, and how many there are."""
    if isinstance(evidence.adapter, Adapter):
        targets = evidence.adapter.targets
        return [name for name, one in targets.items() if not one.a.any() or not one.b.any()], len(targets)
    tensors = evidence.tensors
    zero = [
        module
        for module, halves in evidence.halves.items()
        if any(
            half is not None and half.name in tensors and not tensors[half.name].any() for half in (halves.a, halves.b)
        )
    ]
    return zero, len(evidence.halves)
