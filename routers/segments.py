"""Experts that start as segments of the base weight's spectrum: GOAT (arXiv:2502.16894; its code at ef4d21a).

Shape letters: ``E`` experts, ``r`` rank of one expert, ``D`` in, ``O`` out, ``M`` singular values.
"""

from __future__ import annotations

from typing import Any

import torch

from compose.adapter import LowRank
from compose.errors import IncompatibleError
from compose.routers.experts import base_weight

RHO = 10.0


def spectrum_segments(
    model: Any, target: str, *, num_experts: int, rank: int, scaling: float, rho: float = RHO
) -> list[LowRank]:
    """Return one update per expert: ``s B_e A_e = U_e S_e V_e / rho``, of the e-th segment of the singular values.

    The singular values, largest first, are cut into ``E`` segments of ``M // E``; an expert takes the first ``r`` of
    its own, their roots on both factors, as GOAT's code does. Signs are fixed (each row of A has its entry of largest
    magnitude positive), so equal weights give equal factors.

    Args:
        model: Holds the weight.
        target: Path of a linear layer.
        num_experts: ``E``.
        rank: ``r``.
        scaling: ``s``, positive.
        rho: Divides the updates.

    Raises:
        IncompatibleError: A segment holds fewer than ``r`` values, or the weight is quantised.
    """
    weight_OD = base_weight(model, target)
    segment = min(weight_OD.shape) // num_experts
    if rank > segment:
        raise IncompatibleError(
            f"{target}: {num_experts} segments of its {min(weight_OD.shape)} singular values hold {segment} each, "
            f"fewer than the rank {rank}; use fewer experts or a smaller rank"
        )
    u_OM, values_M, v_MD = torch.linalg.svd(weight_OD.float(), full_matrices=False)
    largest = v_MD.gather(1, v_MD.abs().argmax(1, keepdim=True))
    sign_M = torch.where(largest < 0, -1.0, 1.0).squeeze(1)
    root_M = (values_M / (scaling * rho)).sqrt() * sign_M
    updates = []
    for expert in range(num_experts):
        part = slice(expert * segment, expert * segment + rank)
        a, b = root_M[part, None] * v_MD[part], u_OM[:, part] * root_M[part]
        updates.append(LowRank(a.contiguous(), b.contiguous(), scaling))
    return updates
