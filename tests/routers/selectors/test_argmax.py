"""Argmax is top-1."""

import torch
from torch.testing import assert_close

from compose.routers.selectors.argmax import Argmax
from compose.routers.selectors.top_k import TopK


def test_equals_top_1(shape, seen):
    site, logits = shape(4), torch.randn(9, 4)
    probs = torch.softmax(logits, -1)
    mine, top = (part.build(site)(logits, probs, seen(9), site.available_E) for part in (Argmax(), TopK(k=1)))
    assert_close(mine, top)
    assert_close(mine.gates.squeeze(1), probs.amax(1))
