"""Linear scores, softmax, all experts or the best k: what most mixtures decide by, in the fewest operators.

`SiteRouter` computes the same step by step for any components; this is its fast path where a site has these. With
single tokens a decision costs what its operators and calls cost, not what they compute.

Shape letters: ``B`` rows, ``T`` tokens, ``D`` width of the gate's input, ``E`` experts, ``K`` chosen.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import nn

from compose.routers.gates.linear import LinearGate, LinearScores
from compose.routers.normalisations.softmax import Softmax
from compose.routers.routing import Routing
from compose.routers.selectors.every import All
from compose.routers.selectors.top_k import TopK, best
from compose.routers.spec import MixtureSpec


class SoftGates(NamedTuple):
    """How such a site decides.

    Attributes:
        temperature: Scores are divided by it.
        k: How many experts are chosen; None: all take part.
        to_one: Whether the gates of the chosen sum to 1; else they are their probabilities.
    """

    temperature: float
    k: int | None
    to_one: bool

    def decide(self, gate: LinearScores, x: torch.Tensor) -> Routing:
        """Return the routing for ``x (..., D)``."""
        weight_ED = gate.weight_ED
        if x.dtype != weight_ED.dtype:
            x = x.to(weight_ED.dtype)
        logits = nn.functional.linear(x, weight_ED, gate.bias_E).float()
        scores = logits if self.temperature == 1.0 else logits / self.temperature
        probs = torch.softmax(scores, dim=-1)
        if self.k is None:
            return Routing(probs, None, logits, probs)
        ids = best(scores, self.k)
        gates = torch.softmax(scores.gather(-1, ids), dim=-1) if self.to_one else probs.gather(-1, ids)
        return Routing(gates, ids, logits, probs)


def soft_gates(spec: MixtureSpec, select: nn.Module) -> SoftGates | None:
    """How the sites of a mixture decide, for sites that have all experts; None where there is more to it.

    Args:
        spec: The mixture.
        select: The site's selector, which knows its ``k``.
    """
    gate, normalise = spec.gate, spec.normalise
    if not isinstance(gate, LinearGate) or gate.layer_norm or not isinstance(normalise, Softmax) or normalise.learned:
        return None
    perturbed = spec.noise or spec.expert_dropout or spec.capacity is not None
    changed = spec.post != "none" or spec.gate_power != 1 or spec.global_scale != 1.0 or spec.always_on
    if perturbed or changed or spec.splits > 1:
        return None
    if isinstance(spec.select, All) and spec.renormalise == "none":
        return SoftGates(normalise.temperature, None, to_one=False)
    chooses = isinstance(spec.select, TopK) and not spec.select.selection_bias
    if not chooses or spec.renormalise == "softmax_probs":
        return None
    return SoftGates(normalise.temperature, select.k, to_one=spec.renormalise != "none")  # type: ignore[arg-type]
