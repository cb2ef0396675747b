"""What ``compose merge`` was asked for: a recipe file, the command line above it, and ``--set`` above both.

A recipe is YAML (so JSON too), with the keys of `KEYS`; paths in it are relative to its folder::

    bank: ../bank
    method: ties
    weights: {math: 0.7, code: {"*": 0.5, "*.mlp.*": 0.2}}     # or an expression: 0.7*math + 0.5*code
    options: {density: 0.3}
    rank: 16
    out: merged

The ``merge.json`` beside a result is a recipe too: with ``--bank`` and ``--out`` it repeats the merge.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.errors import ComposeError
from compose.files.paths import exists
from compose.text.yaml_file import read_yaml

if TYPE_CHECKING:
    from compose.engine.merge_weights import Weight

KEYS = {
    "bank": "a path or a list of paths",
    "method": "text",
    "weights": "a mapping of names to numbers (or to mappings of patterns to numbers), or an expression",
    "space": "full, knots or core",
    "options": "a mapping of the method's options",
    "rank": "an integer",
    "energy": "a number",
    "seed": "an integer",
    "device": "text",
    "base": "text",
    "data": "a path",
    "into_base": "text",
    "out": "a path",
}
"""Keys of a recipe, and what each holds; ``merge_method`` stands for ``method``."""

WRITTEN = ("parents", "data", "base_model", "low_rank", "notes")
SPACES = ("full", "knots", "core")


@dataclass(frozen=True, kw_only=True)
class MergeRequest:
    """One merge as asked for, from all sources.

    Attributes:
        bank: Folders.
        method: Name.
        weights: Name -> weight, None for all at 1.
        space: ``"full"``, ``"knots"`` or ``"core"``.
        options: The method's.
        rank: To recompress to.
        energy: To recompress to.
        seed: Of random methods.
        device: Where to compute.
        base: Model that merges with data run.
        data: Its records.
        into_base: Model to write the merge into.
        out: Folder of the result.
        hashes: SHA-256 of the adapters that a written recipe was made with.
    """

    bank: tuple[Path, ...] = ()
    method: str = "sum"
    weights: Mapping[str, Weight] | None = None
    space: str = "full"
    options: Mapping[str, Any] = field(default_factory=dict)
    rank: int | None = None
    energy: float | None = None
    seed: int = 0
    device: str = "cpu"
    base: str | None = None
    data: Path | None = None
    into_base: str | None = None
    out: Path | None = None
    hashes: Mapping[str, str] = field(default_factory=dict)


def read_request(config: Path | None, given: Mapping[str, Any], settings: Sequence[str]) -> MergeRequest:
    """Return the request: the recipe, then what ``given`` holds (not None), then ``--set``.

    Args:
        config: The recipe file, if any.
        given: Values of `KEYS` from the command line; ``weights`` replace the recipe's, ``options`` are added.
        settings: ``KEY=VALUE`` (a key of the recipe), ``options.NAME=VALUE``, ``weights.NAME[:PATTERN]=VALUE``, or
            ``OPTION=VALUE`` of the method.

    Raises:
        ComposeError: A file, key, value or setting that cannot be; all of a recipe's problems are listed.
    """
    values, hashes = ({}, {}) if config is None else read_recipe(config)
    typed = {key: value for key, value in given.items() if value is not None and key != "options"}
    values |= typed
    options = {**values.get("options", {}), **(given.get("options") or {})}
    weights = values.get("weights")
    said = set(typed) | {f"options.{name}" for name in given.get("options") or {}}
    for text in settings:
        path, value = read_setting(text)
        key, _, name = path.partition(".")
        if key not in KEYS and name:
            raise ComposeError(f"--set {text!r}: {_unknown(key, KEYS, 'key')}")
        if key not in KEYS:
            key, name = "options", key
        place = f"{key}.{name}" if name else key
        if place in said:
            raise ComposeError(f"the option {name or key!r} is given twice (--set {text!r})")
        said.add(place)
        if key == "options" and name:
            options[name] = value
        elif key == "weights" and name:
            weights = _with_weight(weights, name, value, text)
        elif name:
            raise ComposeError(f"--set {text!r}: {key!r} has no parts; only options.NAME and weights.NAME do")
        else:
            checked = _checked_setting(key, value, text)
            weights, values = (checked, values) if key == "weights" else (weights, {**values, key: checked})
    return _request(values, options, weights, hashes)


def read_recipe(file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the values of a recipe file, paths taken from its folder, and the hashes of a written one's adapters.

    Raises:
        ComposeError: It cannot be read, or keys or values are not allowed; all of them are listed.
    """
    found = read_yaml(file)
    hashes: dict[str, str] = {}
    if "parents" in found:
        found, hashes = _from_written(found, file)
    if "merge_method" in found:
        if "method" in found:
            raise ComposeError(f"{file}: 'method' and 'merge_method' are the same key; give one of them")
        found["method"] = found.pop("merge_method")
    problems = [_unknown(key, [*KEYS, "merge_method"], "key") for key in found if key not in KEYS]
    problems += [_problem(key, value) for key, value in found.items() if key in KEYS and _problem(key, value)]
    if problems:
        raise ComposeError(f"{file}: " + "; ".join(problems))
    values = {key: value for key, value in found.items() if value is not None}
    for key in ("data", "out"):
        if key in values:
            values[key] = file.parent / values[key]
    for key in ("base", "into_base"):
        local = file.parent / values.get(key, "")
        if key in values and (exists(local) or values[key].startswith((".", "/"))):
            values[key] = str(local)
    if "bank" in values:
        folders = [values["bank"]] if isinstance(values["bank"], str) else values["bank"]
        values["bank"] = [file.parent / folder for folder in folders]
    return values, hashes


