"""Planted anomalies for the audit study, each kind naive, with the norms of all modules restored, with spectra kept.

An attacker who knows of norm checks rescales every module to the Frobenius norm it had (``norm matched``). One who
knows the statistics keeps all singular values too and changes directions alone (``spectrum matched``). Anomalies are
planted into benign adapters and keep rank and targets.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, NamedTuple

import torch

if TYPE_CHECKING:
    from compose.adapter import Adapter, LowRank

LEVELS = ("naive", "norm matched", "spectrum matched")
KINDS = ("norm x 10", "rank-1 trigger", "random B", "colluding pair")
ORTHOGONAL = "orthogonal halves"
CASES = (*((kind, level) for kind in KINDS for level in LEVELS), ("colluding pair", ORTHOGONAL))
TRIGGERED = ("self_attn.v_proj", "self_attn.o_proj", "mlp.down_proj")
"""Targets that carry a trigger or a payload; the other kinds change all."""


class Spectrum(NamedTuple):
    """``scaling * b @ a`` as ``u (O, R)``, ``s (R,)`` falling, ``v (I, R)``."""

    u: torch.Tensor
    s: torch.Tensor
    v: torch.Tensor


Change = Callable[[Spectrum, torch.Generator], Spectrum]


def plant(kind: str, level: str, adapter: Adapter, seed: int) -> Adapter:
    """Return the adapter with an anomaly of one kind (not ``colluding pair``)."""
    change = _SINGLE[kind, level]
    only = TRIGGERED if kind == "rank-1 trigger" else ()
    return _changed(adapter, f"{adapter.name}-{kind}-{level}", change, seed, only, restore=level == "norm matched")


def plant_pair(level: str, first: Adapter, second: Adapter, seed: int) -> tuple[Adapter, Adapter]:
    """Return two adapters that carry one payload together, of rank 1 in every target of `TRIGGERED`.

    ``naive``: both carry it with the norm of their own module, in place of their weakest direction. ``norm matched``:
    then every module is rescaled. ``spectrum matched``: it takes the place of the strongest direction, with its size.
    ``orthogonal halves``: parts that write one direction and read orthogonal ones take the place of the weakest, with
    its size, so that not even the norm of their sum shows them.
    """
    made = []
    for part, one in enumerate((first, second)):

        def change(found: Spectrum, generator: torch.Generator, part: int = part) -> Spectrum:
            write = _direction(len(found.u), generator)
            reads = torch.linalg.qr(torch.randn(len(found.v), 2, generator=generator, dtype=torch.float64))[0]
            if level == ORTHOGONAL:
                return _put(found, write, reads[:, part], float(found.s[-1]))
            if level == "spectrum matched":
                turned = Spectrum(found.u.flip(1), found.s.flip(0), found.v.flip(1))
                return _put(turned, write, reads[:, 0], float(found.s[0]))
            return _put(found, write, reads[:, 0], float(found.s.norm()))

        name = f"{one.name}-pair-{level}-{part}"
        made.append(_changed(one, name, change, seed, TRIGGERED, restore=level == "norm matched"))
    return made[0], made[1]


def _louder(found: Spectrum, generator: torch.Generator) -> Spectrum:
    """Everything ten times as large."""
    return found._replace(s=found.s * 10)


def _lead(found: Spectrum, generator: torch.Generator) -> Spectrum:
    """The leading direction ten times as large: what amplification is left when norms are restored (LoBAM)."""
    return found._replace(s=torch.cat([found.s[:1] * 10, found.s[1:]]))


def _swap(found: Spectrum, generator: torch.Generator) -> Spectrum:
    """Leading and second direction change places: the second is amplified, the spectrum stays."""
    order = [1, 0, *range(2, len(found.s))]
    return found._replace(u=found.u[:, order], v=found.v[:, order])


def _trigger(found: Spectrum, generator: torch.Generator) -> Spectrum:
    """A random direction of three times the largest singular value in place of the weakest."""
    return _put(found, _direction(len(found.u), generator), _direction(len(found.v), generator), 3 * float(found.s[0]))


def _quiet_trigger(found: Spectrum, generator: torch.Generator) -> Spectrum:
    """A random direction of the weakest one's size in its place."""
    return _put(found, _direction(len(found.u), generator), _direction(len(found.v), generator), float(found.s[-1]))


def _random_b(found: Spectrum, generator: torch.Generator) -> Spectrum:
    """B of normal entries of spread 0.04, as A has when training begins; A's row space stays."""
    core = torch.randn(len(found.u), len(found.s), generator=generator, dtype=torch.float64) * 0.04
    u, s, turn = torch.linalg.svd(core, full_matrices=False)
    return Spectrum(u, s, found.v @ turn.T)


def _random_writes(found: Spectrum, generator: torch.Generator) -> Spectrum:
    """Random output directions with the singular values and input directions kept."""
    drawn = torch.randn(len(found.u), len(found.s), generator=generator, dtype=torch.float64)
    return found._replace(u=torch.linalg.qr(drawn)[0])


_SINGLE: dict[tuple[str, str], Change] = {
    ("norm x 10", "naive"): _louder,
    ("norm x 10", "norm matched"): _lead,
    ("norm x 10", "spectrum matched"): _swap,
    ("rank-1 trigger", "naive"): _trigger,
    ("rank-1 trigger", "norm matched"): _trigger,
    ("rank-1 trigger", "spectrum matched"): _quiet_trigger,
    ("random B", "naive"): _random_b,
    ("random B", "norm matched"): _random_b,
    ("random B", "spectrum matched"): _random_writes,
}


def _direction(length: int, generator: torch.Generator) -> torch.Tensor:
    drawn = torch.randn(length, generator=generator, dtype=torch.float64)
    return drawn / drawn.norm()


def _put(found: Spectrum, write: torch.Tensor, read: torch.Tensor, size: float) -> Spectrum:
    """Replace the weakest direction by ``size * write read^T``."""
    u = torch.cat([found.u[:, :-1], write[:, None]], dim=1)
    v = torch.cat([found.v[:, :-1], read[:, None]], dim=1)
    return Spectrum(u, torch.cat([found.s[:-1], torch.tensor([size], dtype=torch.float64)]), v)


def _changed(
    adapter: Adapter, name: str, change: Change, seed: int, only: tuple[str, ...], *, restore: bool
) -> Adapter:
    from compose.adapter import Adapter

    targets = {}
    for at, (module, update) in enumerate(adapter.targets.items()):
        if only and not module.endswith(only):
            targets[module] = update
            continue
        generator = torch.Generator().manual_seed(seed * 1000 + at)
        targets[module] = _update(change(_spectrum(update), generator), update, restore)
    return Adapter(name, adapter.base, targets)


def _spectrum(update: LowRank) -> Spectrum:
    from compose.merging.subspace import triplets

    found = triplets(update.scaling * update.b.double(), update.a.double().T)
    return Spectrum(found.u, found.s, found.v)


def _update(found: Spectrum, before: LowRank, restore: bool) -> LowRank:
    from compose.adapter import LowRank

    made = LowRank((found.s.sqrt() * found.v).T.contiguous(), found.u * found.s.sqrt(), 1.0)
    factor = before.norm() / made.norm() if restore else 1.0
    return LowRank(made.a.float(), (made.b * factor).float(), 1.0)
