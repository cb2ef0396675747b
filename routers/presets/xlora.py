"""X-LoRA: gates from a pass of the bare base model."""

from __future__ import annotations

from compose.routers.gates.mlp import MlpGate
from compose.routers.gates.prompt_mlp import PromptMlpGate
from compose.routers.losses.gate_ce import GateCrossEntropy
from compose.routers.presets.registry import Preset, enter
from compose.routers.selectors.top_k import TopK
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


@enter("xlora_prompt")
def xlora_prompt() -> Preset:
    """X-LoRA with the prompt's vector beside each token's, taught the expert; one expert per token, at full strength.

    Not from a paper. X-LoRA's gate sees one token's state of the base pass; here it also sees mean and spread of the
    prompt's states, which tell tasks apart that single tokens do not, and learns from expert labels where records have
    them.
    """
    spec = MixtureSpec(
        site="model", gate_input="first_pass", pooling="mean_std", gate=PromptMlpGate(), select=TopK(k=1),
        renormalise="sum", losses=(GateCrossEntropy(coefficient=5.0, level="token"),), train="router",
        departures=("not from a paper: X-LoRA's two passes, a gate that reads the prompt too, supervised",),
    )  # fmt: skip
    return Preset(
        paper="", summary="X-LoRA whose gate also reads the prompt's statistics, taught the expert", spec=spec,
        needs=("expert_labels",),
    )  # fmt: skip