def read_setting(text: str) -> tuple[str, Any]:
    """Return name and value of ``NAME=VALUE``: a number, true, false, none, or text.

    Raises:
        ComposeError: There is no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals or not name:
        raise ComposeError(f"cannot read --set {text!r}; write OPTION=VALUE, as in density=0.2")
    words: dict[str, Any] = {"true": True, "false": False, "none": None}
    if value.lower() in words:
        return name, words[value.lower()]
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


def _from_written(found: Mapping[str, Any], file: Path) -> tuple[dict[str, Any], dict[str, str]]:
    """What a ``merge.json`` says as a recipe, and the hashes of its adapters."""
    try:
        parents = {parent["name"]: parent for parent in found["parents"]}
        kept = {key: found[key] for key in ("method", "options", "rank", "energy", "seed") if key in found}
        weights = {name: parent["weight"] for name, parent in parents.items()}
        hashes = {name: parent["sha256"] for name, parent in parents.items() if parent.get("sha256")}
    except (TypeError, KeyError, AttributeError) as error:
        raise ComposeError(f"{file}: 'parents' is not that of a merge.json ({error!r})") from None
    return ({**kept} if _learned(found) else {**kept, "weights": weights}), hashes


def _learned(found: Mapping[str, Any]) -> bool:
    """Whether the weights were found by the method, so that they are no input of it."""
    from compose.engine.data_merge import DATA_METHODS

    name = found.get("method")
    return "data" in found and name in DATA_METHODS and not DATA_METHODS[str(name)].contract.weighted


def _problem(key: str, value: Any) -> str:
    """What is wrong with a value, empty if nothing."""
    number = isinstance(value, int | float) and not isinstance(value, bool)
    fine = {
        "bank": isinstance(value, str) or _is_list(value, str),
        "weights": isinstance(value, str) or _is_weights(value),
        "space": value in SPACES,
        "options": isinstance(value, Mapping) and all(isinstance(name, str) for name in value),
        "rank": number and isinstance(value, int),
        "energy": number,
        "seed": number and isinstance(value, int),
    }.get(key, isinstance(value, str))
    return "" if fine or value is None else f"{key!r} must be {KEYS[key]}, got {value!r}"


def _is_list(value: Any, kind: type) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(one, kind) for one in value)


def _is_weights(value: Any) -> bool:
    if not isinstance(value, Mapping):
        return False
    numbers = [
        one for weight in value.values() for one in (weight.values() if isinstance(weight, Mapping) else [weight])
    ]
    return all(isinstance(one, int | float) and not isinstance(one, bool) for one in numbers)


def _checked_setting(key: str, value: Any, text: str) -> Any:
    if key == "bank" and isinstance(value, str):
        return [Path(value)]
    if key in ("method", "device", "base", "data", "into_base", "out") and value is not None:
        value = str(value)
    if problem := _problem(key, value):
        raise ComposeError(f"--set {text!r}: {problem}")
    return Path(value) if key in ("data", "out") and value is not None else value


def _with_weight(weights: Any, name: str, value: Any, text: str) -> dict[str, Weight]:
    from compose.engine.merge_weights import parse_expression

    if not isinstance(value, int | float) or isinstance(value, bool):
        raise ComposeError(f"--set {text!r}: a weight is a number, got {value!r}")
    found = dict(parse_expression(weights) if isinstance(weights, str) else weights or {})
    name, _, pattern = name.partition(":")
    if not pattern:
        found[name] = value
        return found
    before = found.get(name, {})
    patterns = dict(before if isinstance(before, Mapping) else {"*": before})
    patterns.pop(pattern, None)  # of several patterns that match the last one counts
    found[name] = {**patterns, pattern: value}
    return found


def _request(
    values: Mapping[str, Any], options: Mapping[str, Any], weights: Any, hashes: Mapping[str, str]
) -> MergeRequest:
    from compose.engine.merge_weights import parse_expression

    named = {key: value for key, value in values.items() if key not in ("options", "weights") and value is not None}
    named["bank"] = tuple(named.get("bank", ()))
    found = parse_expression(weights) if isinstance(weights, str) else weights
    return MergeRequest(**named, options=dict(options), weights=found or None, hashes=dict(hashes))


def _close(word: str, known: Iterable[str]) -> str | None:
    return next(iter(difflib.get_close_matches(word, list(known), n=1)), None)


def _unknown(word: str, known: Iterable[str], what: str) -> str:
    close = _close(word, known)
    hint = f"did you mean {close!r}? " if close else ""
    return f"unknown {what} {word!r}; {hint}(allowed: {', '.join(known)})"
