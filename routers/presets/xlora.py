"""X-LoRA: gates from a pass of the bare base model."""

from __future__ import annotations

from compose.routers.gates.mlp import MlpGate
from compose.routers.presets.registry import Preset, enter
from compose.routers.spec import MixtureSpec


@enter("xlora")
def xlora() -> Preset:
    """X-LoRA (arXiv:2402.07148), one gate for all layers: the default of the authors' code and of PEFT."""
    spec = MixtureSpec(
        site="model", gate_input="first_pass", gate=MlpGate(depth=1, bias=True), train="router",
        departures=("the base pass runs without head and experts; generation keeps two caches (exact)",),
    )  # fmt: skip
    return Preset(paper="2402.07148", summary="token gates from a base pass, one for all layers", spec=spec)


@enter("xlora_layerwise")
def xlora_layerwise() -> Preset:
    """X-LoRA with ``layerwise_scalings``: one gate per target."""
    spec = MixtureSpec(
        site="linear", gate_input="first_pass", gate=MlpGate(depth=1, bias=True), train="router",
        departures=("the base pass runs without head and experts; generation keeps two caches (exact)",),
    )  # fmt: skip
    return Preset(paper="2402.07148", summary="token gates from a base pass, one per target", spec=spec)
