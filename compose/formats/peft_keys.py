"""Tensor names of PEFT LoRA files: the many spellings of one key, brought to (module path, factor)."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from dataclasses import dataclass, field

from compose.adapter import TargetKind
from compose.errors import AdapterFormatError
from compose.formats.header import join_problems

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
    "lora_magnitude_vector": ("DoRA", "merge it into its base, or retrain without use_dora"),
    "lora_E": ("AdaLoRA", "convert it with PEFT's convert_to_lora"),
    "ranknum": ("AdaLoRA", "convert it with PEFT's convert_to_lora"),
    "lora_down": ("kohya-style LoRA", "convert it to PEFT's layout (lora_down is lora_A, lora_up is lora_B)"),
    "lora_up": ("kohya-style LoRA", "convert it to PEFT's layout (lora_down is lora_A, lora_up is lora_B)"),
    "lora_mid": ("LoCon/LyCORIS", "convert it with PEFT's convert_to_lora"),
    "trainable_tokens_delta": (
        "trainable tokens",
        "resize the base's embedding and retrain without trainable_token_indices",
    ),
    "lora_diag": ("KaSA", "retrain as plain LoRA"),
}
_FOREIGN_PREFIXES = {
    "hada_": ("LoHa", "convert it with PEFT's convert_to_lora"),
    "lokr_": ("LoKr", "convert it with PEFT's convert_to_lora"),
    "ia3_": ("IA3", "only LoRA adapters can be composed"),
    "vera_": ("VeRA", "convert it with PEFT's convert_to_lora"),
    "oft_": ("OFT", "only LoRA adapters can be composed"),
    "boft_": ("BOFT", "only LoRA adapters can be composed"),
    "prompt_e": ("prompt learning", "only LoRA adapters can be composed"),
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
            problem = _foreign(path, name) or _add_full(parsed, path, name)
        else:
            module, infix, kind, half = factor
            infixes.setdefault(infix, name)
            problem = _add_half(parsed, module, kind, half, name)
        if problem:
            problems.append(problem)
    if len(infixes) > 1:
        shown = ", ".join(f"{infix or '(none)'!r} in {name}" for infix, name in infixes.items())
        problems.append(f"tensors of several adapters in one file ({shown}); save each adapter on its own")
    problems += [
        f"{pair.a or pair.b} has no matching {'B' if pair.a else 'A'} tensor"
        for pair in parsed.pairs.values()
        if not (pair.a and pair.b)
    ]
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


def _foreign(path: str, name: str) -> str | None:
    """Return why ``name`` cannot be represented, None for what may be a full weight."""
    segments = path.split(".")
    for segment in segments:
        known = _FOREIGN.get(segment) or next(
            (value for prefix, value in _FOREIGN_PREFIXES.items() if segment.startswith(prefix)), None
        )
        if known:
            return f"{name} belongs to {known[0]}, which cannot be represented exactly; {known[1]}"
    if segments[-1] == "bias" and any(segment in _FACTORS for segment in segments):
        return (
            f"{name} is a LoRA bias (lora_bias=true), which cannot be represented exactly; retrain without lora_bias"
        )
    if any(segment.startswith("lora_") for segment in segments):
        return f"{name} is no known LoRA tensor"
    if "original_module" in segments:
        return f"{name} is a copy of the base's own weights from a raw state dict; save with PEFT's save_pretrained"
    return None


def _add_full(parsed: ParsedKeys, path: str, name: str) -> str | None:
    segments = path.split(".")
    if "modules_to_save" in segments:
        at = segments.index("modules_to_save")
        del segments[at : at + (2 if len(segments) - at > 2 else 1)]
    path = ".".join(segments)
    if path in parsed.full:
        return f"{name} and {parsed.full[path]} are the same parameter"
    parsed.full[path] = name
    return None


def _add_half(parsed: ParsedKeys, module: str, kind: TargetKind, half: str, name: str) -> str | None:
    if ".base_layer." in f".{module}.":
        return (
            f"{name} is nested LoRA (target_parameters or nn.MultiheadAttention), which cannot be represented; "
            "target the linear layers themselves"
        )
    pair = parsed.pairs.setdefault(module, Pair(kind))
    if pair.kind != kind:
        return f"{module} has both linear and embedding factors"
    other = getattr(pair, half)
    if other:
        return f"{name} and {other} are the same factor"
    setattr(pair, half, name)
    return None
