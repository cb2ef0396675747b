"""Low-rank products whose second half reads, per token, only the rank rows of its adapters (``embedding_bag``).

Shape letters: ``T`` tokens, ``K`` adapters per token, ``N`` chosen rank rows of all tokens together, ``D`` in, ``O``
out, ``R`` rank rows, ``r`` largest rank.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch.nn.functional import embedding_bag

from compose.kernels.lowrank import differentiated
from compose.kernels.stack import LoraStack


class Bags(NamedTuple):
    """The rank rows that every token uses, token after token.

    Attributes:
        rows_N: Rank rows.
        cells_N: Their places in a flattened ``(T, R)``.
        pairs_N: The pair ``t K + k`` each of them belongs to.
        starts_T: Where the rows of each token begin.
    """

    rows_N: torch.Tensor
    cells_N: torch.Tensor
    pairs_N: torch.Tensor
    starts_T: torch.Tensor


def make_bags(stack: LoraStack, ids_TK: torch.Tensor) -> Bags:
    """Find the rank rows of ids ``(T, K)``; -1 and adapters of rank 0 add none."""
    tokens, chosen = ids_TK.shape
    device = ids_TK.device
    lines = torch.where(ids_TK < 0, stack.num_adapters, ids_TK)
    rows_TKr, valid_TKr = stack.index.table_Er[lines], stack.index.valid_Er[lines]
    rank = rows_TKr.shape[2]
    cells = rows_TKr + torch.arange(tokens, device=device)[:, None, None] * stack.num_rows
    pairs = torch.arange(tokens * chosen, device=device).view(tokens, chosen, 1).expand(tokens, chosen, rank)
    if bool(valid_TKr.all()):
        starts = torch.arange(tokens, device=device) * (chosen * rank)
        return Bags(rows_TKr.reshape(-1), cells.reshape(-1), pairs.reshape(-1), starts)
    counts = valid_TKr.sum((1, 2))
    return Bags(rows_TKr[valid_TKr], cells[valid_TKr], pairs[valid_TKr], counts.cumsum(0) - counts)


def bag_lowrank(
    x_TD: torch.Tensor,
    stack: LoraStack,
    c_P: torch.Tensor,
    base_TO: torch.Tensor | None,
    bags: Bags,
) -> torch.Tensor:
    """Return ``base + Σ_k c_tk B A x_t``, ``(T, O)``: one product with all A rows, then one bag of B rows per token.

    Differentiable in every tensor; ``x`` is saved only when A is trained.

    Args:
        x_TD: Input.
        stack: Of the target.
        c_P: ``(T K,)`` coefficients of the pairs, scaling included, in the dtype of ``x``.
        base_TO: Added when given.
        bags: From ``make_bags``.
    """
    a, b, c_N = stack.a_RD, stack.b_RO, c_P.index_select(0, bags.pairs_N)
    if differentiated(x_TD, a, b, c_N, base_TO):
        delta = _Bagged.apply(x_TD, a, b, c_N, bags)
        return delta if base_TO is None else base_TO + delta
    return bag_forward(x_TD, a, b, c_N, base_TO, bags)


def bag_forward(
    x_TD: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c_N: torch.Tensor,
    base_TO: torch.Tensor | None,
    bags: Bags,
) -> torch.Tensor:
    """``bag_lowrank`` with coefficients of the chosen rows, where nothing is differentiated."""
    delta = _sum_rows(_pick(x_TD, a, bags).mul_(c_N), b, bags)
    return delta if base_TO is None else delta.add_(base_TO)


class _Bagged(torch.autograd.Function):
    """Autograd of ``bag_lowrank``: the gradient of x is a bag of A rows, that of a factor one dense product."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c_N: torch.Tensor, bags: Bags
    ) -> torch.Tensor:
        need_x, need_a, need_b, need_c = ctx.needs_input_grad[:4]
        h_N = _pick(x, a, bags)
        ctx.save_for_backward(
            x if need_a else None,
            a if need_x or need_a else None,
            b if need_x or need_a or need_b or need_c else None,
            c_N if need_x or need_a or need_b else None,
            h_N if need_b or need_c else None,
        )
        ctx.bags = bags
        return _sum_rows(h_N * c_N, b, bags)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[Any, ...]:
        need_x, need_a, need_b, need_c = ctx.needs_input_grad[:4]
        x, a, b, c_N, h_N = ctx.saved_tensors
        dx = da = db = dc = None
        dy = dy.contiguous()  # an expanded gradient is copied once, not by every product
        if need_b:
            db = _outer(h_N * c_N, dy, b, ctx.bags)
        if need_x or need_a or need_c:
            dz_N = _pick(dy, b, ctx.bags)
            dc = h_N * dz_N if need_c else None
            if need_x or need_a:
                dh_N = dz_N.mul_(c_N)
                da = _outer(dh_N, x, a, ctx.bags) if need_a else None
                dx = _sum_rows(dh_N, a, ctx.bags) if need_x else None
        return dx, da, db, dc, None


def _pick(x_TD: torch.Tensor, factor: torch.Tensor, bags: Bags) -> torch.Tensor:
    """``x fᵀ`` with all rows, of which every token keeps its own: ``(N,)``."""
    return torch.mm(x_TD, factor.t()).view(-1).index_select(0, bags.cells_N)


def _sum_rows(z_N: torch.Tensor, factor: torch.Tensor, bags: Bags) -> torch.Tensor:
    """Per token, its rows of ``factor`` weighted by ``z`` and added up; zeros where it has none."""
    return embedding_bag(bags.rows_N, factor, bags.starts_T, mode="sum", per_sample_weights=z_N)


def _outer(z_N: torch.Tensor, x_TD: torch.Tensor, factor: torch.Tensor, bags: Bags) -> torch.Tensor:
    """``zᵀ x`` over tokens, ``(R, D)``; a row that a token uses twice counts twice."""
    z_TR = z_N.new_zeros(len(x_TD) * len(factor)).index_add_(0, bags.cells_N, z_N)
    return torch.mm(z_TR.view(len(x_TD), len(factor)).t(), x_TD)
