"""LD-MoLE's interval: by hand, and against what sparsegen keeps."""

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.routers.losses.sparsity import SparsityInterval
from compose.routers.normalisations.sparsegen import sparsegen

ALL = torch.ones(4, dtype=torch.bool)


def test_by_hand(decisions, alone):
    # k = 2: lower = 1 - (0.5 + 0.2) = 0.3 and 1 - (2 + 1) = -2
    logits = torch.tensor([[0.0, 0.5, -1.0, 0.2], [1.0, 3.0, 2.0, 1.0]])
    given = decisions(logits, available=ALL, extras={"lambda": torch.tensor([0.1, 0.0])})
    assert_close(SparsityInterval(k=2)(given, alone), torch.tensor((0.3 - 0.1) / 2))


def test_it_is_0_exactly_where_sparsegen_keeps_k_or_fewer(decisions, alone):
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(200, 4, generator=generator, dtype=torch.float64)
    sparsity = torch.rand(200, generator=generator, dtype=torch.float64) * 2 - 1.2
    kept = (sparsegen(logits, sparsity) > 0).sum(1)
    assert set(kept.tolist()) == {1, 2, 3, 4}
    for k in (1, 2, 3):
        for line in range(200):
            one = slice(line, line + 1)
            given = decisions(logits[one], available=ALL, extras={"lambda": sparsity[one]})
            assert (SparsityInterval(k=k)(given, alone).item() == 0) == bool(kept[line] <= k)


def test_no_more_experts_than_k_cost_nothing(decisions, alone):
    given = decisions(torch.zeros(3, 4), extras={"lambda": torch.full((3,), -50.0)})
    assert SparsityInterval(k=3)(given, alone).item() == 0
    assert SparsityInterval(k=2)(given, alone).item() == 51
    with pytest.raises(IncompatibleError, match="k must"):
        SparsityInterval(k=0)
