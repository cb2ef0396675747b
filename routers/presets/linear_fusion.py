"""Linear fusion: one weight per expert for all inputs, given or learned (survey of mixtures of LoRA, section VI-D)."""

from __future__ import annotations

from compose.routers.gates.table import TableGate
from compose.routers.presets.registry import Preset, enter
from compose.routers.spec import MixtureSpec


@enter("linear_fusion")
def linear_fusion() -> Preset:
    """``Σ λ_e s_e B_e A_e`` with constant weights; uniform unless given.

    Weights of one's own: ``preset("linear_fusion", gate=TableGate(values=(0.7, 0.3)), normalise=Identity())``.
    """
    spec = MixtureSpec(site="model", scope="static", gate_input="none", gate=TableGate(), train="none")
    return Preset(paper="", summary="constant weights, uniform unless given", spec=spec)


@enter("linear_fusion_learned")
def linear_fusion_learned() -> Preset:
    """Learned weights, softmax of one score per expert, the same in all layers (``site="linear"``: one set each)."""
    spec = MixtureSpec(site="model", scope="static", gate_input="none", gate=TableGate(), train="router")
    return Preset(paper="", summary="one learned weight per expert for all inputs", spec=spec)
