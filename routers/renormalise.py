"""What happens to gates after selection; published implementations disagree here, so it is a choice of its own.

| how | gates become | who |
| --- | --- | --- |
| ``none`` | what they are; their sum falls below 1 by what was not selected | MoLoRA and X-LoRA with top-k |
| ``sum`` | divided by their sum | MoLA, MixLoRA, Mixtral, AdaMoLE |
| ``softmax`` | softmax of the selected scores | PHATGOOSE, MeteoRA, Arrow |
| ``softmax_probs`` | softmax of the selected gates: a double softmax, flatter than the first | HMoRA, DLP-LoRA |

With softmax probabilities ``sum`` and ``softmax`` are the same function. Shape letters: ``E`` experts, ``K`` chosen.
"""

from __future__ import annotations

import torch

from compose.errors import UnknownNameError
from compose.routers.steps import Selected

RENORMALISATIONS = ("none", "sum", "softmax", "softmax_probs")


def renormalise(how: str, selected: Selected) -> torch.Tensor:
    """Return the gates in the shape of ``selected.gates``; entries that are not selected stay 0.

    A decision whose gates are all 0 keeps them. ``sum`` is meant for gates >= 0: with mixed signs it divides by what
    is left of them.

    Raises:
        UnknownNameError: No such renormalisation.
    """
    gates = selected.gates
    if how == "none":
        return gates
    if how == "sum":
        total = gates.sum(-1, keepdim=True)
        return gates / torch.where(total != 0, total, 1)
    if how not in RENORMALISATIONS:
        raise UnknownNameError(f"unknown renormalisation {how!r}; known: {', '.join(RENORMALISATIONS)}")
    taken = (selected.logits > float("-inf")) & (gates != 0).any(-1, keepdim=True)
    return softmax_where(selected.logits if how == "softmax" else gates, taken)


def softmax_where(scores: torch.Tensor, taken: torch.Tensor) -> torch.Tensor:
    """Softmax over the entries of the last dimension where ``taken``; 0 elsewhere, and in lines without any."""
    none = ~taken.any(-1, keepdim=True)
    inside = torch.where(taken | none, scores.masked_fill(none, 0), float("-inf"))
    return torch.where(taken, torch.softmax(inside, -1), 0)
