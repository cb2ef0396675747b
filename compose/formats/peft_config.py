r"""PEFT's ``adapter_config.json`` for LoRA: what is refused, and the scaling of every target.

No pattern of a file is ever run as a regular expression. PEFT matches a key of ``rank_pattern`` and ``alpha_pattern``
as ``(.*\\.)?(key)$`` against the module path, first match in order wins (``peft/utils/other.py`` 0.21,
``get_pattern_key``). Keys made of literal characters, ``.``, ``\\.`` and a leading ``^`` are matched exactly so here,
in linear time; the rank comes from the tensors, and another key is refused only where it could change the scaling.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from compose.errors import AdapterFormatError
from compose.formats.peft_refusals import refuse_variants

MAX_RANK = 65_536
MAX_SCALING = 1e4
MAX_TEXT = 4096
MAX_COMPARISONS = 2_500_000
"""Keys of a pattern times names they are compared with: under a second, and a key per module for 1,500 modules."""

_REGEX_CHARACTERS = frozenset("*+?[]{}()|^$")
_SEQUENCE_CLASSIFIERS = frozenset({"classifier", "score"})


@dataclass(frozen=True)
class Pattern:
    """One key of a rank or alpha pattern.

    Attributes:
        text: As written.
        literal: The key with escapes undone, None for a regular expression that will not be run.
        wild: Positions in ``literal`` that match any character (unescaped dots).
        anchored: It started with ``^``: only the whole path matches.
    """

    text: str
    literal: str | None
    wild: frozenset[int]
    anchored: bool

    def matches(self, path: str) -> bool:
        """Return whether PEFT would match this literal key with ``path``."""
        if self.literal is None:
            raise ValueError(f"{self.text!r} is a regular expression; it is not run")
        start = len(path) - len(self.literal)
        if start < 0 or (start > 0 and (self.anchored or path[start - 1] != ".")):
            return False
        if path.endswith(self.literal):
            return True
        return bool(self.wild) and all(
            index in self.wild or path[start + index] == letter for index, letter in enumerate(self.literal)
        )


@dataclass(frozen=True)
class LoraConfig:
    """The fields that decide the maths, checked.

    Attributes:
        base: ``base_model_name_or_path`` or ``""``.
        rank: ``r``.
        alpha: ``lora_alpha``.
        rslora: ``use_rslora``.
        ranks: Rank pattern in order.
        alphas: Alpha pattern in order.
        targets: ``target_modules`` when it is a list; None for a string (never run) or when absent.
        excluded: ``exclude_modules`` when it is a list.
        layers: ``layers_to_transform``.
        layer_names: ``layers_pattern``.
        full_modules: ``modules_to_save``.
        sequence_classifier: PEFT added the usual heads' names to ``modules_to_save``, present or not.
        tied: ``ensure_weight_tying``.
    """

    base: str
    rank: int
    alpha: float
    rslora: bool
    ranks: tuple[tuple[Pattern, int], ...]
    alphas: tuple[tuple[Pattern, float], ...]
    targets: tuple[str, ...] | None
    excluded: tuple[str, ...]
    layers: tuple[int, ...]
    layer_names: tuple[str, ...]
    full_modules: tuple[str, ...]
    sequence_classifier: bool
    tied: bool

    def declared_rank(self, path: str) -> int:
        """Return the rank the configuration gives the target ``path``.

        Raises:
            AdapterFormatError: It hangs on a regular expression.
        """
        ranks, unresolved = _candidates(self.ranks, path, self.rank)
        if len(set(ranks)) > 1:
            raise AdapterFormatError(
                f"target {path}: rank_pattern key {unresolved[0]!r} is a regular expression, which is never run, and "
                "its tensors do not tell the rank; write it as module names"
            )
        return int(ranks[0])

    def scaling(self, path: str, rank: int) -> float:
        """Return the scaling PEFT applies to the target ``path`` whose tensors have ``rank``.

        Raises:
            AdapterFormatError: The configuration gives another rank, or the scaling hangs on a regular expression.
        """
        ranks, _ = _candidates(self.ranks, path, self.rank)
        if rank not in ranks:
            expected = " or ".join(map(str, dict.fromkeys(ranks)))
            raise AdapterFormatError(
                f"target {path}: its tensors have rank {rank}, the configuration (r, rank_pattern) says {expected}"
            )
        alphas, unresolved = _candidates(self.alphas, path, self.alpha)
        if len(set(alphas)) > 1:
            values = ", ".join(f"{alpha:g}" for alpha in sorted(set(alphas)))
            raise AdapterFormatError(
                f"target {path}: alpha_pattern key {unresolved[0]!r} is a regular expression, which is never run, "
                f"and it decides between the alphas {values}; write it as module names (one key per module suffix or "
                "'^full.path')"
            )
        scaling = alphas[0] / (math.sqrt(rank) if self.rslora else rank)
        if not abs(scaling) <= MAX_SCALING:
            raise AdapterFormatError(
                f"target {path}: scaling {scaling:g} is beyond the limit of {MAX_SCALING:g}; correct alpha"
            )
        return scaling


def parse_config(config: Mapping[str, Any]) -> LoraConfig:
    """Check ``config`` and return the fields that decide the maths.

    Raises:
        AdapterFormatError: Names every problem: a kind other than plain LoRA, a field of a wrong type or range.
    """
    return parse_fields(config, refuse_variants(config))


def parse_fields(
    config: Mapping[str, Any], problems: list[str], *, rank: str = "r", alpha: str = "lora_alpha"
) -> LoraConfig:
    """Return the fields that decide the maths, whatever the kind.

    Args:
        config: The configuration.
        problems: Found already; raised together with those of the fields.
        rank: The field that holds the rank.
        alpha: The field that holds alpha.

    Raises:
        AdapterFormatError: Names every problem.
    """
    fields = _Fields(config, problems)
    parsed = LoraConfig(
        base=fields.text("base_model_name_or_path"),
        rank=int(fields.number(rank, 8, whole=True)),
        alpha=fields.number(alpha, 8),
        rslora=fields.flag("use_rslora"),
        ranks=tuple((parse_pattern(key), int(value)) for key, value in fields.pattern("rank_pattern", whole=True)),
        alphas=tuple((parse_pattern(key), value) for key, value in fields.pattern("alpha_pattern", whole=False)),
        targets=fields.optional_names("target_modules"),
        excluded=fields.optional_names("exclude_modules") or (),
        layers=fields.numbers("layers_to_transform"),
        layer_names=fields.names("layers_pattern"),
        full_modules=fields.names("modules_to_save"),
        sequence_classifier=config.get("task_type") in ("SEQ_CLS", "TOKEN_CLS"),
        tied=fields.flag("ensure_weight_tying"),
    )
    if problems:
        raise AdapterFormatError("; ".join(problems))
    return parsed


def parse_pattern(key: str) -> Pattern:
    """Read a pattern key; a key with regular-expression syntax gets ``literal`` None."""
    anchored = key.startswith("^")
    body = key[1:] if anchored else key
    if body.endswith("$") and not body.endswith("\\$"):
        body = body[:-1]
    letters: list[str] = []
    wild: set[int] = set()
    escaped = False
    for letter in body:
        if escaped:
            if letter.isalnum():  # \d, \w, \1: classes and references
                return Pattern(key, None, frozenset(), anchored)
            escaped = False
        elif letter == "\\":
            escaped = True
            continue
        elif letter in _REGEX_CHARACTERS:
            return Pattern(key, None, frozenset(), anchored)
        elif letter == ".":
            wild.add(len(letters))
        letters.append(letter)
    return Pattern(key, None if escaped else "".join(letters), frozenset(wild), anchored)


def check_work(config: LoraConfig, targets: int, full: int) -> None:
    """Refuse what would take minutes to compare.

    Args:
        config: Of the adapter.
        targets: How many modules its tensors belong to.
        full: How many full weights there are.

    Raises:
        AdapterFormatError: Names the field.
    """
    fields: tuple[tuple[str, Collection[Any], int], ...] = (
        ("rank_pattern", config.ranks, targets),
        ("alpha_pattern", config.alphas, targets),
        ("layers_pattern", config.layer_names, targets),
        ("modules_to_save", config.full_modules, full),
    )
    for field, entries, count in fields:
        if len(entries) * count > MAX_COMPARISONS:
            raise AdapterFormatError(
                f"{field} has {len(entries):,} entries for {count:,} tensors or targets; more than "
                f"{MAX_COMPARISONS:,} comparisons are refused; use shorter lists"
            )


def check_targets(config: LoraConfig, paths: list[str]) -> list[str]:
    """Compare the targets the configuration lists with those the file has; return the problems.

    A string ``target_modules`` is a regular expression (or "all-linear") and is not run: the tensors decide.
    """
    problems = []
    if config.targets is not None:
        listed = set(config.targets)
        met = {path: listed.intersection(_suffixes(path)) for path in paths}
        unmet = listed.difference(*met.values())
        problems += [
            f"target_modules names {target!r}, but no tensor of the file belongs to it"
            for target in config.targets
            if target in unmet
        ]
        problems += [
            f"the file has tensors for {path}, which target_modules does not list" for path in paths if not met[path]
        ]
        problems += _check_layers(config, paths)
    excluded = set(config.excluded)
    problems += [
        f"the file has tensors for {path}, which exclude_modules excludes"
        for path in paths
        if excluded and not excluded.isdisjoint(_suffixes(path))
    ]
    return problems


def check_full_modules(config: LoraConfig, paths: list[str]) -> list[str]:
    """Return a problem for every module of ``modules_to_save`` that has no tensor in the file."""
    missing = [name for name in config.full_modules if not any(is_inside(path, name) for path in paths)]
    if config.sequence_classifier and len(missing) < len(config.full_modules):
        missing = [name for name in missing if name not in _SEQUENCE_CLASSIFIERS]
    return [f"modules_to_save names {name!r}, but no tensor of the file belongs to it" for name in missing]


def is_inside(path: str, module: str) -> bool:
    """Return whether ``path`` passes through a module that PEFT saves for ``module`` in ``modules_to_save``.

    PEFT saves every module whose path ends with the name, within a segment too: ``norm`` means ``input_layernorm``.
    """
    return f"{module}." in f"{path}."


def _candidates(patterns: tuple[tuple[Pattern, Any], ...], path: str, default: Any) -> tuple[list[Any], list[str]]:
    """Return the values the pattern may give ``path``, and the keys that would have to be run to know which."""
    values, unresolved = [], []
    for pattern, value in patterns:
        if pattern.literal is None:
            values.append(value)
            unresolved.append(pattern.text)
        elif pattern.matches(path):
            return [*values, value], unresolved
    return [*values, default], unresolved


def _has_suffix(path: str, suffix: str) -> bool:
    return path == suffix or path.endswith(f".{suffix}")


def _suffixes(path: str) -> list[str]:
    segments = path.split(".")
    return [".".join(segments[start:]) for start in range(len(segments))]


def _check_layers(config: LoraConfig, paths: list[str]) -> list[str]:
    if not config.layers or any(re.search(r"[^A-Za-z0-9_.]", name) for name in config.layer_names):
        return []
    layers, shown = set(config.layers), str(list(config.layers))[:100]
    found = {path: _layer_index(path, config.layer_names) for path in paths}
    problems = [
        f"the file has tensors for {path}, which layers_to_transform {shown} leaves out"
        for path, index in found.items()
        if index not in layers
    ]
    missing = layers.difference(found.values())
    return problems + [
        f"layers_to_transform names layer {index}, but no tensor belongs to it"
        for index in config.layers
        if index in missing
    ]


def _layer_index(path: str, names: tuple[str, ...]) -> int | None:
    """Return PEFT's layer number: the first whole number after a listed name, or after any two segments."""
    segments = path.split(".")
    numbered = [at for at, segment in enumerate(segments[:-1]) if segment.isdecimal()]
    if not names:
        return next((int(segments[at]) for at in numbered if at >= 2), None)
    for name in names:
        for at in numbered:
            if _has_suffix(".".join(segments[:at]), name):
                return int(segments[at])
    return None


