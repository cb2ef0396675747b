"""Linear scores, softmax, all experts or the best k: what most mixtures decide by, in the fewest operators.

`SiteRouter` computes the same step by step for any components; this is its fast path where a site has these. With
single tokens a decision costs what its operators and calls cost, not what they compute.

Shape letters: ``B`` rows, ``T`` tokens, ``D`` width of the gate's input, ``E`` experts, ``K`` chosen.
"""

from __future__ import annotations

from array import array
from functools import partial
from math import exp
from typing import Any, NamedTuple

import torch
from torch import nn

from compose.kernels.gated_lowrank import Others, SoftGate, gated_lowrank
from compose.kernels.stack import Spread
from compose.routers.mixing import ROWS_PER_CHOICE
from compose.routers.normalisations.softmax import Softmax
from compose.routers.routing import Routing
from compose.routers.selectors.every import All
from compose.routers.selectors.top_k import TopK, best
from compose.routers.spec import MixtureSpec


class SoftGates(NamedTuple):
    """How such a site decides.

    Attributes:
        temperature: Scores are divided by it.
        select: The site's selector, which knows how many experts are chosen; None: all take part.
        to_one: Whether the gates of the chosen sum to 1; else they are their probabilities.
    """

    temperature: float
    select: Any
    to_one: bool

    @property
    def k(self) -> int | None:
        """How many experts are chosen now; None: all take part."""
        return None if self.select is None else self.select.k

    def like(self, other: SoftGates) -> bool:
        """Whether another site decides so now."""
        return (self.temperature, self.k, self.to_one) == (other.temperature, other.k, other.to_one)

    def dense(self, logits: torch.Tensor) -> torch.Tensor:
        """Gates of all experts ``(N, E)``, 0 for those not chosen; without autograd, and ``logits`` are used up.

        As in `decide`, of equal scores the lower indices are chosen.
        """
        scores = logits if self.temperature == 1.0 else logits.div_(self.temperature)
        k = self.k
        if k is None:
            return torch.softmax(scores, dim=-1)
        if scores.numel() <= _FEW and scores.dtype is torch.float32:
            gates = _gates_of_few(scores, k, to_one=self.to_one)
            if gates is not None:
                return gates
        others = _others(scores, k)
        if self.to_one:
            return torch.softmax(scores.masked_fill_(others, float("-inf")), dim=-1)
        return torch.softmax(scores, dim=-1).masked_fill_(others, 0.0)

    def others(self) -> Others | None:
        """Scores ``(N, E)`` -> which experts take no part; None where all do."""
        k = self.k
        return None if k is None else partial(_others, k=k)

    def mixes_all(self, rows: int) -> bool:
        """Whether ``rows`` rank rows, those of all experts, are mixed sooner than those of the chosen are picked."""
        k = self.k
        return k is None or rows <= ROWS_PER_CHOICE * k

    def decide(self, weight_ED: torch.Tensor, bias_E: torch.Tensor | None, x: torch.Tensor) -> Routing:
        """Return the routing for ``x (..., D)``."""
        if x.dtype != weight_ED.dtype:
            x = x.to(weight_ED.dtype)
        logits = nn.functional.linear(x, weight_ED, bias_E).float()
        scores = logits if self.temperature == 1.0 else logits / self.temperature
        probs = torch.softmax(scores, dim=-1)
        k = self.k
        if k is None:
            return Routing(probs, None, logits, probs)
        ids = _best(scores, k)
        gates = torch.softmax(scores.gather(-1, ids), dim=-1) if self.to_one else probs.gather(-1, ids)
        return Routing(gates, ids, logits, probs)


def mix_trained(
    soft: SoftGates | None,
    product: tuple[torch.Tensor, torch.Tensor | None] | None,
    spread: Spread | None,
    x: torch.Tensor,
    call: Any,
) -> torch.Tensor | None:
    """Decide and mix in one differentiable function, where a target's own gate decides so for every token.

    For callers that need no routing, and know that nobody watches the steps and that no autocast is on.

    Args:
        soft: How the site decides.
        product: The gate's weight and bias, where its scores are that product.
        spread: How its gates become coefficients.
        x: ``(B, T, D)``.
        call: Factors and base output.

    Returns:
        The base output plus the mixture; None where there is more to the decision, or types differ.
    """
    if soft is None or product is None or spread is None or not (soft.k is None or soft.to_one):
        return None
    (weight_ED, bias_E), stack, base, dtype = product, call.stack, call.base, spread.matrix_RE.dtype
    given = (x, weight_ED, stack.a_RD, base)
    if base is None or any(each.dtype is not dtype for each in given) or x.ndim != 3:
        return None
    rows, experts = spread.matrix_RE.shape
    if not soft.mixes_all(rows) or weight_ED.shape[0] != experts:
        return None
    gate = SoftGate(weight_ED, bias_E, spread.matrix_RE, soft.temperature, soft.others())
    return gated_lowrank(x, gate, stack.a_RD, stack.b_RO, base, reuse_base=call.owns_base)


_MANY = 1024
"""From so many scores on, with experts enough to be more than twice `k`, a CPU finds the best sooner than it sorts."""


_FEW = 128
"""Up to so many scores are ranked sooner in Python: between a model's products no operator's code is in the cache."""


def _gates_of_few(scores: torch.Tensor, k: int, *, to_one: bool) -> torch.Tensor | None:
    """`SoftGates.dense`; None where some of the best are equal, or one is no number."""
    flat, start = [0.0] * scores.numel(), 0
    for row in scores.tolist():
        ranked, whole = sorted(row, reverse=True), sum(row)
        if len(set(ranked[: k + 1])) <= k or whole - whole != 0.0:
            return None
        parts = [exp(score - ranked[0]) for score in ranked[:k]]
        total = sum(parts) if to_one else sum([exp(score - ranked[0]) for score in row])
        for score, part in zip(ranked, parts, strict=False):
            flat[start + row.index(score)] = part / total
        start += len(row)
    return torch.frombuffer(array("f", flat), dtype=torch.float32).view(scores.shape)


def _others(scores: torch.Tensor, k: int) -> torch.Tensor:
    """``(N, E)`` bool: all but the best ``k``."""
    return torch.ones_like(scores, dtype=torch.bool).scatter_(-1, _best(scores, k), False)


def _best(scores: torch.Tensor, k: int) -> torch.Tensor:
    """`best`, sooner on a CPU; for callers that trace nothing, since it looks at the scores."""
    if scores.numel() >= _MANY and scores.shape[-1] > 2 * k and scores.device.type == "cpu":
        values, ids = scores.detach().topk(k + 1, dim=-1)
        if bool((values[..., :-1] > values[..., 1:]).all()):  # topk leaves open which of equal ones it takes
            return ids[..., :k]
    return best(scores, k)


def soft_gates(spec: MixtureSpec, select: nn.Module) -> SoftGates | None:
    """How the sites of a mixture decide, for sites that have all experts; None where there is more to it.

    Whether the gate's scores are one product is the gate's to say.

    Args:
        spec: The mixture.
        select: The site's selector.
    """
    normalise = spec.normalise
    if not isinstance(normalise, Softmax) or normalise.learned:
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
    return SoftGates(normalise.temperature, select, to_one=spec.renormalise != "none")
