"""Tensor names of PEFT LoRA files: the many spellings of one key, brought to (module path, factor)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field

from compose.adapter import TargetKind
from compose.errors import AdapterFormatError
from compose.formats.header import join_problems
from compose.formats.peft_config import LoraConfig, is_inside

EMBEDDING_NAMES = frozenset(
    {"embed_tokens", "lm_head", "wte", "wpe", "word_embeddings", "shared", "embed_in", "embed_out", "tok_embeddings"}
)

_FACTORS: dict[str, tuple[TargetKind, str]] = {
    "lora_A": ("linear", "a"),
    "lora_B": ("linear", "b"),
    "lora_embedding_A": ("embedding", "a"),
    "lora_embedding_B": ("embedding", "b"),
}

# A segment that gives away a kind of adapter this reader cannot represent -> its name and what to do.
_FOREIGN = {
    "lora_magnitude_vector": ("DoRA", "its configuration must say use_dora, then 'compose convert' reads it"),
    "lora_E": ("AdaLoRA", "its configuration must say peft_type ADALORA"),
    "ranknum": ("AdaLoRA", "save it with PEFT's save_pretrained"),
    "lora_down": ("kohya-style LoRA", "convert it to PEFT's layout (lora_down is lora_A, lora_up is lora_B)"),
    "lora_up": ("kohya-style LoRA", "convert it to PEFT's layout (lora_down is lora_A, lora_up is lora_B)"),
    "lora_mid": ("LoCon/LyCORIS", "only linear layers and embeddings are supported"),
    "trainable_tokens_delta": (
        "trainable tokens",
        "resize the base's embedding and retrain without trainable_token_indices",
    ),
    "lora_diag": ("KaSA", "retrain as plain LoRA"),
}
_FOREIGN_PREFIXES = {
    "hada_": ("LoHa", "its configuration must say peft_type LOHA"),
    "lokr_": ("LoKr", "its configuration must say peft_type LOKR"),
    "ia3_": ("IA3", "its configuration must say peft_type IA3, then 'compose convert' reads it"),
    "vera_": ("VeRA", "its configuration must say peft_type VERA"),
    "oft_": ("OFT", "only low-rank adapters can be composed"),
    "boft_": ("BOFT", "only low-rank adapters can be composed"),
    "prompt_e": ("prompt learning", "only low-rank adapters can be composed"),
}
_ORIG_MOD = re.compile(r"(^|\.)_orig_mod(?=\.)")


@dataclass
class Pair:
    """The two tensors of one target, by their names in the file; an absent one is ``""``."""

    kind: TargetKind
    a: str = ""
    b: str = ""


@dataclass
class ParsedKeys:
    """All names of a file, sorted out.

    Attributes:
        pairs: Module path -> `Pair`, both halves present.
        full: Parameter path -> name in the file, for everything without a LoRA factor.
    """

    pairs: dict[str, Pair] = field(default_factory=dict)
    full: dict[str, str] = field(default_factory=dict)


def parse_keys(names: Iterable[str]) -> ParsedKeys:
    """Sort the tensor names of a file into LoRA pairs and full weights.

    Raises:
        AdapterFormatError: Names every unmet pair, name given twice, foreign adapter kind and mix of adapters.
    """
    parsed, infixes, problems = ParsedKeys(), dict[str, str](), list[str]()
    for name in names:
        path = strip_prefix(name)
        factor = _split_factor(path)
        if factor is None:
            problem = _foreign(path, name) or _add_full(parsed.full, path, name)
        else:
            module, infix, kind, half = factor
            infixes.setdefault(infix, name)
            problem = _add_half(parsed, module, kind, half, name)
        if problem:
            problems.append(problem)
    problems += _several(infixes)
    problems += [
        f"{pair.a or pair.b} has no matching {'B' if pair.a else 'A'} tensor; save the adapter again"
        for pair in parsed.pairs.values()
        if not (pair.a and pair.b)
    ]
    if problems:
        raise AdapterFormatError(join_problems(problems))
    return parsed


@dataclass
class ParsedParts:
    """All names of a file of another kind than LoRA, sorted out.

    Attributes:
        parts: Module path -> part -> name in the file.
        shared: Part -> name in the file, for tensors that belong to all modules.
        full: Parameter path -> name in the file, for everything else.
    """

    parts: dict[str, dict[str, str]] = field(default_factory=dict)
    shared: dict[str, str] = field(default_factory=dict)
    full: dict[str, str] = field(default_factory=dict)


def parse_parts(names: Iterable[str], parts: Collection[str], shared: Collection[str]) -> ParsedParts:
    """Sort the tensor names of a file of another kind than LoRA.

    Args:
        names: Of the file.
        parts: Last segments of the kind's tensors, after the module's path (an adapter's name or ``weight`` may
            follow).
        shared: The same for tensors without a module.

    Raises:
        AdapterFormatError: Names every tensor given twice, foreign kind and mix of adapters.
    """
    parsed, infixes, problems = ParsedParts(), dict[str, str](), list[str]()
    for name in names:
        path = strip_prefix(name)
        module, infix, part = _split_part(path, parts, shared)
        if not part:
            problem = _foreign(path, name) or _add_full(parsed.full, path, name)
        else:
            infixes.setdefault(infix, name)
            table = parsed.parts.setdefault(module, {}) if module else parsed.shared
            problem = _nested(module, name) or (f"{name} and {table[part]} are the same" if part in table else None)
            table.setdefault(part, name)
        if problem:
            problems.append(problem)
    problems += _several(infixes)
    if problems:
        raise AdapterFormatError(join_problems(problems))
    return parsed


def is_embedding_copy(path: str, embeddings: Collection[str]) -> bool:
    """Return whether a full parameter is a copy of a whole embedding (PEFT's ``save_embedding_layers``).

    Args:
        path: Of the parameter.
        embeddings: The adapter's targets that are embeddings, beside the usual names.
    """
    module, _, parameter = path.rpartition(".")
    wrapped = module.removesuffix(".base_layer")
    usual = wrapped.rpartition(".")[2] in EMBEDDING_NAMES
    return parameter == "weight" and (usual or (wrapped != module and wrapped in embeddings))


def check_leftovers(config: LoraConfig, full: Mapping[str, str], embeddings: Collection[str]) -> list[str]:
    """Return a problem for every full weight that neither the configuration nor an embedding accounts for.

    Tied embeddings are a problem too: such an update belongs to two modules.

    Args:
        config: Of the adapter.
        full: Parameter path -> name in the file.
        embeddings: The adapter's targets that are embeddings.
    """
    problems = [
        f"{name} is used by nothing: a copy of the base's own weights; save with PEFT's save_pretrained"
        if ".base_layer." in f".{path}"
        else f"{name} is used by nothing: neither a factor, nor in modules_to_save, nor a copy of an embedding"
        for path, name in full.items()
        if not is_embedding_copy(path, embeddings) and not any(is_inside(path, one) for one in config.full_modules)
    ]
    if config.tied and (full or embeddings):
        problems.append(
            "ensure_weight_tying is set on an adapted embedding: the update is shared by two modules; untie it"
        )
    return problems


def strip_prefix(name: str) -> str:
    """Return the path inside the base model.

    Wrappers' prefixes go: ``module.`` (DDP), ``_orig_mod.`` (torch.compile, anywhere), and one of
    ``base_model.model.`` and ``base_model.`` (PEFT).
    """
    path = _ORIG_MOD.sub("", name).removeprefix(".") if "_orig_mod" in name else name
    path = path.removeprefix("module.")
    if path.startswith("base_model.model."):
        path = path[len("base_model.model.") :]
    elif path.startswith("base_model."):
        path = path[len("base_model.") :]
    return path.removeprefix("module.")


def _split_factor(path: str) -> tuple[str, str, TargetKind, str] | None:
    """Return (module, adapter infix, kind, half) of a LoRA factor, None for any other name."""
    stem = path.removesuffix(".weight")
    module, _, last = stem.rpartition(".")
    infix = ""
    if last not in _FACTORS and "lora_" in module:
        infix = last
        module, _, last = module.rpartition(".")
    if last not in _FACTORS or not module or infix == "bias":
        return None
    kind, half = _FACTORS[last]
    if (kind == "linear") != (len(stem) != len(path)):  # linear factors end in .weight, embedding factors do not
        return None
    return module, infix, kind, half


def _split_part(path: str, parts: Collection[str], shared: Collection[str]) -> tuple[str, str, str]:
    """Return (module, adapter infix, part) of a kind's tensor. The module is empty for a shared one."""
    segments = path.removesuffix(".weight").split(".")
    for at, infix in ((len(segments) - 1, ""), (len(segments) - 2, segments[-1])):
        known = parts if at > 0 else shared
        if at >= 0 and segments[at] in known and infix != "bias":
            return ".".join(segments[:at]), infix, segments[at]
    return "", "", ""


def _several(infixes: dict[str, str]) -> list[str]:
    if len(infixes) < 2:
        return []
    shown = ", ".join(f"{infix or '(none)'!r} in {name}" for infix, name in infixes.items())
    return [f"tensors of several adapters in one file ({shown}); save each adapter on its own"]


def _nested(module: str, name: str) -> str | None:
    if ".base_layer." not in f".{module}.":
        return None
    return (
        f"{name} is nested LoRA (target_parameters or nn.MultiheadAttention), which cannot be represented; "
        "target the linear layers themselves"
    )


def _foreign(path: str, name: str) -> str | None:
    """Return why ``name`` cannot be represented, None for what may be a full weight."""
    segments = path.split(".")
    for segment in segments:
        known = _FOREIGN.get(segment) or next(
            (value for prefix, value in _FOREIGN_PREFIXES.items() if segment.startswith(prefix)), None
        )
        if known:
            return f"{name} belongs to {known[0]}, which is no part of this adapter; {known[1]}"
    if segments[-1] == "bias" and any(segment in _FACTORS for segment in segments):
        return (
            f"{name} is a LoRA bias (lora_bias=true), which cannot be represented exactly; retrain without lora_bias"
        )
    if any(segment.startswith("lora_") for segment in segments):
        return f"{name} is no known LoRA tensor"
    if "original_module" in segments:
        return f"{name} is a copy of the base's own weights from a raw state dict; save with PEFT's save_pretrained"
    return None


def _add_full(full: dict[str, str], path: str, name: str) -> str | None:
    segments = path.split(".")
    if "modules_to_save" in segments:
        at = segments.index("modules_to_save")
        del segments[at : at + (2 if len(segments) - at > 2 else 1)]
    path = ".".join(segments)
    if path in full:
        return f"{name} and {full[path]} are the same parameter"
    full[path] = name
    return None


def _add_half(parsed: ParsedKeys, module: str, kind: TargetKind, half: str, name: str) -> str | None:
    if problem := _nested(module, name):
        return problem
    pair = parsed.pairs.setdefault(module, Pair(kind))
    if pair.kind != kind:
        return f"{module} has both linear and embedding factors"
    other = getattr(pair, half)
    if other:
        return f"{name} and {other} are the same factor"
    setattr(pair, half, name)
    return None
