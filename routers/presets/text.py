"""Gates that read the text, not the model: token-level adaptation, DLP-LoRA, RouterRetriever."""

from __future__ import annotations

from compose.routers.gates.linear import LinearGate
from compose.routers.gates.proto import ProtoGate
from compose.routers.losses.gate_ce import GateCrossEntropy
from compose.routers.presets.registry import Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.selectors.top_p import TopP
from compose.routers.spec import MixtureSpec


@enter("token_level")
def token_level() -> Preset:
    """Token-level adaptation (arXiv:2311.10847): the text so far against centroids, anew for every token.

    ``softmax`` of the cosines, the highest of which is multiplied by 4 first, as the authors' code does. Generate with
    `compose.routers.text_steps.generate_by_step`, which embeds the text so far; a plain call uses the embedding that
    it is told for every token.
    """
    spec = MixtureSpec(
        site="model", scope="step", gate_input="text", gate=ProtoGate(source="calibrated", score="cos", boost=4.0),
        train="none",
        departures=(
            "a mixture acts on its own token alone, so a cache is exact; the authors compute the whole text anew",
            "outputs are mixed; the authors add adapters by PEFT's 'linear', which mixes factors",
            "a negative highest cosine falls when it is multiplied",
        ),
    )  # fmt: skip
    return Preset(
        paper="2311.10847", summary="gates from the embedding of the text so far", spec=spec,
        needs=("text", "calibration"),
        limits="needs an encoder and a tokenizer at generation, one embedding per new token; no beams, no "
        "encoder-decoder models (those use the embedding they are told)",
    )  # fmt: skip


@enter("dlp")
def dlp() -> Preset:
    """DLP-LoRA (arXiv:2410.01497): a small classifier of the sentence, its nucleus, and a softmax of probabilities.

    The classifier is a linear layer over text embeddings, taught the row's expert. One from outside hands in its
    scores: ``gate=ExternalGate(), train="none", losses=()`` and ``build(..., text_features=<experts>)``.
    """
    spec = MixtureSpec(
        site="model", scope="sequence", gate_input="text", gate=LinearGate(init="zeros", bias=True),
        select=TopP(p=0.9), renormalise="softmax_probs", train="router",
        losses=(GateCrossEntropy(coefficient=1.0, level="sequence"),),
        departures=(
            "the classifier reads embeddings of an encoder of your choice; the paper trains ALBERT with a small MLP",
            "the softmax of probabilities (a double softmax) is the authors' code",
            "p is not verified",
        ),
    )  # fmt: skip
    return Preset(
        paper="2410.01497", summary="one mixture per text from a classifier of it", spec=spec,
        needs=("text", "expert_labels"),
    )  # fmt: skip


@enter("router_retriever")
def router_retriever() -> Preset:
    """RouterRetriever (arXiv:2409.02685): the expert whose pilot embedding is nearest to the query's. One expert."""
    spec = MixtureSpec(
        site="model", scope="sequence", gate_input="text", gate=ProtoGate(source="calibrated", score="cos"),
        select=TopK(k=1), renormalise="softmax", train="none",
        departures=(
            "one pilot per expert, the mean of its texts; the paper has several, grouped by which expert does best",
        ),
    )  # fmt: skip
    return Preset(
        paper="2409.02685",
        summary="the expert of the nearest pilot embedding",
        spec=spec,
        needs=("text", "calibration"),
    )
