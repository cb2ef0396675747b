"""The configuration: numbers that decide the scaling, names, and fields that other programs act on."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

from compose.errors import AdapterFormatError
from compose.formats.peft_config import MAX_SCALING, check_targets, parse_fields
from compose.formats.peft_kinds import KINDS
from compose.hub_index.audit.evidence import Evidence
from compose.hub_index.audit.rule import Remark, rule
from compose.hub_index.audit.rules.tensors import MAX_RANK

_LIBRARIES = ("transformers", "peft", "torch", "diffusers", "sentence_transformers", "timm")
_REPEATED_GROUP = re.compile(r"[+*}]\)+[+*{]")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*/[A-Za-z0-9][A-Za-z0-9._-]*")


@rule("config.text", "high", hard=True)
def text_is_strict_json(evidence: Evidence) -> Iterator[Remark]:
    """The configuration is no strict JSON object: a double key, NaN, infinity, endless nesting, other text."""
    if evidence.config_problem:
        yield Remark(evidence.config_problem)


@rule("config.kind", "high", hard=True)
def kind_is_known(evidence: Evidence) -> Iterator[Remark]:
    """The kind of adapter is missing or unknown."""
    kind = (evidence.config or {}).get("peft_type")
    if evidence.config is not None and not (kind == "LORA" or (isinstance(kind, str) and kind in KINDS)):
        yield Remark(f"peft_type {kind!r:.60}; known are LORA, {', '.join(one for one in KINDS if one != 'DORA')}")


@rule("config.scaling", "critical", hard=True)
def scaling_is_bounded(evidence: Evidence) -> Iterator[Remark]:
    """A scaling that is not finite, or beyond 1e4 in magnitude."""
    config = evidence.config or {}
    rank = config.get("r", 8)
    root = config.get("use_rslora") is True
    for key, alpha in _numbers(config, "lora_alpha", "alpha_pattern"):
        if not math.isfinite(alpha):
            yield Remark(f"{key} is {alpha}")
        elif isinstance(rank, int) and 0 < rank < 2**31:
            scaling = alpha / (math.sqrt(rank) if root else rank)
            if abs(scaling) > MAX_SCALING:
                yield Remark(f"{key} {alpha:g} over r {rank} gives a scaling of {scaling:g}, beyond {MAX_SCALING:g}")


@rule("config.negative", "medium")
def scaling_is_not_negative(evidence: Evidence) -> Iterator[Remark]:
    """A negative alpha: the adapter subtracts what its factors say."""
    for key, alpha in _numbers(evidence.config or {}, "lora_alpha", "alpha_pattern"):
        if alpha < 0:
            yield Remark(f"{key} is {alpha:g}")


@rule("config.rank", "high", hard=True)
def rank_is_bounded(evidence: Evidence) -> Iterator[Remark]:
    """A rank bomb: PEFT allocates factors of the declared rank before it looks at the weights."""
    for key, rank in _numbers(evidence.config or {}, "r", "rank_pattern"):
        if not 1 <= rank <= MAX_RANK or rank != int(rank):
            yield Remark(f"{key} is {rank:g}; allowed are 1 to {MAX_RANK}")


@rule("config.targets", "high", hard=True)
def targets_are_those_of_the_file(evidence: Evidence) -> Iterator[Remark]:
    """Targets that the configuration lists and the file lacks, or the other way round."""
    config = evidence.config
    if config is None or not evidence.halves:
        return
    try:
        parsed = parse_fields(config, [])
    except AdapterFormatError:
        return
    for problem in check_targets(parsed, list(evidence.halves)):
        yield Remark(problem)


@rule("config.import", "high")
def names_no_code(evidence: Evidence) -> Iterator[Remark]:
    """A field names a module that other programs import. Nothing here imports anything a configuration names."""
    config = evidence.config or {}
    mapping = config.get("auto_mapping")
    library = mapping.get("parent_library") if isinstance(mapping, dict) else None
    if isinstance(library, str) and library.partition(".")[0] not in _LIBRARIES:
        yield Remark(f"auto_mapping.parent_library {library!r:.120}")
    core = config.get("megatron_core")
    if core not in (None, "megatron.core"):
        yield Remark(f"megatron_core {core!r:.120}")
    for key in ("trust_remote_code", "tokenizer_kwargs"):
        if config.get(key):
            yield Remark(f"{key} {config[key]!r:.120}")


@rule("config.pattern", "high")
def patterns_end(evidence: Evidence) -> Iterator[Remark]:
    """A regular expression that repeats a repeated group can run for ever in PEFT; here none is ever run."""
    config = evidence.config or {}
    texts = [(key, config.get(key)) for key in ("target_modules", "exclude_modules", "layers_pattern")]
    for key in ("rank_pattern", "alpha_pattern"):
        found = config.get(key)
        texts += [(key, text) for text in found] if isinstance(found, dict) else []
    for key, text in texts:
        if isinstance(text, str) and _REPEATED_GROUP.search(text):
            yield Remark(f"{key} {text!r:.120}")


@rule("config.base", "low")
def base_is_named_by_repository(evidence: Evidence) -> Iterator[Remark]:
    """The base model is not told, or by a bare name or a local path: many models could be meant."""
    config = evidence.config
    base = config.get("base_model_name_or_path") if config is not None else None
    if config is None or (isinstance(base, str) and _REPOSITORY.fullmatch(base) and ".." not in base):
        return
    yield Remark(f"base_model_name_or_path is {base!r:.200}, not owner/name" if base else "no base model is named")


@rule("config.base-path", "medium")
def base_leads_nowhere_else(evidence: Evidence) -> Iterator[Remark]:
    """The base model's name climbs out of a folder; a program that opens it opens another place."""
    base = (evidence.config or {}).get("base_model_name_or_path")
    if isinstance(base, str) and (".." in re.split(r"[/\\]", base) or "\0" in base):
        yield Remark(f"base_model_name_or_path {base!r:.200}")


@rule("config.revision", "low")
def revision_is_a_commit(evidence: Evidence) -> Iterator[Remark]:
    """A branch or a tag where a commit should be: what it means can change."""
    found = [("revision", (evidence.config or {}).get("revision"))]
    if evidence.record is not None:
        found += [
            ("revision in the index", evidence.record.revision),
            ("base_revision in the index", evidence.record.base_revision),
        ]
    for key, value in found:
        if value and not (isinstance(value, str) and _COMMIT.fullmatch(value)):
            yield Remark(f"{key} is {value!r:.120}, not a commit of 40 hexadecimal digits")


@rule("config.refused", "high", hard=True)
def loader_accepts(evidence: Evidence) -> Iterator[Remark]:
    """The loader refuses the adapter; what else is wrong stands in the other findings."""
    if not evidence.blocked and isinstance(evidence.strict, str):
        yield Remark(evidence.strict)


def _numbers(config: Any, field: str, pattern: str) -> Iterator[tuple[str, float]]:
    """Yield the numbers of a field and of the pattern that overrides it."""
    found = config.get(pattern)
    named = [(f"{pattern}[{key!r:.80}]", value) for key, value in found.items()] if isinstance(found, dict) else []
    for key, value in [(field, config.get(field)), *named]:
        if isinstance(value, int | float) and not isinstance(value, bool):
            yield key, float(value) if abs(value) < 1e308 else math.inf
