"""AdaLoRA (Zhang et al. 2023, arXiv:2303.10512): ``delta = scaling * B diag(E) A``, ranks pruned per target."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch

from compose.errors import AdapterFormatError
from compose.formats.peft_config import MAX_SCALING, LoraConfig, Pattern, parse_fields
from compose.formats.peft_keys import strip_prefix
from compose.formats.peft_kinds import KINDS, Found, KindTarget, Opened, Tensors, factor_dtype, unfit
from compose.formats.peft_refusals import KNOWN_FIELDS, refuse_variants

_FIELDS = KNOWN_FIELDS | frozenset(
    ["target_r", "init_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step"]
)


class _AdaLora:
    """As PEFT 0.21 loads it.

    The scaling is ``lora_alpha / (init_r + 1e-5)``, also where fewer rows are left: PEFT keeps the rank number of
    before the pruning. ``rank_pattern`` holds one mask of ``init_r`` entries per target; the file has the kept rows.
    """

    title = "AdaLoRA"
    parts = frozenset({"lora_A", "lora_B", "lora_E"})
    shared: frozenset[str] = frozenset()
    needs_base = ""
    empty = True

    @staticmethod
    def parse(config: Mapping[str, Any]) -> LoraConfig:
        plain = {  # PEFT's AdaLoRA ignores these fields of LoRA
            **config,
            "peft_type": "LORA",
            "init_r": config.get("init_r", 12),
            "rank_pattern": None,
            "alpha_pattern": None,
            "init_lora_weights": True,
            "use_rslora": False,
        }
        problems = refuse_variants(plain, known=_FIELDS)
        pattern = config.get("rank_pattern")
        if pattern is not None and not (isinstance(pattern, dict) and all(map(_is_mask, pattern.values()))):
            problems.append("rank_pattern must be an object of parameter names to lists of true and false")
        parsed = parse_fields(plain, problems, rank="init_r")
        if pattern and any(len(mask) != parsed.rank for mask in pattern.values()):
            raise AdapterFormatError(f"rank_pattern: every mask must have init_r = {parsed.rank} entries")
        masks = {_module(key): mask for key, mask in (pattern or {}).items()}
        ranks = {Pattern(path, path, frozenset(), anchored=True): sum(mask) for path, mask in masks.items()}
        return replace(parsed, ranks=tuple(ranks.items()))

    @staticmethod
    def target(opened: Opened, path: str) -> KindTarget:
        a, b, e = opened.matrices(path, "lora_A", "lora_B", "lora_E")
        full = opened.parsed.rank
        if unmet := [module.text for module, _ in opened.parsed.ranks if module.text not in opened.parts]:
            raise AdapterFormatError(f"rank_pattern names {unmet[0]!r}, but no tensor of the file belongs to it")
        expected = opened.parsed.declared_rank(path)
        rank = a.shape[0]
        if b.shape[1] != rank or e.shape != (rank, 1) or 0 in (a.shape[1], b.shape[0]):
            raise unfit(path, [a, b, e])
        if rank != expected:
            raise AdapterFormatError(
                f"target {path}: its tensors have rank {rank}, the configuration (init_r, rank_pattern) says "
                f"{expected}"
            )
        alpha = opened.parsed.alpha
        if alpha <= 0 and rank != full:
            raise AdapterFormatError(
                f"target {path}: lora_alpha {alpha:g} with pruned ranks is scaled differently by PEFT before saving "
                "and after loading; write the intended lora_alpha (above 0) into the configuration"
            )
        scaling = (alpha if alpha > 0 else full) / (full + 1e-5)
        if not abs(scaling) <= MAX_SCALING:
            raise AdapterFormatError(
                f"target {path}: scaling {scaling:g} is beyond the limit of {MAX_SCALING:g}; correct lora_alpha"
            )
        dtype = factor_dtype(a, b, e)
        factors = partial(_factors, a, b, e, dtype)
        return KindTarget("linear", rank, a.shape[1], b.shape[0], scaling, dtype, factors)


def _factors(a: Found, b: Found, e: Found, dtype: torch.dtype, tensors: Tensors) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors[a.name].to(dtype) * tensors[e.name].to(dtype), tensors[b.name].to(dtype)


def _is_mask(value: Any) -> bool:
    return isinstance(value, list) and all(type(item) is bool for item in value)


def _module(key: str) -> str:
    """The module of a key such as ``model.layers.0.q.lora_E`` (or ``lora_E.default``)."""
    return strip_prefix(key).partition(".lora_E")[0]


KINDS.register("ADALORA")(_AdaLora())
