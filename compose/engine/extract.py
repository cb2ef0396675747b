"""extract: a full fine-tune as an adapter, by the best low-rank form of every weight's change."""

from __future__ import annotations

from collections.abc import Sequence
from fnmatch import fnmatchcase
from typing import Any, NamedTuple

import torch
from torch import nn

from compose.adapter import Adapter, LowRank, TargetKind
from compose.errors import IncompatibleError
from compose.merging.deltas import compact_dense


class Extracted(NamedTuple):
    """What `extract` returns.

    Attributes:
        adapter: Low-rank changes of every linear layer and embedding that changed.
        errors: Target -> ``||lost|| / ||change||``.
        left_out: Parameters that changed but hold no such layer (norms, biases ...): not in the adapter.
    """

    adapter: Adapter
    errors: dict[str, float]
    left_out: tuple[str, ...]


@torch.no_grad()
def extract(
    tuned: nn.Module,
    base: nn.Module,
    *,
    rank: int | None = None,
    energy: float | None = None,
    targets: Sequence[str] = ("*",),
    name: str = "extracted",
) -> Extracted:
    """Return the best adapter (Eckart-Young per target) for what fine-tuning changed.

    Args:
        tuned: The fine-tuned model.
        base: The model it started from, with the same modules; weights may differ in dtype.
        rank: At most so many singular values per target.
        energy: The fewest that hold this share of the squared norm, in (0, 1].
        targets: Patterns of module paths to take.
        name: Of the adapter.

    Raises:
        IncompatibleError: Neither rank nor energy is given, modules or shapes differ, a pattern matches nothing, or
            nothing changed.
    """
    if (rank is None and energy is None) or (rank is not None and rank < 1) or not (energy is None or 0 < energy <= 1):
        raise IncompatibleError(f"extract needs rank >= 1, energy in (0, 1], or both; got {rank} and {energy}")
    layers = {path: kind for path, module in base.named_modules() if (kind := _kind(module)) is not None}
    for pattern in targets:
        if not any(fnmatchcase(path, pattern) for path in layers):
            some = ", ".join(list(layers)[:3])
            raise IncompatibleError(f"the pattern {pattern!r} matches no layer; there are e.g. {some}")
    changed = _changed(tuned, base)
    updates, errors = {}, {}
    for path, kind in layers.items():
        if f"{path}.weight" not in changed or not any(fnmatchcase(path, pattern) for pattern in targets):
            continue
        change = _change(tuned, base, path)
        (a, b), errors[path] = compact_dense(change, rank, energy)
        updates[path] = LowRank(a.contiguous(), b.contiguous(), 1.0, kind)
    if not updates:
        raise IncompatibleError("nothing changed in the layers that were looked at; there is no adapter to make")
    rest = tuple(sorted(changed - {f"{path}.weight" for path in updates}))
    return Extracted(Adapter(name, str(getattr(base, "name_or_path", "")), updates), errors, rest)


def _kind(module: nn.Module) -> TargetKind | None:
    if isinstance(module, nn.Embedding):
        return "embedding"
    return "linear" if isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D" else None


def _changed(tuned: nn.Module, base: nn.Module) -> set[str]:
    """Names of all parameters whose values differ; tied weights count under their first name."""
    before, after = dict(base.named_parameters()), dict(tuned.named_parameters())
    if before.keys() != after.keys():
        odd = sorted(before.keys() ^ after.keys())
        raise IncompatibleError(
            f"the two models differ in {len(odd)} parameters, e.g. {odd[0]!r}; give the model that was tuned from base"
        )
    shapes = [key for key in before if before[key].shape != after[key].shape]
    if shapes:
        key = shapes[0]
        raise IncompatibleError(f"{key}: {tuple(before[key].shape)} in base, {tuple(after[key].shape)} when tuned")
    return {key for key in before if not torch.equal(before[key].float(), after[key].to(before[key].device).float())}


def _change(tuned: nn.Module, base: nn.Module, path: str) -> torch.Tensor:
    """The change of one layer as ``(O, I)`` float32 on the CPU."""
    module: Any = base.get_submodule(path)
    other: Any = tuned.get_submodule(path)
    change = other.weight.cpu().float() - module.weight.cpu().float()
    stored_as_io = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
    return change.T if stored_as_io else change
