"""Kinds of PEFT adapters other than plain LoRA: the interface of a kind and the registry; one module per kind.

Letters: ``O`` output and ``I`` input width of a target, ``R`` rank of the exact factors, ``r`` the kind's own rank.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import torch

from compose.adapter import TargetKind
from compose.errors import AdapterFormatError
from compose.formats.peft_config import LoraConfig
from compose.registry import Registry

Tensors = Mapping[str, torch.Tensor]
Widths = Callable[[str], tuple[int, int]]
"""Module path -> ``(O, I)`` of the base model's layer."""

KINDS: Registry[Kind] = Registry("kind of adapter", package="compose.formats")


_OF_LORA = frozenset({"DORA", "MERGED_LORA"})
"""Kinds that are fields of a LoRA configuration and no ``peft_type`` of their own."""


class Found(NamedTuple):
    """One tensor of the file, from the header."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


class BaseLayer(NamedTuple):
    """A layer of the base model: ``weight (O, I)`` and ``bias (O,)``, in float64."""

    weight: torch.Tensor
    bias: torch.Tensor | None


@dataclass(frozen=True, eq=False)
class KindTarget:
    """What is known of one target before its values are.

    Attributes:
        kind: ``"linear"`` or ``"embedding"``.
        rank: ``R`` of the exact factors; 0 where there are none, and for an update that is exactly zero.
        in_features: ``I``; 0 when only the base model tells.
        out_features: ``O``; 0 when only the base model tells.
        scaling: The multiplier of the exact factors.
        dtype: Of the exact factors: float64 for float64 files, else float32, in which products of two half-precision
            entries are exact.
        factors: Tensors of the file -> exact ``a (R, I)`` and ``b (O, R)`` without scaling; None: no exact low-rank
            form, or not without the base model.
        dense: Tensors of the file and the base model's layer -> the whole update ``(O, I)`` in float64; None where
            the factors are all that is needed.
        reason: Why there are no factors.
    """

    kind: TargetKind
    rank: int
    in_features: int
    out_features: int
    scaling: float
    dtype: torch.dtype
    factors: Callable[[Tensors], tuple[torch.Tensor, torch.Tensor]] | None = None
    dense: Callable[[Tensors, BaseLayer | None], torch.Tensor] | None = None
    reason: str = ""


@dataclass(frozen=True, eq=False)
class Opened:
    """An adapter whose names are sorted out and whose targets are not.

    Attributes:
        config: The source configuration.
        parsed: Its checked fields, as if they were LoRA's.
        parts: Module path -> part -> tensor of the file.
        shared: Part -> tensor of the file that belongs to all targets.
        widths: Of the base model's layers, None when there is no base model.
    """

    config: Mapping[str, Any]
    parsed: LoraConfig
    parts: Mapping[str, Mapping[str, Found]]
    shared: Mapping[str, Found]
    widths: Widths | None

    def matrices(self, path: str, *parts: str, besides: Collection[str] = ()) -> list[Found]:
        """Return these tensors of one target.

        Raises:
            AdapterFormatError: One is missing, one that is neither here nor in ``besides`` is there, or one has not 2
                dimensions.
        """
        have = self.parts[path]
        if missing := [part for part in parts if part not in have]:
            raise AdapterFormatError(f"target {path}: {', '.join(missing)} missing; the adapter is incomplete")
        if extra := [have[part].name for part in have if part not in parts and part not in besides]:
            raise AdapterFormatError(f"target {path}: {', '.join(extra)} is used by nothing")
        for part in parts:
            if len(have[part].shape) != 2:
                raise AdapterFormatError(
                    f"target {path}: {part} has shape {have[part].shape}; only linear layers and embeddings (2 "
                    "dimensions) are supported, not convolutions"
                )
        return [have[part] for part in parts]


class Kind(Protocol):
    """One kind of adapter. Implementations keep no state.

    Attributes:
        title: What people call it.
        parts: Last segments of its tensors' names, after the module's path.
        shared: Names of tensors that belong to all targets.
        needs_base: Why it cannot be opened without its base model; ``""`` when it can.
        empty: Whether tensors without entries are allowed (ranks pruned to 0).
    """

    title: str
    parts: frozenset[str]
    shared: frozenset[str]
    needs_base: str
    empty: bool

    def parse(self, config: Mapping[str, Any]) -> LoraConfig:
        """Check the configuration.

        Raises:
            AdapterFormatError: Names every problem.
        """
        ...

    def target(self, opened: Opened, path: str) -> KindTarget:
        """Resolve one target.

        Raises:
            AdapterFormatError: Its tensors are missing, too many or do not fit.
        """
        ...


def kind_of(config: Mapping[str, Any]) -> Kind | None:
    """Return the kind of a configuration; None for plain LoRA and for kinds that are not known."""
    name = config.get("peft_type")
    if name == "LORA":
        if config.get("use_dora") is True:
            return KINDS["DORA"]
        return KINDS["MERGED_LORA"] if config.get("enable_lora") else None
    return KINDS[name] if isinstance(name, str) and name not in _OF_LORA and name in KINDS else None


def factor_dtype(*found: Found) -> torch.dtype:
    """Return the dtype of exact factors made of these tensors."""
    return torch.float64 if any(one.dtype == torch.float64 for one in found) else torch.float32


def unfit(path: str, found: list[Found]) -> AdapterFormatError:
    """Return the error for tensors whose shapes do not fit together."""
    shapes = ", ".join(f"{one.name.rpartition('.')[2]} {one.shape}" for one in found)
    return AdapterFormatError(f"target {path}: shapes do not fit together: {shapes}")
