"""Which presets a law runs over on which architecture.

Every preset stands in every law on Llama, and on each other architecture one preset of each kind: there gates stand
elsewhere, read other activations and other tokens. Presets that differ in numbers (ranks, coefficients, k, powers) or
in what is computed from scores alone (normalisation, renormalisation) fail there only if they fail on Llama too.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import product

from compose.routers.presets.registry import PRESETS


def kinds(name: str) -> set[tuple[str, ...]]:
    """What of a preset may meet an architecture; a new value of any of these is a new kind."""
    spec = PRESETS[name].spec
    return {
        ("gates", spec.site, spec.scope, spec.gate_input, spec.pooling),
        ("gate", type(spec.gate).__name__),
        ("select", type(spec.select).__name__),
        ("experts", spec.structure, spec.combine, spec.expert_grad, str(spec.splits > 1), str(spec.subtract_start)),
        ("beside the gates", str(bool(spec.always_on)), spec.universal),
        ("train", spec.train),
        ("drawn", str(bool(spec.noise)), str(bool(spec.expert_dropout)), str(bool(spec.capacity))),
        *(("loss", type(loss).__name__) for loss in spec.losses),
    }


def one_of_each_kind(names: Iterable[str]) -> list[str]:
    """Return names that together show every kind: the one that shows most, then those that show what it lacks."""
    names, seen = list(names), set[tuple[str, ...]]()
    chosen = []
    while len(lacking := max((kinds(name) - seen for name in names), key=len, default=set())):
        chosen.append(next(name for name in names if kinds(name) - seen == lacking))
        seen |= lacking
    return sorted(chosen, key=names.index)


def on_architectures(names: Iterable[str], *others: str) -> list[tuple[str, str]]:
    """Pairs ``(name, architecture)``: all names on Llama, one of each kind on the others."""
    names = list(names)
    return [*product(names, ["llama"]), *product(one_of_each_kind(names), others)]
