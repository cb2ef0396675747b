"""Load balance from the share of decisions: Switch, Mixtral, and AdaMoLE's shifted form.

``f_i`` counts decisions whose gate for expert i is not 0, after everything that happened to the gate; it carries no
gradient. ``P_i`` is the mean probability before selection. Where every expert takes part in every decision ``f`` says
nothing: use `importance_cv2`. Shape letters: ``N`` decisions, ``E`` experts.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from compose.errors import IncompatibleError
from compose.routers.losses.means import at_least_float32, chosen, counted, number_available, of_available, world_mean
from compose.routers.losses.registry import LOSSES, AbstractLoss, WorldSum
from compose.routers.routing import Decisions


@LOSSES.register("switch_lb")
@dataclass(frozen=True, kw_only=True)
class SwitchLoadBalance(AbstractLoss):
    """``E Σ_i f_i P_i`` with ``Σ f = 1`` over all (decision, slot) pairs (Switch, arXiv:2101.03961; MoLA, 2402.08562).

    Value at balance: 1, for any number of chosen experts. Papers: 1e-2 (Switch, LLaVA-MoLE), 1e-3 (MoLA). Not copied:
    MoLA pools the logits of a layer's targets and sums over layers (here: one value per site; ``reduce="sum"``),
    and counts padding.
    """

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        load_E, probs_E = _load_and_probability(decisions, counted(decisions, self.over), world_sum)
        slots = load_E.sum()
        return number_available(decisions) * (load_E / torch.where(slots > 0, slots, 1) * probs_E).sum()


@LOSSES.register("mixtral_lb")
@dataclass(frozen=True, kw_only=True)
class MixtralLoadBalance(AbstractLoss):
    """``E Σ_k Σ_i f_{k,i} P_i`` (transformers' Mixtral; MixLoRA, arXiv:2404.15159): ``f`` sums to 1 for every slot k.

    Value at balance: the (mean) number of chosen experts; it is that many times `switch_lb`. Default of MixLoRA: 1e-3.
    Not copied: transformers concatenates the decisions of all layers before averaging, so that loads of different
    layers even out (here: one value per site).
    """

    coefficient: float = 1e-3

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        load_E, probs_E = _load_and_probability(decisions, counted(decisions, self.over), world_sum)
        return number_available(decisions) * (load_E * probs_E).sum()


@LOSSES.register("shifted_lb")
@dataclass(frozen=True, kw_only=True)
class ShiftedLoadBalance(AbstractLoss):
    """``E Σ_i f_i mean(p_i - τ)`` (AdaMoLE's code, arXiv:2405.00361): `mixtral_lb` above the threshold.

    It has no fixed optimum: with uniform probabilities of which all are chosen it is ``E (1 - E τ)``, and as experts
    below the threshold count negatively it can be less than 0. Kept for comparison with the paper; `switch_lb` is the
    sound one. Default of the paper: 1e-3. Reads ``extras["threshold"]``, one per decision. Not copied: upstream counts
    padding, and computes it only where the layer's input requires a gradient.

    Raises:
        IncompatibleError: On call: the selector gives no threshold.
    """

    coefficient: float = 1e-3

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""
        if "threshold" not in decisions.extras:
            raise IncompatibleError(
                f"shifted_lb at {decisions.site} reads a threshold per decision; it goes with the selector 'threshold'"
            )
        threshold = at_least_float32(decisions.extras["threshold"]).reshape(-1, 1)
        shifted = decisions._replace(probs_NE=at_least_float32(decisions.probs_NE) - threshold)
        load_E, above_E = _load_and_probability(shifted, counted(decisions, self.over), world_sum)
        return number_available(decisions) * (load_E * above_E).sum()


def _load_and_probability(
    decisions: Decisions, mask_N: torch.Tensor, world_sum: WorldSum
) -> tuple[torch.Tensor, torch.Tensor]:
    """Share of decisions that chose each expert, and mean probability, ``(E,)`` each; 0 for missing experts."""
    probs_NE = of_available(decisions.probs_NE, decisions)
    both, _ = world_mean(torch.cat([chosen(decisions).to(probs_NE.dtype), probs_NE], 1), mask_N, world_sum)
    load_E, probs_E = both.chunk(2)
    return load_E, probs_E
