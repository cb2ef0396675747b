"""LowRank and Adapter: frozen values that hold one trained adapter, target by target.

Shape letters: ``R`` rank, ``I`` input width of the target, ``O`` output width of the target.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

import torch

from compose.errors import IncompatibleError

TargetKind = Literal["linear", "embedding"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """A low-rank update of one target: ``delta = scaling * b @ a``.

    Attributes:
        a: ``(R, I)``. For an embedding ``I`` is the vocabulary size.
        b: ``(O, R)``, same dtype and device as ``a``.
        scaling: The multiplier really applied (alpha/R, or alpha/sqrt(R) for rsLoRA), computed once at loading.
        kind: ``"linear"`` (also GPT-2's Conv1D) or ``"embedding"``.
    """

    a: torch.Tensor
    b: torch.Tensor
    scaling: float
    kind: TargetKind = "linear"

    def __post_init__(self) -> None:
        if self.a.dim() != 2 or self.b.dim() != 2 or self.a.shape[0] != self.b.shape[1]:
            raise IncompatibleError(
                f"a must be (R, I) and b (O, R) with one R, got {tuple(self.a.shape)} and {tuple(self.b.shape)}"
            )

    @property
    def rank(self) -> int:
        """``R``."""
        return self.a.shape[0]

    @property
    def in_features(self) -> int:
        """``I``."""
        return self.a.shape[1]

    @property
    def out_features(self) -> int:
        """``O``."""
        return self.b.shape[0]

    def delta(self) -> torch.Tensor:
        """Return the dense update ``(O, I)`` in the factors' dtype."""
        return self.scaling * (self.b @ self.a)

    def norm(self) -> float:
        """Return the Frobenius norm of the delta through ``(R, R)`` Gram matrices, in float64."""
        a, b = self.a.double(), self.b.double()
        squared = float(((b.T @ b) * (a @ a.T)).sum())
        return abs(self.scaling) * math.sqrt(max(squared, 0.0))


@dataclass(frozen=True)
class Source:
    """Where an adapter's configuration came from, so that an unchanged adapter is written back as it was.

    Attributes:
        config_text: The configuration file verbatim.
        targets: The targets the adapter had when it was read.
    """

    config_text: str
    targets: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Adapter:
    """A named set of low-rank updates for one base model.

    Attributes:
        name: Unique within a bank.
        base: Identifier of the base model the adapter was trained on; ``""`` when unknown.
        targets: Module path inside the base model -> update.
        config: The whole source configuration, kept for a faithful round trip.
        full_modules: Full replacement weights saved beside the adapter (PEFT ``modules_to_save``), by parameter path.
            They are kept and reported; composition never applies them.
        sha256: Hash of the weight file's bytes; ``""`` for an adapter made in memory.
        source: The configuration's text and targets as read; None for an adapter made in memory. A format writes
            the text back only while it still describes ``targets``, so values made from this one may keep it.
    """

    name: str
    base: str
    targets: Mapping[str, LowRank]
    config: Mapping[str, Any] = field(default_factory=dict)
    full_modules: Mapping[str, torch.Tensor] = field(default_factory=dict)
    sha256: str = ""
    source: Source | None = None

    def __post_init__(self) -> None:
        for attribute in ("targets", "config", "full_modules"):
            object.__setattr__(self, attribute, MappingProxyType(dict(getattr(self, attribute))))

    @property
    def ranks(self) -> dict[str, int]:
        """Rank per target."""
        return {target: update.rank for target, update in self.targets.items()}

    @property
    def num_parameters(self) -> int:
        """Entries of all factors."""
        return sum(update.a.numel() + update.b.numel() for update in self.targets.values())
