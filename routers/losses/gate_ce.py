"""Supervised gates: cross-entropy of scores with the expert a decision should name.

Shape letters: ``N`` decisions, ``E`` experts, ``B`` rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from compose.errors import IncompatibleError
from compose.routers.losses.means import at_least_float32, counted, rows_of, world_mean
from compose.routers.losses.registry import LOSSES, AbstractLoss, WorldSum
from compose.routers.routing import Decisions


@LOSSES.register("gate_ce")
@dataclass(frozen=True, kw_only=True)
class GateCrossEntropy(AbstractLoss):
    """Mean ``-log softmax(logits)[label]`` over decisions with a label (MeteoRA, arXiv:2405.13053; MOA, 2403.03432).

    Infimum 0; ``log E`` for uniform scores. MeteoRA's code uses the coefficient 50 (every token of every linear), MOA
    one cross-entropy per sequence. Decisions without a label, or labelled with an expert that the site lacks, are left
    out. Not copied: MeteoRA counts padding as the tokens' own adapter.

    Attributes:
        level: ``"token"``: decisions count equally; ``"sequence"``: rows count equally, whatever their length.

    Raises:
        IncompatibleError: On call: a label beyond the experts.
    """

    needs_labels: ClassVar[bool] = True

    coefficient: float = 1.0
    level: Literal["token", "sequence"] = "token"

    def problems(self) -> list[str]:
        """See `AbstractLoss`."""
        return [] if self.level in ("token", "sequence") else [f"level must be token or sequence, got {self.level!r}"]

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        labels_N, available_E = decisions.labels_N, decisions.available_E
        experts = available_E.shape[0]
        if len(labels_N) and int(labels_N.max()) >= experts:
            raise IncompatibleError(
                f"expert label {int(labels_N.max())} at {decisions.site}; there are {experts} experts"
            )
        places_N = labels_N.clamp(min=0)
        valid_N = counted(decisions, self.over) & (labels_N >= 0) & available_E[places_N]
        logits_NE = at_least_float32(decisions.logits_NE).masked_fill(~available_E, float("-inf"))
        logs_NE = torch.log_softmax(torch.where(valid_N[:, None], logits_NE, 0), 1)
        weights_N = valid_N.to(logs_NE.dtype)
        if self.level == "sequence" and len(labels_N):
            rows_N = rows_of(decisions)
            lines_B = weights_N.new_zeros(int(rows_N.max()) + 1).index_add(0, rows_N, weights_N)
            weights_N = weights_N / lines_B.clamp(min=1)[rows_N]
        mean, _ = world_mean(-logs_NE.gather(1, places_N[:, None]), weights_N, world_sum)
        return mean.squeeze(0)
