"""Names and shapes of the tensors: what the adapter touches, from the header alone."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator

from compose.formats.peft_config import is_inside
from compose.formats.peft_keys import EMBEDDING_NAMES, is_embedding_copy, strip_prefix
from compose.hub_index.audit.evidence import Evidence
from compose.hub_index.audit.rule import Remark, rule
from compose.hub_index.audit.tensor_names import factor_of

MAX_RANK = 1024
_LAYER = re.compile(r"(?<=\.)\d+(?=\.)")


@rule("tensors.pair", "high", hard=True)
def factors_come_in_pairs(evidence: Evidence) -> Iterator[Remark]:
    """A factor without its other half: PEFT would fill it with initial values."""
    if not _is_plain_lora(evidence):
        return
    for module, halves in evidence.halves.items():
        if (halves.a is None) != (halves.b is None):
            yield Remark(f"{module} has only factor {'B' if halves.a is None else 'A'}", module)


@rule("tensors.shape", "high", hard=True)
def factors_fit(evidence: Evidence) -> Iterator[Remark]:
    """The two factors of a module are no matrices of one rank."""
    if (evidence.config or {}).get("enable_lora"):  # fused LoRA: B is the weight of a grouped convolution
        return
    for module, halves in evidence.halves.items():
        if halves.a is not None and halves.b is not None and not halves.fits:
            shapes = f"A {list(halves.a.shape)!r:.60} and B {list(halves.b.shape)!r:.60}"
            yield Remark(f"{module}: {shapes} differ in rank; A is (rank, in), B is (out, rank)", module)


@rule("tensors.rank", "high", hard=True)
def ranks_are_bounded(evidence: Evidence) -> Iterator[Remark]:
    """A rank bomb: a rank larger than the module is wide, or than any adapter has."""
    for module, halves in evidence.halves.items():
        if halves.a is not None and halves.b is not None and halves.fits:
            rank, most = halves.a.shape[0], min(halves.a.shape[1], halves.b.shape[0], MAX_RANK)
            if rank > most:
                yield Remark(f"{module} has rank {rank:,}; at most {most:,} means something there", module)


@rule("tensors.foreign", "high", hard=True)
def nothing_but_factors(evidence: Evidence) -> Iterator[Remark]:
    """Tensors that are no factors: whole weights that replace the base's, or tensors of no use."""
    if not _is_plain_lora(evidence):
        return
    saved = _saved_modules(evidence)
    for tensor in evidence.raw.tensors if evidence.raw is not None else ():
        if factor_of(tensor.name) is not None:
            continue
        path = strip_prefix(tensor.name)
        declared = any(is_inside(path, one) for one in saved) or is_embedding_copy(path, evidence.halves)
        if not declared:
            yield Remark(f"{tensor.name} is neither a LoRA factor nor named in modules_to_save")
        elif not evidence.full_modules:
            yield Remark(f"{tensor.name} replaces a whole weight (modules_to_save); allow it only if you expect it")


@rule("tensors.full", "medium")
def full_modules_are_told(evidence: Evidence) -> Iterator[Remark]:
    """Whole weights that were allowed are still told."""
    if evidence.full_modules and (saved := _saved_modules(evidence)):
        yield Remark(f"modules_to_save replaces whole weights: {', '.join(saved)}; composition never applies them")


@rule("tensors.embedding", "medium")
def embeddings_are_told(evidence: Evidence) -> Iterator[Remark]:
    """The embedding or the output matrix is touched: every token of every prompt is affected."""
    touched = [module for module in _modules(evidence) if module.rpartition(".")[2] in EMBEDDING_NAMES]
    touched += [one for one in _saved_modules(evidence) if one.rpartition(".")[2] in EMBEDDING_NAMES]
    for module in dict.fromkeys(touched):
        yield Remark(f"{module} is an embedding or an output matrix", module)


@rule("tensors.gaps", "medium")
def layers_are_complete(evidence: Evidence) -> Iterator[Remark]:
    """Layers of a series are missing although the configuration does not leave them out."""
    config = evidence.config or {}
    listed = config.get("target_modules")
    named = not isinstance(listed, list) or any(isinstance(one, str) and _LAYER.search(f".{one}.") for one in listed)
    if named or config.get("layers_to_transform") is not None:
        return
    series: defaultdict[str, set[int]] = defaultdict(set)
    for module in _modules(evidence):
        numbers = _LAYER.findall(module)
        if len(numbers) == 1 and len(numbers[0]) < 6:
            series[_LAYER.sub("*", module)].add(int(numbers[0]))
    last = max((max(layers) for layers in series.values()), default=0)
    for pattern, layers in series.items():
        missing = sorted(set(range(last + 1)) - layers) if last * len(series) < 1_000_000 else []
        if missing:
            shown = ", ".join(map(str, missing[:10])) + (" ..." if len(missing) > 10 else "")
            yield Remark(f"{pattern}: layers {shown} are missing, others up to {last} are there")


def _modules(evidence: Evidence) -> list[str]:
    """Return the modules with factors: as the loader reads them, else as the names tell."""
    if evidence.halves:
        return list(evidence.halves)
    return [] if isinstance(evidence.strict, str) else list(evidence.strict.targets)


def _saved_modules(evidence: Evidence) -> list[str]:
    found = (evidence.config or {}).get("modules_to_save")
    listed = [found] if isinstance(found, str) else found
    return [one for one in listed if isinstance(one, str)] if isinstance(listed, list) else []


def _is_plain_lora(evidence: Evidence) -> bool:
    config = evidence.config or {}
    return config.get("peft_type", "LORA") == "LORA" and config.get("use_dora") is not True
