"""Similarity of experts' updates (GOAT, ICML 2025), through Gram matrices.

Shape letters: ``E`` experts, ``R`` rank rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from compose.routers.losses.rank_space import cosines, gram, inputs_of, owners
from compose.routers.losses.registry import LOSSES, AbstractLoss, WorldSum
from compose.routers.routing import Decisions


@LOSSES.register("expert_cosine")
@dataclass(frozen=True, kw_only=True)
class ExpertCosine(AbstractLoss):
    """Mean cosine between different experts' ``B_e A_e``; ``<B_e A_e, B_f A_f> = Σ (BᵀB ∘ AAᵀ)_{ef}``.

    Optimum ``-1 / (E - 1)`` (0 where updates can only be made orthogonal); 1 for equal experts. It is about factors
    alone: masks and gates play no part. 0 for fewer than two experts with factors here, and for updates shorter than
    1e-6 (``B = 0``). GOAT's code compares the A factors alone (``of="a"``, equal ranks only), sums over pairs instead
    of averaging, and never adds it to the loss. Cost: ``R²(D + O)``.

    Attributes:
        of: ``"update"`` or ``"a"``.
    """

    needs_inputs: ClassVar[bool] = True

    of: Literal["update", "a"] = "update"

    def problems(self) -> list[str]:
        """See `AbstractLoss`."""
        return [] if self.of in ("update", "a") else [f"of must be update or a, got {self.of!r}"]

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site; ``world_sum`` is not used, factors are the same in every process."""
        _, stack = inputs_of(decisions, "expert_cosine")
        products_RR = gram(stack.a_RD)
        if self.of == "update":
            products_RR = products_RR * gram(stack.b_RO)
        else:
            position_R = stack.index.position_R
            products_RR = products_RR * (position_R[:, None] == position_R)
        owner_ER = owners(stack, products_RR.dtype)
        cosine_EE = cosines(owner_ER @ products_RR @ owner_ER.T)
        present_E = decisions.available_E & (owner_ER.sum(1) > 0)
        pairs = (present_E[:, None] & present_E).fill_diagonal_(False)
        return torch.where(pairs, cosine_EE, 0).sum() / pairs.sum().clamp(min=1)