class _Fields:
    """Typed access to a configuration; problems are collected, not raised."""

    def __init__(self, config: Mapping[str, Any], problems: list[str]) -> None:
        self._config = config
        self._problems = problems

    def text(self, key: str) -> str:
        value = self._config.get(key)
        if value is not None and not isinstance(value, str):
            self._wrong(key, value, "a string or null")
            return ""
        if value and (len(value) > MAX_TEXT or not value.isprintable()):
            self._wrong(key, value, f"at most {MAX_TEXT} printable characters")
        return value or ""

    def flag(self, key: str) -> bool:
        value = self._config.get(key)
        if value is not None and not isinstance(value, bool):
            self._wrong(key, value, "true or false")
        return value is True

    def number(self, key: str, default: float, *, whole: bool = False) -> float:
        value = self._config.get(key, default)
        return value if self._is_number(key, value, whole=whole) else default

    def pattern(self, key: str, *, whole: bool) -> list[tuple[str, float]]:
        value = self._config.get(key)
        if value is None:
            return []
        if not isinstance(value, dict):
            self._wrong(key, value, "an object of module names to numbers")
            return []
        return [(name, item) for name, item in value.items() if self._is_number(f"{key}[{name!r}]", item, whole=whole)]

    def names(self, key: str) -> tuple[str, ...]:
        value = self._config.get(key)
        listed = [value] if isinstance(value, str) else ([] if value is None else value)
        if not isinstance(listed, list) or not all(isinstance(item, str) and item for item in listed):
            self._wrong(key, value, "a list of module names")
            return ()
        return tuple(listed)

    def optional_names(self, key: str) -> tuple[str, ...] | None:
        """Names of a list; None for a string (a regular expression, not run) and for an absent field."""
        value = self._config.get(key)
        return None if value is None or isinstance(value, str) else self.names(key)

    def numbers(self, key: str) -> tuple[int, ...]:
        value = self._config.get(key)
        listed = [value] if type(value) is int else ([] if value is None else value)
        if not isinstance(listed, list) or not all(type(item) is int and item >= 0 for item in listed):
            self._wrong(key, value, "a list of layer numbers")
            return ()
        return tuple(listed)

    def _is_number(self, key: str, value: Any, *, whole: bool) -> bool:
        if whole and (type(value) is not int or not 1 <= value <= MAX_RANK):
            self._wrong(key, value, f"a whole number from 1 to {MAX_RANK}")
            return False
        if isinstance(value, bool) or not isinstance(value, int | float) or not abs(value) <= 1e30:
            self._wrong(key, value, "a finite number")
            return False
        return True

    def _wrong(self, key: str, value: Any, allowed: str) -> None:
        self._problems.append(f"{key} must be {allowed}, got {value!r:.100}")
