"""torch.compile over presets whose gates come from prototypes, norms, a tap, and whole feed-forward parts."""

import pytest
import torch

from compose.routers.calibration import calibrate
from compose.routers.presets.registry import PRESETS, preset


@pytest.mark.filterwarnings(
    "ignore:The .grad attribute of a Tensor that is not a leaf"
)  # dynamo's own look at tensors
@pytest.mark.parametrize("name", ["arrow", "spectr", "avg_act", "logo", "am_lora", "mixlora_ffn"])
def test_logits_are_those_without(name, routed_over, batch) -> None:
    options = {"targets": r"mlp"} if name == "mixlora_ffn" else {}
    routed = routed_over("llama", preset(name, **options), layers=2)
    if "calibration" in PRESETS[name].needs:
        calibrate(routed, {expert: [batch("llama")] for expert in routed.router.experts})
    inputs = {key: value for key, value in batch("llama").items() if key != "labels"}
    with torch.no_grad():
        wanted = routed(**inputs).logits
        compiled = torch.compile(routed, backend="aot_eager")
        torch.testing.assert_close(compiled(**inputs).logits, wanted, rtol=1e-4, atol=1e-4)
    if routed.trained_parameters():
        compiled(**batch("llama")).loss.backward()
        assert all(parameter.grad is not None for parameter in routed.trained_parameters().values())
