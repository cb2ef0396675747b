"""GenKnowSub: subtract what adapters of general text have in common from every expert (PEFT's option of Arrow).

Shape letters: ``D`` in, ``O`` out, ``R`` rank of one adapter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from compose.adapter import Adapter, LowRank
from compose.errors import IncompatibleError

Space = Literal["deltas", "factors"]


def subtract_general(
    adapters: Sequence[Adapter], general: Sequence[Adapter], *, space: Space = "deltas"
) -> list[Adapter]:
    """Return copies of the adapters minus the mean of the general ones; the given ones stay as they are.

    Args:
        adapters: The experts.
        general: Adapters of general text (PEFT: one per language of Wikipedia). One that misses a target counts as
            zero there; a target that an expert misses stays missing.
        space: ``"deltas"``: ``s B A - mean(s_g B_g A_g)``, exact for any ranks, as further rank rows. ``"factors"``:
            ``B - mean(B_g)`` and ``A - mean(A_g)``, what PEFT computes (in place): another function, with cross terms,
            for equal ranks only.

    Raises:
        IncompatibleError: No general adapters, or factors of unequal shapes in the space of factors.
    """
    if not general or space not in ("deltas", "factors"):
        raise IncompatibleError(
            f"give general adapters, and space 'deltas' or 'factors'; got {len(general)}, {space!r}"
        )
    subtract = _deltas if space == "deltas" else _factors
    results = []
    for adapter in adapters:
        targets = {
            target: subtract(update, [each.targets.get(target) for each in general], f"{adapter.name}: {target}")
            for target, update in adapter.targets.items()
        }
        results.append(replace(adapter, targets=targets, sha256="", source=None))
    return results


def _deltas(update: LowRank, general: Sequence[LowRank | None], where: str) -> LowRank:
    present = [each for each in general if each is not None]
    if not present:
        return update
    a = torch.cat([update.a, *(each.a.to(update.a.dtype) for each in present)])
    parts = [update.b * update.scaling]
    parts += [each.b.to(update.b.dtype) * (-each.scaling / len(general)) for each in present]
    return replace(update, a=a, b=torch.cat(parts, dim=1), scaling=1.0)


def _factors(update: LowRank, general: Sequence[LowRank | None], where: str) -> LowRank:
    shapes = {(each.a.shape, each.b.shape) if each is not None else None for each in general}
    if shapes != {(update.a.shape, update.b.shape)}:
        raise IncompatibleError(
            f"{where}: factors are subtracted one by one, so all adapters need this target and one rank; "
            "use space='deltas'"
        )
    present = [each for each in general if each is not None]
    a = update.a - torch.stack([each.a for each in present]).mean(0)
    b = update.b - torch.stack([each.b for each in present]).mean(0)
    return replace(update, a=a, b=b)
