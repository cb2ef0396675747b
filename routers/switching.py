"""How often the dominant expert changes from one generated token to the next.

Shape letters: ``B`` rows, ``N`` decisions.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import NamedTuple

import torch

from compose.errors import IncompatibleError
from compose.routers.routing import Decisions
from compose.routers.site_sums import dominant_expert


class Switches(NamedTuple):
    """Of one site in one generation.

    Attributes:
        pairs_B: int64: pairs of neighbouring tokens per row, from the last token of the prompt on.
        switches_B: int64: those with different dominant experts.
        first: The decisions on the prompt.
    """

    pairs_B: torch.Tensor
    switches_B: torch.Tensor
    first: Decisions


def generation_switches(
    decisions: Sequence[Decisions],
    *,
    rows: int,
    lengths: Sequence[int] | None = None,
    sites: Collection[str] | None = None,
) -> dict[str, Switches]:
    """Count switches in the decisions recorded around one ``generate``, with or without a cache.

    Rows must keep their places: one beam, prompts padded on the left. A gate that decides once, on the prompt, has no
    pairs.

    Args:
        decisions: In the order they were recorded.
        rows: ``B``.
        lengths: New tokens of every row, without its stop token; None: as many as there were steps.
        sites: Names of the sites to look at; None: all.

    Raises:
        IncompatibleError: The decisions are not of ``rows`` rows.
    """
    found = {}
    for site in dict.fromkeys(each.site for each in decisions):
        steps = [each for each in decisions if each.site == site]
        if (sites is None or site in sites) and len(steps) > 1:
            found[site] = _of_site(steps, rows, lengths)
    return found


def _of_site(steps: Sequence[Decisions], rows: int, lengths: Sequence[int] | None) -> Switches:
    if any(len(each.real_N) % rows for each in steps):
        raise IncompatibleError(f"{steps[0].site}: the decisions are not of {rows} rows; give the rows of the batch")
    experts = torch.stack([dominant_expert(each).reshape(rows, -1)[:, -1] for each in steps])
    told = torch.full((rows,), len(steps) - 1) if lengths is None else torch.tensor(lengths)
    counted = torch.arange(1, len(steps))[:, None] <= told
    changed = (experts[1:] != experts[:-1]).cpu() & counted
    return Switches(counted.sum(0), changed.sum(0), steps[0])
