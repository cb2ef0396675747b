"""Options of a preset as plain values, as recipes and command lines give them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import fields, replace
from typing import Any, NamedTuple

from compose.errors import ComposeError, IncompatibleError, unknown_name
from compose.routers.presets.registry import PRESETS, FreshExperts
from compose.routers.spec import MixtureSpec

_COMPONENTS = ("gate", "normalise", "select")


class Configured(NamedTuple):
    """A preset with options.

    Attributes:
        spec: The mixture.
        experts: The experts it trains from scratch; None: it works over a bank.
    """

    spec: MixtureSpec
    experts: FreshExperts | None


def configured(name: str, options: Mapping[str, Any]) -> Configured:
    """Return a preset with some of its values replaced.

    Args:
        name: The preset.
        options: Fields of a mixture, as in ``mixture.json`` (a component is its name, or a mapping with ``name``; a
            mapping without changes the preset's own); fields of fresh experts (``num_experts``, ``rank`` ...); and
            ``top_k``, the number of experts that a preset selects.

    Raises:
        UnknownNameError: No such preset.
        IncompatibleError: Options that are unknown, or not possible; all of them are listed.
    """
    entry = PRESETS[name]
    of_spec = {each.name for each in fields(MixtureSpec)} - {"preset"}
    of_experts = {each.name for each in fields(FreshExperts)} if entry.experts is not None else set()
    known = sorted({*of_spec, *of_experts, "top_k"})
    problems = [unknown_name(f"option of preset {name!r}", key, known) for key in options if key not in known]
    if "always_on" in options and entry.experts is not None:
        of_experts -= {"always_on"}  # the mixture's; experts outside the gates have names of the preset's choice
    if problems:
        raise IncompatibleError("; ".join(problems))
    plain = entry.spec.to_json()
    for key, value in options.items():
        if key in of_spec:
            plain[key] = _component(plain[key], value) if key in _COMPONENTS else value
    if "top_k" in options:
        plain["select"] = _with_k(name, plain["select"], options["top_k"])
    fresh = {key: _tuple(value) for key, value in options.items() if key in of_experts}
    try:
        experts = None if entry.experts is None else replace(entry.experts, **fresh)
        return Configured(MixtureSpec.from_json(plain), experts)
    except ComposeError as error:
        raise IncompatibleError(f"preset {name!r} with these options: {error}") from error
    except (TypeError, ValueError, AttributeError) as error:
        raise IncompatibleError(f"preset {name!r}: an option has a value of a wrong kind: {error}") from error


def _component(before: Any, value: Any) -> Any:
    if isinstance(value, str):
        return {"name": value}
    if isinstance(value, Mapping) and "name" not in value and isinstance(before, Mapping):
        return {**before, **value}
    return value


def _with_k(name: str, select: Mapping[str, Any], k: Any) -> dict[str, Any]:
    if "k" not in select:
        raise IncompatibleError(
            f"preset {name!r} selects by {select['name']!r}, which has no k; give select instead of top_k"
        )
    return {**select, "k": k}


def _tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
