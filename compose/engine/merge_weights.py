"""Weights of a merge: per adapter, or per adapter and target pattern; expressions such as ``0.6*math - 0.3*toxic``."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from fnmatch import fnmatchcase

from compose.errors import IncompatibleError, UnknownNameError

Weight = float | Mapping[str, float]
"""One number, or patterns of target paths with a number each; of several that match a target the last one counts."""

_TERM = re.compile(r"\s*([+-])?\s*(?:(\d+(?:\.\d*)?(?:[eE][+-]?\d+)?|\.\d+)\s*\*\s*)?([^\s*+]+)")


def parse_expression(text: str) -> dict[str, float]:
    """Read ``0.6*math + 0.4*code - 0.3*toxic``: signed terms, a number times an adapter's name, 1 where there is none.

    Names may hold anything but white space, ``*`` and ``+``; a minus sign is an operator only after white space.

    Raises:
        IncompatibleError: The text is not such a sum, or names an adapter twice.
    """
    weights: dict[str, float] = {}
    position = 0
    while position < len(text.rstrip()):
        found = _TERM.match(text, position)
        if found is None or (position > 0 and found.group(1) is None):
            raise IncompatibleError(
                f"cannot read {text[position:].strip()!r} in the expression {text!r}; "
                "write numbers times names, as in '0.6*math + 0.4*code - 0.3*toxic'"
            )
        sign, number, name = found.groups()
        if name in weights:
            raise IncompatibleError(f"the expression {text!r} names {name!r} twice; add its numbers up")
        weights[name] = float(number or 1) * (-1 if sign == "-" else 1)
        position = found.end()
    if not weights:
        raise IncompatibleError("the expression is empty; write one as in '0.6*math + 0.4*code'")
    return weights


def resolve_weights(
    weights: Mapping[str, Weight] | Sequence[float] | None, names: Sequence[str], targets: Sequence[str]
) -> tuple[tuple[str, ...], dict[str, list[float]]]:
    """Return who takes part, in the bank's order, and each target's weights in that order.

    Args:
        weights: Name -> weight: the adapters named take part. A sequence: one number per adapter. None: all at 1.
        names: Of the bank.
        targets: Of the bank.

    Raises:
        UnknownNameError: A name is not in the bank.
        IncompatibleError: A number is not finite, a pattern matches no target, or the counts differ.
    """
    if weights is None:
        weights = dict.fromkeys(names, 1.0)
    elif not isinstance(weights, Mapping):
        if len(weights) != len(names):
            raise IncompatibleError(f"need one weight per adapter ({len(names)}), got {len(weights)}")
        weights = dict(zip(names, weights, strict=True))
    unknown = [name for name in weights if name not in names]
    if unknown:
        raise UnknownNameError(f"no adapter {unknown[0]!r} in the bank (known: {', '.join(names)})")
    if not weights:
        raise IncompatibleError("no adapter takes part; name at least one")
    chosen = tuple(name for name in names if name in weights)
    columns = {name: _per_target(name, weights[name], targets) for name in chosen}
    return chosen, {target: [columns[name][target] for name in chosen] for target in targets}


def _per_target(name: str, weight: Weight, targets: Sequence[str]) -> dict[str, float]:
    patterns = weight if isinstance(weight, Mapping) else {"*": weight}
    found = dict.fromkeys(targets, 0.0)
    for pattern, number in patterns.items():
        if not math.isfinite(number):
            raise IncompatibleError(f"the weight of {name!r} must be finite, got {number}")
        matched = [target for target in targets if fnmatchcase(target, pattern)]
        if not matched:
            raise IncompatibleError(
                f"the pattern {pattern!r} of {name!r} matches no target; there are e.g. {', '.join(targets[:3])}"
            )
        found.update(dict.fromkeys(matched, float(number)))
    return found
