"""One differentiable low-rank product, ``base + ((x Aᵀ) ∘ c) B``, that all torch paths of the two ops share.

Shape letters: ``B`` batch, ``T`` tokens, ``D`` in, ``O`` out, ``R`` rank rows.
"""

from __future__ import annotations

from typing import Any

import torch

_FEW_ROWS = 8
"""Up to so many rank rows per batch row, a CPU computes ``a xᵀ`` 1.2 to 1.8 times as fast as ``x aᵀ``."""


def lowrank(
    x_BTD: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | float,
    base_BTO: torch.Tensor | None,
    *,
    reuse_base: bool = False,
) -> torch.Tensor:
    """Return ``base + ((x aᵀ) ∘ c) b``, ``(B, T, O)``; differentiable in every tensor.

    Saved for backward is only what a gradient needs: ``h = x aᵀ`` (with ``c``) for the gradient of ``c``, ``x`` only
    when ``a`` itself is trained.

    Args:
        x_BTD: Input.
        a: ``(R, D)`` shared by the batch, or ``(B, R, D)``: factors per batch row.
        b: ``(R, O)`` or ``(B, R, O)``, like ``a``.
        c: Coefficients that broadcast to ``(B, T, R)``, in the dtype of ``x``; a number costs no pass over ``h``.
        base_BTO: Added when given.
        reuse_base: Add into ``base_BTO`` and return it where its memory allows that; for callers that own it. Nothing
            may have saved it for backward.
    """
    if torch.compiler.is_compiling():
        return _expand(_shrink(x_BTD, a) * c, b, base_BTO, 1.0)
    if differentiated(x_BTD, a, b, c, base_BTO):
        reuse = reuse_base and base_BTO is not None and writable_with_a_graph(base_BTO)
        return _LowRank.apply(x_BTD, a, b, c, base_BTO, reuse)
    return undifferentiated(x_BTD, a, b, c, base_BTO, reuse_base)


def undifferentiated(
    x: torch.Tensor,
    a: torch.Tensor,
    b: torch.Tensor,
    c: torch.Tensor | float,
    base: torch.Tensor | None,
    reuse_base: bool,
) -> torch.Tensor:
    """``lowrank`` where the caller knows that nothing is differentiated; ``x`` and ``base`` may also be ``(T, D)``.

    With ``x (T, D)`` factors are shared, and coefficients ``(N, 1, R)`` belong to ``N`` equal runs of tokens.
    """
    h, alpha = _shrink(x, a), 1.0
    if isinstance(c, float) and base is not None:
        alpha = c
    elif isinstance(c, torch.Tensor) and h.dim() < c.dim():
        h.view(c.shape[0], -1, h.shape[1]).mul_(c)
    else:
        h.mul_(c)
    if reuse_base and base is not None and _writable(base):
        return _expand_into(h, b, base, alpha)
    return _expand(h, b, base, alpha)


def add_lowrank_(
    base_BTO: torch.Tensor, x_BTD: torch.Tensor, a_RD: torch.Tensor, b_RO: torch.Tensor, c: torch.Tensor
) -> torch.Tensor:
    """``base += ((x aᵀ) ∘ c) b``, undifferentiated and in the fewest operators: what single tokens take time for.

    ``x`` and ``base`` are contiguous and the caller's own; else see ``lowrank``.
    """
    h_BTR = torch.nn.functional.linear(x_BTD, a_RD).mul_(c)
    base_BTO.view(-1, b_RO.shape[1]).addmm_(h_BTR.view(-1, b_RO.shape[0]), b_RO)
    return base_BTO


