"""Weights over a bank from the command line: a run folder, a report, a JSON file or JSON text."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.errors import ComposeError, IncompatibleError

if TYPE_CHECKING:
    from compose.bank import Bank
    from compose.engine.attach import AttachedModel
    from compose.engine.coefficients import Coefficients, Combine


@dataclass(frozen=True)
class ChosenWeights:
    """Weights by adapter and layer group.

    Attributes:
        names: Adapters, ``N``.
        values: ``(G, N)`` as lists; one row means one weight per adapter.
        combine: How they are combined.
        hashes: SHA-256 of the adapters' files that the weights were found with; empty when unknown.
    """

    names: tuple[str, ...]
    values: tuple[tuple[float, ...], ...]
    combine: Combine = "outputs"
    hashes: Mapping[str, str] | None = None

    def select(self, bank: Bank) -> Bank:
        """Return the part of ``bank`` the weights speak of.

        Raises:
            UnknownNameError: The bank lacks one of the adapters.
            IncompatibleError: An adapter's file is not the one the weights were found with.
        """
        part = bank.select(self.names)
        expected = {name: digest for name, digest in (self.hashes or {}).items() if digest}
        changed = [name for name, digest in part.hashes.items() if expected.get(name, digest) != digest]
        if changed:
            raise IncompatibleError(
                f"the weights were found with other files of {len(changed)} adapters (first {changed[0]!r}); "
                "give the bank of that run, or search again"
            )
        return part

    def on(self, attached: AttachedModel) -> Coefficients:
        """Return the coefficients for a model with exactly these adapters attached."""
        import torch

        from compose.engine.coefficients import Coefficients

        if len(self.values) == 1:
            return Coefficients(torch.tensor(self.values[0]), self.combine)
        return Coefficients(torch.tensor(self.values), self.combine, attached.layer_groups(len(self.values)))

    def summary(self) -> dict[str, Any]:
        """Return names, values and combine, for ``--json``."""
        return {"adapters": self.names, "values": self.values, "combine": self.combine}


def one_adapter(name: str) -> ChosenWeights:
    """Return one adapter at full strength."""
    return ChosenWeights((name,), ((1.0,),))


def read_weights(source: str) -> ChosenWeights | None:
    """Read ``--weights``; ``None`` when a run kept the base model.

    Args:
        source: A run folder (its ``report.json``), a JSON file, or JSON text; JSON is a report or ``{name: weight}``.

    Raises:
        ComposeError: Nothing there, or not weights.
    """
    text = _text(source)
    try:
        record = json.loads(text)
    except json.JSONDecodeError as error:
        raise ComposeError(f"--weights {source!r}: not valid JSON ({error})") from None
    if not isinstance(record, dict) or not record:
        raise ComposeError(f"--weights {source!r}: expected a run's report or an object of names and weights")
    if "schema_version" in record:
        return _from_report(record, source)
    bad = [name for name, value in record.items() if not _is_weight(value)]
    if bad:
        raise ComposeError(f"--weights {source!r}: the weight of {bad[0]!r} must be a finite number")
    return ChosenWeights(tuple(record), (tuple(map(float, record.values())),))


def _text(source: str) -> str:
    if source.lstrip().startswith("{"):
        return source
    path = Path(source)
    file = path / "report.json" if path.is_dir() else path
    if not file.is_file():
        raise ComposeError(f"--weights: no such file {file}; give a run folder, a JSON file, or JSON text")
    return file.read_text(encoding="utf-8")


def _from_report(report: Mapping[str, Any], source: str) -> ChosenWeights | None:
    try:
        names, values = report["weights"]["adapters"], report["weights"]["values"]
        nonzero = [index for index in range(len(names)) if any(row[index] for row in values)]
        # Layer groups count the layers that the attached adapters touch, so with several groups all candidates stay.
        used = list(range(len(names))) if nonzero and len(values) > 1 else nonzero
        hashes = {adapter["name"]: adapter["sha256"] for adapter in report["bank"]["adapters"]}
        combine = report["settings"]["combine"]
        rows = tuple(tuple(float(row[index]) for index in used) for row in values)
    except (KeyError, IndexError, TypeError) as error:
        raise ComposeError(f"--weights {source!r}: not a report of a few-shot search ({error!r})") from None
    if not used:
        return None
    return ChosenWeights(tuple(names[index] for index in used), rows, combine, hashes)


def _is_weight(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
