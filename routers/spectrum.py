"""The spectrum of a low-rank update through its factors: exact, small, and the same for every way to factor it.

With ``B = Q_b R_b`` and ``A^T = Q_a R_a`` the update is ``B A = Q_b (R_b R_a^T) Q_a^T``, so the singular values of the
``r x r`` core are those of ``B A``, and no ``(O, D)`` matrix is formed. Everything is computed on the CPU in float64.

Shape letters: ``D`` in, ``O`` out, ``E`` experts, ``r`` rank of one expert, ``R`` rank rows.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

from compose.kernels.stack import LoraStack


class RightSpectrum(NamedTuple):
    """Singular values and right singular vectors of ``B A``, strongest first; float64 on the CPU.

    Attributes:
        sigma_r: ``(r',)``, with ``r'`` the numerical rank: values below rounding are left out.
        v_rD: ``(r', D)``, orthonormal rows, each signed so that its entry of largest size is positive.
    """

    sigma_r: torch.Tensor
    v_rD: torch.Tensor


def right_spectrum(a_rD: torch.Tensor, b_rO: torch.Tensor) -> RightSpectrum:
    """Return the right spectrum of ``B A``.

    It depends on the product alone: ``(B Q)(Q^-1 A)`` gives the same up to rounding, where singular values differ.

    Args:
        a_rD: ``(r, D)``.
        b_rO: ``(r, O)``: B transposed, as stacks keep it.
    """
    a, b = (factor.detach().to("cpu", torch.float64) for factor in (a_rD, b_rO))
    if not len(a):
        return RightSpectrum(a.new_zeros(0), a)
    basis_Dm, core_a = torch.linalg.qr(a.T)
    _, core_b = torch.linalg.qr(b.T, mode="r")
    _, sigma_r, v_rm = torch.linalg.svd(core_b @ core_a.T, full_matrices=False)
    kept = sigma_r > sigma_r[0] * len(a) * torch.finfo(torch.float64).eps
    v_rD = (v_rm @ basis_Dm.T)[kept]
    largest = v_rD.gather(1, v_rD.abs().argmax(1, keepdim=True))
    return RightSpectrum(sigma_r[kept], v_rD * torch.where(largest < 0, -1.0, 1.0))


def first_directions(stack: LoraStack) -> torch.Tensor:
    """``(E, D)`` float32: the first right singular vector of every expert; 0 where an expert has none."""
    rows = torch.zeros(stack.num_adapters, stack.a_RD.shape[1])
    for expert in range(stack.num_adapters):
        spectrum = right_spectrum(*stack.factors(expert))
        if len(spectrum.sigma_r):
            rows[expert] = spectrum.v_rD[0].float()
    return rows


def spectral_rows(stack: LoraStack, *, scaled: bool, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``w (R, D)`` with ``|w_e x| = |B_e A_e x|``, and the expert ``(R,)`` of each.

    Args:
        stack: The experts' factors.
        scaled: Whether the norm is that of ``s_e B_e A_e x``.
        rank: Keep the strongest ``rank`` directions of every expert; None: all.
    """
    return _rows(stack, scaled=scaled, rank=rank, weighted=True)


def subspace_rows(stack: LoraStack, *, rank: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows ``v (R, D)``: ``|v_e x|`` is the length of x in what ``B_e A_e`` reads; and the expert of each."""
    return _rows(stack, scaled=False, rank=rank, weighted=False)


def _rows(stack: LoraStack, *, scaled: bool, rank: int | None, weighted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    rows, experts = [], []
    for expert in range(stack.num_adapters):
        sigma_r, v_rD = right_spectrum(*stack.factors(expert))
        w_rD = v_rD * sigma_r[:, None] if weighted else v_rD
        if scaled:
            w_rD = w_rD * abs(float(stack.scaling_E[expert]))
        rows.append(w_rD[:rank].float())
        experts.append(torch.full((len(rows[-1]),), expert))
    return torch.cat(rows), torch.cat(experts)
