"""What a session keeps between calls, and where it looks."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers import preset


def test_labels_that_do_not_fit_leave_no_decisions_behind(routed_over, batch):
    routed, inputs = routed_over("llama", preset("mixlora_lin")), batch("llama")
    want = routed(**inputs).loss
    with pytest.raises(IncompatibleError, match="2 rows, the batch 3"):
        routed(**inputs, expert_labels=torch.zeros(2, dtype=torch.int64))
    torch.testing.assert_close(routed(**inputs).loss, want)


@torch.no_grad()
def test_embeddings_are_read_before_the_first_block_whatever_is_routed(routed_over, batch):
    spec = replace(preset("octavius"), targets=r"layers\.[12]\.", site="block")
    routed, ids = routed_over("llama", spec), batch("llama")["input_ids"]
    seen = []
    hook = routed.router.site("model.layers.1").gate.register_forward_pre_hook(lambda _, args: seen.append(args[0].x))
    routed(input_ids=ids)
    hook.remove()
    embedded = routed.model.get_input_embeddings()(ids)
    torch.testing.assert_close(seen[0], embedded.mean(1))
