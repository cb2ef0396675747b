"""SpectR, SMILE and LoGo: training-free gates from how much of the input an expert takes up."""

from __future__ import annotations

from compose.routers.gates.block_norm import BlockNormGate
from compose.routers.normalisations.identity import Identity
from compose.routers.presets.registry import Preset, enter
from compose.routers.selectors.top_k import TopK
from compose.routers.spec import MixtureSpec


@enter("spectr")
def spectr() -> Preset:
    """SpectR (arXiv:2504.03454): Arrow's gate over the whole spectrum, ``|S_e V_e^T x| = |B_e A_e x|``."""
    spec = MixtureSpec(
        gate_input="ranks", gate=BlockNormGate(rows="spectral"), select=TopK(k=3), renormalise="softmax", train="none",
        departures=(
            "k is that of PEFT's Arrow; the paper's is not verified",
            "the experts' scalings take no part in scores (scaled=True: they do)",
        ),
    )  # fmt: skip
    return Preset(paper="2504.03454", summary="gates from the norm of each expert's output", spec=spec)


@enter("smile")
def smile() -> Preset:
    """SMILE (arXiv:2408.10174): ``|V_e^T x|``, softmax, the best k = 1, divided by their sum."""
    spec = MixtureSpec(
        gate_input="ranks", gate=BlockNormGate(rows="subspace"), select=TopK(k=1), renormalise="sum", train="none",
        departures=(
            "experts are adapters as they are; SMILE cuts them from the difference of whole fine-tuned models",
            "every direction of an expert is read (rank=...: the strongest)",
        ),
    )  # fmt: skip
    return Preset(paper="2408.10174", summary="gates from how much of x lies in what an expert reads", spec=spec)


@enter("logo")
def logo() -> Preset:
    """LoGo (arXiv:2511.07129): once per prompt, ``|s_e B_e A_e h|`` of its last token at the last query target.

    The 20 highest, divided by their sum. The authors' second signal is the inverse entropy of the output:
    ``gate=OutputEntropyGate()``. Another target is named with ``tap``, a regular expression.
    """
    spec = MixtureSpec(
        site="model", scope="sequence", gate_input="tap", tap=r"(q_proj|query|c_attn|\.q)$", pooling="last",
        gate=BlockNormGate(rows="spectral", scaled=True), normalise=Identity(), select=TopK(k=20), renormalise="sum",
        train="none",
        departures=(
            "the probe is a pass of the bare base model; the authors' code has all adapters on",
            "h is what the target reads; the authors' code takes the layer's residual stream before its norm",
            "in an encoder-decoder model the encoder's target decides for both halves",
        ),
    )  # fmt: skip
    return Preset(paper="2511.07129", summary="one mixture per prompt from the norms at one layer", spec=spec)
