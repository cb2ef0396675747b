"""A low-rank product whose coefficients are soft gates of its own input: one autograd function for gates and factors.

The gates' scores are kept experts first, ``(E, N)``: a softmax over a few experts takes a CPU a tenth of the time so.
Backward adds the gates' part of the input's gradient to the factors' part in place, and computes coefficients again.

Shape letters: ``B`` batch, ``T`` tokens, ``N`` all tokens, ``D`` in, ``O`` out, ``E`` experts, ``R`` rank rows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from compose.kernels.lowrank import writable_with_a_graph

Others = Callable[[torch.Tensor], torch.Tensor]


class SoftGate(NamedTuple):
    """Gates ``softmax((x weightᵀ + bias) / temperature)`` of experts, and what they weigh.

    Attributes:
        weight_ED: Of the scores.
        bias_E: Of the scores, or None.
        spread_RE: How gates become coefficients of rank rows; not differentiated.
        temperature: Positive.
        others: Scores ``(N, E)`` -> bool ``(N, E)``: experts that take no part; the gates of the rest sum to 1.
    """

    weight_ED: torch.Tensor
    bias_E: torch.Tensor | None
    spread_RE: torch.Tensor
    temperature: float = 1.0
    others: Others | None = None


def gated_lowrank(
    x_BTD: torch.Tensor,
    gate: SoftGate,
    a_RD: torch.Tensor,
    b_RO: torch.Tensor,
    base_BTO: torch.Tensor,
    *,
    reuse_base: bool = False,
) -> torch.Tensor:
    """Return ``base + ((x aᵀ) ∘ (g spreadᵀ)) b``, ``(B, T, O)``, with the gates ``g (N, E)`` of ``x``.

    Differentiable once in input, gate, factors and base. All tensors have one floating dtype.

    Args:
        x_BTD: Input.
        gate: How gates come from it.
        a_RD: Down factors of all experts.
        b_RO: Up factors, transposed.
        base_BTO: Added.
        reuse_base: Add into ``base_BTO`` and return it where its memory allows that; for callers that own it. Nothing
            may have saved it for backward.
    """
    reuse = reuse_base and writable_with_a_graph(base_BTO)
    return _GatedLowRank.apply(x_BTD, gate.weight_ED, gate.bias_E, a_RD, b_RO, base_BTO, gate, reuse)


class _GatedLowRank(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x_BTD: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        a: torch.Tensor,
        b: torch.Tensor,
        base: torch.Tensor,
        gate: SoftGate,
        reuse: bool,
    ) -> torch.Tensor:
        x = x_BTD.reshape(-1, x_BTD.shape[-1])
        scores_EN = torch.mm(weight, x.t())
        if bias is not None:
            scores_EN += bias[:, None]
        if gate.temperature != 1.0:
            scores_EN /= gate.temperature
        if gate.others is not None:
            scores_EN.t().masked_fill_(gate.others(scores_EN.t()), float("-inf"))
        gates_EN = torch.softmax(scores_EN, dim=0)
        h = torch.mm(x, a.t())
        z = h * torch.mm(gates_EN.t(), gate.spread_RE.t())
        ctx.save_for_backward(x, weight, a, b, gates_EN, h)
        ctx.spread, ctx.temperature, ctx.shape = gate.spread_RE, gate.temperature, x_BTD.shape
        if reuse:
            ctx.mark_dirty(base)
            base.flatten(0, 1).addmm_(z, b)
            return base
        return torch.addmm(base.reshape(-1, base.shape[-1]), z, b).view(base.shape)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy_BTO: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_x, need_weight, need_bias, need_a, need_b, need_base = ctx.needs_input_grad[:6]
        (x, weight, a, b, gates_EN, h), spread = ctx.saved_tensors, ctx.spread
        c = torch.mm(gates_EN.t(), spread.t())
        dy = dy_BTO.reshape(-1, dy_BTO.shape[-1])
        dx = dweight = dbias = da = db = None
        if need_b:
            db = torch.mm((h * c).t(), dy)
        dz = torch.mm(dy, b.t())
        if need_x or need_weight or need_bias:
            dscores_EN = torch.mm(spread.t(), (h * dz).t())
            dscores_EN = (dscores_EN - (dscores_EN * gates_EN).sum(0)).mul_(gates_EN)
            if ctx.temperature != 1.0:
                dscores_EN /= ctx.temperature
            dweight = torch.mm(dscores_EN, x) if need_weight else None
            dbias = dscores_EN.sum(1) if need_bias else None
        if need_x or need_a:
            dh = dz.mul_(c)
            da = torch.mm(dh.t(), x) if need_a else None
            dx = torch.mm(dh, a).addmm_(dscores_EN.t(), weight).view(ctx.shape) if need_x else None
        return dx, dweight, dbias, da, db, dy_BTO if need_base else None, None, None
