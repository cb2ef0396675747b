"""Attention of the input over the experts' outputs: AM-LoRA (arXiv:2409.19611).

Shape letters: ``D`` in, ``O`` out, ``E`` experts, ``R`` rank rows, ``C`` width of queries and keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.gates.linear import Init, initial
from compose.routers.steps import GATES, Seen


@GATES.register("attention")
@dataclass(frozen=True, kw_only=True)
class AttentionGate:
    """Scores ``q . k_e / sqrt(C)`` with ``q = W_q x`` and ``k_e = W_k (s_e B_e A_e x)``.

    Keys are linear in the outputs, so ``W_k B_e`` is folded first and the outputs ``(tokens, E, O)`` never exist:
    ``score_e = s_e Σ_{j in e} (A x)_j (B^T W_k^T q)_j / sqrt(C)``.

    Attributes:
        width: ``C``.
        init: Of both matrices; see `compose.routers.gates.linear.LinearGate`.
        std: Of ``init="normal"``.
    """

    width: int = 32
    init: Init = "kaiming"
    std: float = 0.02

    def __post_init__(self) -> None:
        if self.width < 1 or self.init not in ("normal", "kaiming") or self.std < 0:
            raise IncompatibleError(
                f"width must be at least 1, init normal or kaiming and std >= 0, got {self.width}, {self.init!r}, "
                f"{self.std} (zeros never train: each matrix is the other's gradient)"
            )

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the gate of one site."""
        stack = shape.read_stack
        query_CD = initial(self.init, self.width, stack.a_RD.shape[1], self.std, shape.generator)
        key_CO = initial(self.init, self.width, stack.b_RO.shape[1], self.std, shape.generator)
        return _Attention(query_CD, key_CO)


class _Attention(nn.Module):
    def __init__(self, query_CD: torch.Tensor, key_CO: torch.Tensor) -> None:
        super().__init__()
        self.query_CD = nn.Parameter(query_CD)
        self.key_CO = nn.Parameter(key_CO)

    def forward(self, seen: Seen) -> torch.Tensor:
        """``x (..., D)`` -> scores ``(..., E)``."""
        assert seen.x is not None  # noqa: S101 - the specification demands an input for this gate
        assert seen.stack is not None  # noqa: S101 - the session hands the factors on
        dtype = self.query_CD.dtype
        x, stack = seen.x.to(dtype), seen.stack
        keys_RC = stack.b_RO.to(dtype) @ self.key_CO.T
        query = nn.functional.linear(x, self.query_CD)
        products = nn.functional.linear(x, stack.a_RD.to(dtype)) * nn.functional.linear(query, keys_RC)
        scores = products.new_zeros(*x.shape[:-1], stack.num_adapters).index_add(-1, stack.index.adapter_R, products)
        return scores * stack.scaling_E.to(dtype) / math.sqrt(len(self.query_CD))
