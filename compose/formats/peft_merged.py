"""Fused LoRA of PEFT before 0.3 (``enable_lora``): one layer holds several projections, each with its own factors.

``lora_A`` is ``(r E, I)`` for the ``E`` projections that are enabled out of ``n``; ``lora_B`` is the weight of a
grouped convolution of width 1, ``(O E / n, r E / G, 1)`` with ``G`` groups: group ``g`` of its rows sees only the
``g``-th share of the rows of A. What comes out fills the enabled projections' rows of the layer; the rest is zero.
(``MergedLinear`` of peft 0.1 and 0.2, after loralib; the former always has two groups, the latter ``E``.)
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from compose.errors import AdapterFormatError
from compose.formats.peft_config import LoraConfig, parse_config
from compose.formats.peft_kinds import KINDS, Found, KindTarget, Opened, Tensors, factor_dtype, unfit

MAX_PROJECTIONS = 64


class _MergedLora:
    """``peft_type`` LORA with ``enable_lora``; exactly low rank: the factors of all projections side by side."""

    title = "fused LoRA"
    parts = frozenset({"lora_A", "lora_B"})
    shared: frozenset[str] = frozenset()
    needs_base = ""
    empty = False

    @staticmethod
    def parse(config: Mapping[str, Any]) -> LoraConfig:
        enabled = config.get("enable_lora")
        listed = enabled if isinstance(enabled, list) else []
        if not any(listed) or len(listed) > MAX_PROJECTIONS or not all(type(item) is bool for item in listed):
            raise AdapterFormatError(
                f"enable_lora must be a list of at most {MAX_PROJECTIONS} times true and false, got {enabled!r:.100}; "
                "it says which projections of a fused layer are adapted, in order"
            )
        return parse_config({**config, "enable_lora": None})

    @staticmethod
    def target(opened: Opened, path: str) -> KindTarget:
        have = opened.parts[path]
        if missing := [part for part in ("lora_A", "lora_B") if part not in have]:
            raise AdapterFormatError(f"target {path}: {', '.join(missing)} missing; the adapter is incomplete")
        a, b = have["lora_A"], have["lora_B"]
        enabled: list[bool] = opened.config["enable_lora"]
        chosen, rank = sum(enabled), opened.parsed.declared_rank(path)
        if len(a.shape) != 2 or len(b.shape) not in (2, 3) or b.shape[2:] not in ((), (1,)) or 0 in a.shape + b.shape:
            raise unfit(path, [a, b])
        rows, width = b.shape[:2]
        groups = a.shape[0] // width
        if a.shape[0] != rank * chosen or a.shape[0] % width or rows % chosen or rows % groups:
            raise AdapterFormatError(
                f"target {path}: lora_A {a.shape} and lora_B {b.shape} do not fit rank {rank} for {chosen} of "
                f"{len(enabled)} projections (enable_lora)"
            )
        out = rows // chosen * len(enabled)
        dtype = factor_dtype(a, b)
        factors = partial(_factors, a, b, groups, tuple(enabled), dtype)
        return KindTarget("linear", a.shape[0], a.shape[1], out, opened.parsed.scaling(path, rank), dtype, factors)


def _factors(
    a: Found, b: Found, groups: int, enabled: tuple[bool, ...], dtype: torch.dtype, tensors: Tensors
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return A ``(r E, I)`` as it is and B ``(O, r E)`` with zeros where a row does not see a rank row."""
    grouped = tensors[b.name].to(dtype).reshape(groups, -1, b.shape[1])
    diagonal = torch.block_diag(*grouped)
    whole = diagonal.new_zeros(len(enabled), b.shape[0] // sum(enabled), a.shape[0])
    whole[list(enabled)] = diagonal.view(sum(enabled), -1, a.shape[0])
    return tensors[a.name].to(dtype), whole.flatten(0, 1)


KINDS.register("MERGED_LORA")(_MergedLora())
