"""Merged: the result of a merge, to be saved as an adapter or added to a model's weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from compose.adapter import Adapter, LowRank, TargetKind
from compose.bank import Bank
from compose.errors import IncompatibleError
from compose.files.publish import publish_folder
from compose.formats.peft import adapter_files
from compose.merging.deltas import Factors, Streamed

if TYPE_CHECKING:
    from compose.engine.merge_facts import Diagnostics

RECIPE = "merge.json"

ROWS = 512
"""Lines of a delta computed at once when it is added to a weight."""


class MergedTarget(NamedTuple):
    """One target's merged delta, and what recompression lost of it (relative Frobenius norm; 0 without one)."""

    delta: Factors | Streamed
    kind: TargetKind
    error: float

    def on_cpu(self) -> MergedTarget:
        """The same with its factors on the CPU; lines that are computed later stay where they are."""
        if isinstance(self.delta, Streamed):
            return self
        return self._replace(delta=Factors(*(factor.to("cpu") for factor in self.delta)))


@dataclass(frozen=True, eq=False)
class Merged:
    """A merge of adapters.

    Attributes:
        base: Of the adapters.
        targets: Target -> merged delta.
        recipe: Method, options, seed and parents (names, hashes, weights).
        dtype: Of the adapter's factors; `targets` hold them as they were computed.
        bank: What was merged; None where it is not known.
    """

    base: str
    targets: Mapping[str, MergedTarget]
    recipe: Mapping[str, Any]
    dtype: torch.dtype = torch.float32
    bank: Bank | None = None

    @property
    def low_rank(self) -> bool:
        """Whether the result is an adapter without further ado."""
        return all(isinstance(target.delta, Factors) for target in self.targets.values())

    @cached_property
    def adapter(self) -> Adapter:
        """The merged adapter: scaling 1 everywhere, targets of rank 0 left out.

        Raises:
            IncompatibleError: The method's result has no low-rank form, or nothing is left.
        """
        if not self.low_rank:
            raise IncompatibleError(
                f"{self.recipe['method']!r} changes single entries, so its result is no low-rank adapter: "
                "give rank= or energy= to recompress it (the error is reported), or use merge_into(model)"
            )
        updates = {
            target: LowRank(merged.delta.a.to(self.dtype), merged.delta.b.to(self.dtype), 1.0, merged.kind)
            for target, merged in self.targets.items()
            if isinstance(merged.delta, Factors) and merged.delta.a.shape[0]
        }
        if not updates:
            raise IncompatibleError("the result is zero everywhere: the base model, there is no adapter to write")
        return Adapter("merged", self.base, updates)

    @cached_property
    def diagnostics(self) -> Diagnostics:
        """Lengths, angles, shared subspaces, energy kept and sign conflicts, of all targets.

        `compose.engine.diagnostics.diagnose` has options: fewer targets, all lines, another device.

        Raises:
            IncompatibleError: The bank is not known.
        """
        from compose.engine.diagnostics import diagnose  # it needs merge, which needs this module

        if self.bank is None:
            raise IncompatibleError(
                "this result does not know its bank; use compose.engine.diagnostics.diagnose(bank, weights, merged)"
            )
        return diagnose(self.bank, merged=self)

    def save(self, folder: str | Path, *, overwrite: bool = False, beside: Mapping[str, bytes] | None = None) -> Path:
        """Write a PEFT folder, with the recipe as ``merge.json``, and return it; see `adapter` for what can be.

        Args:
            folder: New, or empty.
            overwrite: Replace what is there.
            beside: Further files, name -> content; the folder appears with all of them or not at all.
        """
        files = adapter_files(self.adapter) | {RECIPE: self._recipe_bytes()} | dict(beside or {})
        return publish_folder(files, Path(folder), overwrite=overwrite)

    def write_recipe(self, folder: Path, *, beside: Mapping[str, bytes] | None = None) -> None:
        """Write ``merge.json``, and what else shall lie there, beside a model that the merge went into."""
        for name, content in ({RECIPE: self._recipe_bytes()} | dict(beside or {})).items():
            (folder / name).write_bytes(content)

    def _recipe_bytes(self) -> bytes:
        return json.dumps(dict(self.recipe), indent=2).encode()

    @property
    def relative_error(self) -> float:
        """What recompression lost over all targets: ``||lost|| / ||merged||``."""
        lost = total = 0.0
        for merged in self.targets.values():
            if merged.error and isinstance(merged.delta, Factors):
                kept = LowRank(merged.delta.a, merged.delta.b, 1.0).norm() ** 2
                whole = kept / (1 - merged.error**2) if merged.error < 1 else kept
                lost, total = lost + whole - kept, total + whole
            elif isinstance(merged.delta, Factors):
                total += LowRank(merged.delta.a, merged.delta.b, 1.0).norm() ** 2
        return (lost / total) ** 0.5 if total else 0.0

    @torch.no_grad()
    def merge_into(self, model: nn.Module) -> Undo:
        """Add the deltas to the model's weights, in float32 or better, all or nothing.

        Returns:
            What takes it back: it holds a copy of every changed weight.

        Raises:
            IncompatibleError: A target does not exist, has another shape, its weight is not floating point or shared
                with another module, or the delta is not finite.
        """
        places = [_place(model, target, merged) for target, merged in self.targets.items()]
        undo = Undo({})
        try:
            for weight, transposed, merged in places:
                if weight not in undo.before:
                    undo.before[weight] = weight.detach().clone()
                if not _add(weight.detach(), transposed, merged.delta):
                    raise IncompatibleError("the merged delta is not finite; nothing was changed")
        except BaseException:
            undo()
            raise
        return undo


