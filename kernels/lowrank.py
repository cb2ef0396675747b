"""One differentiable low-rank product, ``base + ((x Aᵀ) ∘ c) B``, that all torch paths of the two ops share.

Shape letters: ``B`` batch, ``T`` tokens, ``D`` in, ``O`` out, ``R`` rank rows.
"""

from __future__ import annotations

from typing import Any

import torch


def lowrank(
    x_BTD: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor,
    base_BTO: torch.Tensor | None,
) -> torch.Tensor:
    """Return ``base + ((x aᵀ) ∘ c) b`` as a new tensor ``(B, T, O)``; differentiable in every argument.

    Saved for backward is only what a gradient needs: ``h = x aᵀ`` (with ``c``) for the gradient of ``c``, ``x`` only when
    ``a`` itself is trained.

    Args:
        x_BTD: Input.
        a: ``(R, D)`` shared by the batch, or ``(B, R, D)``: factors per batch row.
        b: ``(R, O)`` or ``(B, R, O)``.
        c: Coefficients that broadcast to ``(B, T, R)``; same dtype as ``x``.
        base_BTO: Added when given; never written to.
    """
    tensors = (x_BTD, a, b, c) if base_BTO is None else (x_BTD, a, b, c, base_BTO)
    if torch.compiler.is_compiling():
        return _expand(_shrink(x_BTD, a) * c, b, base_BTO)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _LowRank.apply(x_BTD, a, b, c, base_BTO)
    return _expand(_shrink(x_BTD, a).mul_(c), b, base_BTO)


class _LowRank(torch.autograd.Function):
    """Autograd of ``lowrank``; backward never recomputes the shrink and never writes to a saved tensor."""

    @staticmethod
    def forward(  # noqa: D102
        ctx: Any, x: torch.Tensor, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor, base: torch.Tensor | None
    ) -> torch.Tensor:
        need_x, need_a, need_b, need_c, _ = ctx.needs_input_grad
        h = _shrink(x, a)
        z = h * c if need_b or need_c else h.mul_(c)
        ctx.save_for_backward(
            x if need_a else None,
            a if need_x else None,
            b if need_x or need_a or need_c else None,
            c if need_x or need_a or need_b else None,
            h if need_b or need_c else None,
        )
        ctx.shapes = (a.dim(), c.shape)
        return _expand(z, b, base)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # noqa: D102
        need_x, need_a, need_b, need_c, need_base = ctx.needs_input_grad
        x, a, b, c, h = ctx.saved_tensors
        factor_dim, c_shape = ctx.shapes
        dx = da = db = dc = None
        if need_b:
            db = _outer(h * c, dy, factor_dim)
        if need_x or need_a or need_c:
            dz = _shrink(dy, b)
            if need_c:
                dc = _sum_to(h * dz, c_shape)
            if need_x or need_a:
                dh = dz.mul_(c)
                da = _outer(dh, x, factor_dim) if need_a else None
                dx = _expand(dh, a, None) if need_x else None
        return dx, da, db, dc, dy if need_base else None


def _shrink(x_BTD: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """``x aᵀ``: ``(B, T, R)``, fresh memory."""
    if a.dim() == 3:
        return torch.bmm(x_BTD, a.transpose(1, 2))
    batch, tokens, width = x_BTD.shape
    return torch.mm(x_BTD.reshape(batch * tokens, width), a.T).view(batch, tokens, a.shape[0])


def _expand(z_BTR: torch.Tensor, b: torch.Tensor, base_BTO: torch.Tensor | None) -> torch.Tensor:
    """``base + z b``: ``(B, T, O)``, fresh memory."""
    if b.dim() == 3:
        return torch.bmm(z_BTR, b) if base_BTO is None else torch.baddbmm(base_BTO, z_BTR, b)
    batch, tokens, rows = z_BTR.shape
    z, out = z_BTR.reshape(batch * tokens, rows), b.shape[1]
    y = torch.mm(z, b) if base_BTO is None else torch.addmm(base_BTO.reshape(batch * tokens, out), z, b)
    return y.view(batch, tokens, out)


def _outer(z_BTR: torch.Tensor, x_BTD: torch.Tensor, factor_dim: int) -> torch.Tensor:
    """``zᵀ x`` summed over tokens: ``(R, D)``, or per batch row ``(B, R, D)``."""
    if factor_dim == 3:
        return torch.bmm(z_BTR.transpose(1, 2), x_BTD)
    return torch.mm(z_BTR.reshape(-1, z_BTR.shape[-1]).T, x_BTD.reshape(-1, x_BTD.shape[-1]))


def _sum_to(product_BTR: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sum over the dimensions in which a tensor of ``shape`` was broadcast; low precision adds up in float32."""
    low = product_BTR.dtype in (torch.float16, torch.bfloat16)
    dims = [dim for dim in range(3) if dim - 3 + len(shape) < 0 or shape[dim - 3 + len(shape)] != product_BTR.shape[dim]]
    if not dims:
        return product_BTR.reshape(shape)
    summed = product_BTR.sum(dim=dims, keepdim=True, dtype=torch.float32 if low else None)
    return summed.to(product_BTR.dtype).reshape(shape)
