"""Segments of the spectrum: exact parts of the weight, the same for equal weights, GPT-2's layout included."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.segments import spectrum_segments


def test_segments_of_a_transposed_weight(tiny_model) -> None:
    model, target = tiny_model("gpt2"), "transformer.h.0.attn.c_attn"
    updates = spectrum_segments(model, target, num_experts=4, rank=2, scaling=3.0, rho=5.0)
    u, s, v = torch.linalg.svd(model.get_submodule(target).weight.detach().T, full_matrices=False)
    for expert, update in enumerate(updates):
        part = slice(8 * expert, 8 * expert + 2)
        torch.testing.assert_close(update.delta(), u[:, part] * s[part] @ v[part] / 5, rtol=1e-4, atol=1e-6)
        assert update.scaling == 3.0


def test_signs_are_fixed(tiny_model) -> None:
    model, target = tiny_model("llama"), "model.layers.0.mlp.up_proj"
    for update in spectrum_segments(model, target, num_experts=4, rank=2, scaling=1.0):
        largest = update.a.gather(1, update.a.abs().argmax(1, keepdim=True))
        assert (largest > 0).all()


def test_a_rank_beyond_the_segment_is_refused(tiny_model) -> None:
    with pytest.raises(IncompatibleError, match="hold 4 each, fewer than the rank 5"):
        spectrum_segments(
            tiny_model("llama"), "model.layers.0.mlp.up_proj", num_experts=8, rank=5, scaling=1.0
        )  # fmt: skip