@dataclass(frozen=True, eq=False)
class Undo:
    """Takes a merge back: call it once.

    Attributes:
        before: Parameter -> its values before the merge.
    """

    before: dict[nn.Parameter, torch.Tensor]

    @torch.no_grad()
    def __call__(self) -> None:
        """Restore every weight to the bit."""
        for weight, values in self.before.items():
            weight.copy_(values)


def _place(model: nn.Module, target: str, merged: MergedTarget) -> tuple[nn.Parameter, bool, MergedTarget]:
    """The parameter of a target, and whether it holds the transposed delta."""
    try:
        module = model.get_submodule(target)
    except AttributeError:
        raise IncompatibleError(f"the model has no module {target!r}; it is not the adapters' base") from None
    module = getattr(module, "base_layer", module)  # a bank may be attached
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or not weight.is_floating_point():
        raise IncompatibleError(
            f"{target}: its weight is no floating point parameter (quantised?); nothing was changed"
        )
    shared = [name for name, one in model.named_modules() if any(own is weight for own in one._parameters.values())]
    if len(shared) > 1:
        raise IncompatibleError(
            f"{target}: its weight is tied ({', '.join(shared)}), so a merge would change both places; untie it first "
            "(model.config.tie_word_embeddings = False, and a copy of the weight)"
        )
    transposed = merged.kind == "embedding" or type(module).__name__ == "Conv1D"
    delta = merged.delta
    shape = (delta.b.shape[0], delta.a.shape[1]) if isinstance(delta, Factors) else delta.shape
    if tuple(weight.shape) != (shape[::-1] if transposed else shape):
        raise IncompatibleError(f"{target}: the delta is {shape}, the model's weight {tuple(weight.shape)}")
    return weight, transposed, merged


def _add(weight: torch.Tensor, transposed: bool, delta: Factors | Streamed) -> bool:
    """Add line by line, rounding the sum to the weight's dtype once; return whether all of it was finite."""
    finite = True
    lines = weight.T if transposed else weight
    for low in range(0, lines.shape[0], ROWS):
        high = min(low + ROWS, lines.shape[0])
        change = delta.b[low:high] @ delta.a if isinstance(delta, Factors) else delta.rows(low, high)
        exact = torch.promote_types(torch.float32, torch.promote_types(weight.dtype, change.dtype))
        finite = finite and bool(change.isfinite().all())
        lines[low:high] = (lines[low:high].to(exact) + change.to(weight.device, exact)).to(weight.dtype)
    return finite
