"""Gates that compare the input with one or more prototypes per expert: Arrow, PHATGOOSE, mean activations, centroids.

Shape letters: ``D`` width of the gate's input, ``E`` experts, ``P`` prototypes of one expert.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn
from torch.nn import functional

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.spectrum import first_directions
from compose.routers.steps import GATES, Seen

Source = Literal["svd", "calibrated", "trained"]
Score = Literal["dot", "abs", "cos", "l2", "layer_norm"]


@GATES.register("proto")
@dataclass(frozen=True, kw_only=True)
class ProtoGate:
    """Scores ``sim(x, v_e)``; of several prototypes of an expert the nearest counts.

    Prototypes are buffers, saved with the router. Nothing here trains.

    Attributes:
        source: ``"svd"``: the first right singular vector of ``B_e A_e`` at the site's first target, exact and
            sign-free (Arrow, arXiv:2405.11157); made when the router is built, an expert without factors there has 0.
            ``"calibrated"``: means or centroids of inputs, filled by `compose.routers.calibration.calibrate`.
            ``"trained"``: filled by `compose.routers.phatgoose.train_phatgoose_gates`.
        score: ``"dot"``; ``"abs"``: |x . v|; ``"cos"``; ``"l2"``: minus the squared distance; ``"layer_norm"``: the
            dot product of both after layer normalisation without scale (PHATGOOSE, arXiv:2402.05859).
        per_expert: ``P``; more than 1 for calibrated centroids only.
        sqrt_width: Divide by the square root of ``D``.
        unit_input: Divide the input by its length first: ``|x . v|`` grows with x, so that the same mixture is sharp
            at one layer and flat at another.
        boost: Multiplies the highest score of a decision (4 in token-level adaptation's code, 2311.10847).
    """

    source: Source = "svd"
    score: Score = "abs"
    per_expert: int = 1
    sqrt_width: bool = False
    unit_input: bool = False
    boost: float = 1.0

    def __post_init__(self) -> None:
        if self.source not in get_args(Source) or self.score not in get_args(Score):
            raise IncompatibleError(
                f"source must be one of {', '.join(get_args(Source))} and score of {', '.join(get_args(Score))}; "
                f"got {self.source!r}, {self.score!r}"
            )
        if self.per_expert < 1 or (self.per_expert > 1 and self.source != "calibrated"):
            raise IncompatibleError(
                f"per_expert must be at least 1, and 1 unless source is 'calibrated'; got {self.per_expert}"
            )

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the gate of one site."""
        return Prototypes(self, shape)


class Prototypes(nn.Module):
    """The prototypes of one site.

    Attributes:
        options: What it was built from.
        prototypes_EPD: float32.
        filled_E: bool: experts whose prototypes hold something.
        experts: Names, for messages.
    """

    prototypes_EPD: torch.Tensor
    filled_E: torch.Tensor
    available_E: torch.Tensor

    def __init__(self, options: ProtoGate, shape: SiteShape) -> None:
        super().__init__()
        self.options = options
        self.site, self.experts = shape.name, shape.experts
        prototypes = torch.zeros(shape.num_experts, options.per_expert, shape.in_features)
        filled = torch.zeros(shape.num_experts, dtype=torch.bool)
        if options.source == "svd":
            prototypes[:, 0] = first_directions(next(iter(shape.stacks.values())))
            filled[:] = True
        self.register_buffer("prototypes_EPD", prototypes)
        self.register_buffer("filled_E", filled)
        self.register_buffer("available_E", shape.available_E.clone(), persistent=False)
        self._seen_filled = -1

    def forward(self, seen: Seen) -> torch.Tensor:
        """``x (..., D)`` -> scores ``(..., E)``."""
        assert seen.x is not None  # noqa: S101 - the specification demands an input for this gate
        self._check_filled()
        x = seen.x.to(self.prototypes_EPD.dtype)
        if self.options.unit_input:
            x = functional.normalize(x, dim=-1)
        scores = similarity(self.options.score, x, self.prototypes_EPD)
        if self.options.sqrt_width:
            scores = scores / math.sqrt(x.shape[-1])
        return scores if self.options.boost == 1.0 else self._boosted(scores)

    def fill_(self, expert: int, prototypes_PD: torch.Tensor) -> None:
        """Set the prototypes of one expert."""
        with torch.no_grad():
            self.prototypes_EPD[expert].copy_(prototypes_PD)
            self.filled_E[expert] = True

    def _boosted(self, scores: torch.Tensor) -> torch.Tensor:
        best = scores.masked_fill(~self.available_E, float("-inf")).argmax(-1, keepdim=True)
        return scores.scatter(-1, best, scores.gather(-1, best) * self.options.boost)

    def _check_filled(self) -> None:
        """Raise unless every expert of the site has prototypes; looked up again after every write to the buffer."""
        if torch.compiler.is_compiling() or self._seen_filled == self.filled_E._version:
            return
        empty = (self.available_E & ~self.filled_E).nonzero().flatten().tolist()
        if empty:
            how = {
                "calibrated": "run compose.routers.calibrate(routed, {expert: batches})",
                "trained": "run compose.routers.train_phatgoose_gates(routed, {expert: batches})",
            }
            names = ", ".join(self.experts[expert] for expert in empty[:5])
            raise IncompatibleError(
                f"the gate at {self.site!r} has no prototypes yet for {len(empty)} experts ({names}); "
                f"{how[self.options.source]}, or load a router that was saved with them"
            )
        self._seen_filled = self.filled_E._version

    def __getstate__(self) -> dict[str, Any]:
        """A copy looks at its buffers again."""
        return {**self.__dict__, "_seen_filled": -1}


def similarity(score: Score, x: torch.Tensor, prototypes_EPD: torch.Tensor) -> torch.Tensor:
    """``x (..., D)`` and ``(E, P, D)`` -> ``(..., E)``: of an expert's prototypes the one of highest score."""
    flat = prototypes_EPD.flatten(0, 1)
    if score == "l2":
        rows = x.reshape(-1, x.shape[-1])
        distances = torch.cdist(rows, flat, compute_mode="donot_use_mm_for_euclid_dist")
        scores = -distances.square().reshape(*x.shape[:-1], len(flat))
    else:
        if score == "cos":
            x, flat = functional.normalize(x, dim=-1), functional.normalize(flat, dim=-1)
        elif score == "layer_norm":
            x, flat = (functional.layer_norm(each, each.shape[-1:]) for each in (x, flat))
        scores = functional.linear(x, flat)
        scores = scores.abs() if score == "abs" else scores
    return scores.unflatten(-1, prototypes_EPD.shape[:2]).amax(-1)
