"""Gates that read the experts' outputs: MoLE, pooled (arXiv:2404.13628), and AM-LoRA (arXiv:2409.19611)."""

from __future__ import annotations

from compose.routers.gates.attention import AttentionGate
from compose.routers.gates.pooled_outputs import PooledOutputsGate
from compose.routers.losses.importance import MoleBalance
from compose.routers.losses.l1_gate import L1Gate
from compose.routers.normalisations.softmax import Softmax
from compose.routers.presets.registry import Preset, enter
from compose.routers.spec import MixtureSpec


@enter("mole_pooled")
def mole_pooled() -> Preset:
    """MoLE (arXiv:2404.13628) with the experts' outputs averaged over the prompt before its gate reads them."""
    spec = MixtureSpec(
        site="block", scope="sequence", gate_input="outputs", pooling="mean", gate=PooledOutputsGate(),
        normalise=Softmax(temperature=1.0, learned=True), losses=(MoleBalance(coefficient=1e-2),), train="router",
        departures=(
            "outputs are averaged over the prompt; MoLE's gate has parameters for every token, bound to one length",
            "a block's outputs are those of its first target; MoLE takes the whole block's",
            "the normalisation of outputs and the coefficient of the balance loss are recalled, not verified",
        ),
    )  # fmt: skip
    return Preset(
        paper="2404.13628", summary="one gate per block and sequence from the experts' mean outputs", spec=spec,
        limits="not MoLE's own gate, whose size depends on the length of the text. A gate reads E O numbers per block "
        "and sequence, so there is none per token; in a decoder behind an encoder the encoder's states stand in",
    )  # fmt: skip


@enter("am_lora")
def am_lora() -> Preset:
    """AM-LoRA (arXiv:2409.19611): attention of the input over the experts' outputs, with an L1 penalty."""
    spec = MixtureSpec(
        gate_input="outputs", gate=AttentionGate(width=32), losses=(L1Gate(coefficient=1e-3, of="logits"),),
        train="router",
        departures=(
            "known by its abstract: queries, keys and their width are this library's",
            "the penalty acts on scores: on a softmax's gates it would be constant",
            "experts are frozen; the paper trains the newest one along",
        ),
    )  # fmt: skip
    return Preset(
        paper="2409.19611", summary="attention over the experts' outputs", spec=spec,
        limits="the form of the attention is not that of a published code, as none was seen",
    )  # fmt: skip
