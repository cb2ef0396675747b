"""GOAT's similarity against dense updates, and at its optimum."""

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack
from compose.routers.losses.expert_cosine import ExpertCosine

ALL = torch.ones(4, dtype=torch.bool)


def pairwise(vectors) -> torch.Tensor:
    cosines = [
        torch.nn.functional.cosine_similarity(vectors[i], vectors[j], dim=0)
        for i in range(len(vectors))
        for j in range(len(vectors))
        if i != j
    ]
    return torch.stack(cosines).mean()


@pytest.mark.parametrize("available", [(0, 1, 2, 3), (0, 1, 3)])
def test_equals_cosines_of_dense_updates(available, decisions, alone):
    experts = torch.isin(torch.arange(4), torch.tensor(available))
    given = decisions(torch.randn(3, 4, dtype=torch.float64), available=experts)
    dense = [(lambda a, b: (b.T @ a).flatten())(*given.stack.factors(expert)) for expert in available]
    assert_close(ExpertCosine()(given, alone), pairwise(dense))


def test_of_a_is_goats_code_up_to_the_mean(decisions, stack, alone):
    factors = stack(ranks=(2, 2, 2, 2))
    given = decisions(torch.randn(3, 4, dtype=torch.float64), available=ALL, stack=factors)
    flat = factors.a_RD.reshape(4, -1)
    lengths = flat.norm(dim=1, keepdim=True)
    upstream = (flat @ flat.T / (lengths @ lengths.T)).fill_diagonal_(0).sum()
    assert_close(ExpertCosine(of="a")(given, alone), upstream / 12)


def test_equal_experts_cost_1_and_a_simplex_least(decisions, alone):
    logits, two = torch.zeros(1, 2, dtype=torch.float64), torch.ones(2, dtype=torch.bool)
    a, b = torch.randn(1, 5, dtype=torch.float64), torch.randn(1, 6, dtype=torch.float64)
    for sign, expected in ((1, 1.0), (-1, -1.0)):
        factors = LoraStack(torch.cat([a, a]), torch.cat([b, sign * 3 * b]), torch.ones(2), (1, 1))
        value = ExpertCosine()(decisions(logits, k=1, available=two, stack=factors), alone)
        assert_close(value.item(), expected)


def test_zero_updates_and_lone_experts_cost_nothing(decisions, stack, alone):
    given = decisions(torch.randn(3, 4), available=ALL)
    a, b = given.stack.a_RD.clone().requires_grad_(), torch.zeros_like(given.stack.b_RO).requires_grad_()
    value = ExpertCosine()(given._replace(stack=LoraStack(a, b, given.stack.scaling_E, given.stack.ranks)), alone)
    value.backward()
    assert value.item() == 0
    assert bool(a.grad.isfinite().all())
    assert bool(b.grad.isfinite().all())
    assert ExpertCosine()(given._replace(available_E=torch.arange(4) == 2), alone).item() == 0
    with pytest.raises(IncompatibleError, match="of must"):
        ExpertCosine(of="b")