class _LowRank(torch.autograd.Function):
    """Autograd of ``lowrank``; backward never recomputes the shrink and never writes to a saved tensor."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        c: torch.Tensor | float,
        base: torch.Tensor | None,
        reuse: bool,
    ) -> torch.Tensor:
        need_x, need_a, need_b, need_c = ctx.needs_input_grad[:4]
        h = _shrink(x, a)
        z = h * c if need_b or need_c else h.mul_(c)
        number = c if isinstance(c, float) else None
        ctx.save_for_backward(
            x if need_a else None,
            a if need_x else None,
            b if need_x or need_a or need_c else None,
            c if number is None and (need_x or need_a or need_b) else None,
            h if need_b or need_c else None,
        )
        ctx.number, ctx.factor_dim = number, a.dim()
        ctx.c_shape = c.shape if isinstance(c, torch.Tensor) else ()
        if reuse and base is not None:
            ctx.mark_dirty(base)
            return _expand_into(z, b, base, 1.0)
        return _expand(z, b, base, 1.0)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        need_x, need_a, need_b, need_c, need_base = ctx.needs_input_grad[:5]
        x, a, b, c, h = ctx.saved_tensors
        c = c if ctx.number is None else ctx.number
        dx = da = db = dc = None
        if need_b:
            db = _outer(h * c, dy, ctx.factor_dim)
        if need_x or need_a or need_c:
            dz = _shrink(dy, b)
            if need_c:
                dc = _sum_to(h * dz, ctx.c_shape)
            if need_x or need_a:
                dh = dz.mul_(c)
                da = _outer(dh, x, ctx.factor_dim) if need_a else None
                dx = _expand(dh, a, None, 1.0) if need_x else None
        return dx, da, db, dc, dy if need_base else None, None


def differentiated(*operands: torch.Tensor | float | None) -> bool:
    """Whether autograd records what is made of these operands."""
    return torch.is_grad_enabled() and any(
        isinstance(operand, torch.Tensor) and operand.requires_grad for operand in operands
    )


def _writable(base: torch.Tensor) -> bool:
    """Whether adding into ``base`` is safe: dense memory, and not an inference tensor met outside inference mode."""
    return base.is_contiguous() and (not base.is_inference() or torch.is_inference_mode_enabled())


def writable_with_a_graph(base: torch.Tensor) -> bool:
    """`_writable`, and autograd lets it be written to: no view of something else, no leaf that is trained."""
    return _writable(base) and not base._is_view() and not (base.is_leaf and base.requires_grad)


def _shrink(x_BTD: torch.Tensor, a: torch.Tensor) -> torch.Tensor:
    """``x aᵀ``: ``(B, T, R)``, fresh memory. Also the step back through ``b``: ``dy bᵀ``."""
    if a.dim() == 3:
        if a.shape[1] <= _FEW_ROWS and x_BTD.device.type == "cpu":
            return torch.bmm(a, x_BTD.transpose(1, 2)).transpose(1, 2)
        return torch.bmm(x_BTD, a.transpose(1, 2))
    if x_BTD.dim() == 2:
        return torch.mm(x_BTD, a.t())
    batch, tokens, width = x_BTD.shape
    return torch.mm(x_BTD.reshape(batch * tokens, width), a.t()).view(batch, tokens, a.shape[0])


def _expand(z_BTR: torch.Tensor, b: torch.Tensor, base_BTO: torch.Tensor | None, alpha: float) -> torch.Tensor:
    """``base + alpha z b``: ``(B, T, O)``, fresh memory."""
    if base_BTO is None:
        z_BTR = z_BTR if alpha == 1.0 else z_BTR * alpha
        if b.dim() == 3:
            return torch.bmm(z_BTR, b)
        # torch.matmul may choose bmm here, which costs up to four times as much in bfloat16
        return torch.mm(z_BTR.flatten(0, -2), b).view(*z_BTR.shape[:-1], b.shape[1])
    if z_BTR.dim() == 2:
        return torch.addmm(base_BTO, z_BTR, b, alpha=alpha)
    if b.dim() == 3:
        return torch.baddbmm(base_BTO, z_BTR, b, alpha=alpha)
    batch, tokens, out = base_BTO.shape
    flat, rows = base_BTO.reshape(batch * tokens, out), z_BTR.reshape(batch * tokens, z_BTR.shape[2])
    return torch.addmm(flat, rows, b, alpha=alpha).view(batch, tokens, out)


def _expand_into(z_BTR: torch.Tensor, b: torch.Tensor, base_BTO: torch.Tensor, alpha: float) -> torch.Tensor:
    """``base += alpha z b`` in place."""
    if b.dim() == 3:
        return base_BTO.baddbmm_(z_BTR, b, alpha=alpha)
    if z_BTR.dim() == 2:
        return base_BTO.addmm_(z_BTR, b, alpha=alpha)
    base_BTO.flatten(0, 1).addmm_(z_BTR.flatten(0, 1), b, alpha=alpha)
    return base_BTO


def _outer(z_BTR: torch.Tensor, x_BTD: torch.Tensor, factor_dim: int) -> torch.Tensor:
    """``zᵀ x`` summed over tokens: ``(R, D)``, or per batch row ``(B, R, D)``."""
    if factor_dim == 3:
        return torch.bmm(z_BTR.transpose(1, 2), x_BTD)
    return torch.mm(z_BTR.flatten(0, 1).t(), x_BTD.flatten(0, 1))


def _sum_to(product_BTR: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """Sum over the dimensions in which a tensor of ``shape`` was broadcast; torch adds low precision up in float32."""
    padded = (1,) * (3 - len(shape)) + tuple(shape)
    dims = [dim for dim in range(3) if padded[dim] != product_BTR.shape[dim]]
    if not dims:
        return product_BTR.reshape(shape)
    return product_BTR.sum(dim=dims, keepdim=True).reshape(shape)
