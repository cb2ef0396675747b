"""Contrastive losses against a slow twin that forms every expert's output."""

import math

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack
from compose.routers.losses.contrastive import Contrastive, info_nce


def outputs(given) -> torch.Tensor:
    """``(N, E, O)``: what each expert adds."""
    stack = given.stack
    per_expert = []
    for expert in range(stack.num_adapters):
        a, b = stack.factors(expert)
        per_expert.append(stack.scaling_E[expert] * (given.x_ND @ a.T) @ b)
    return torch.stack(per_expert, 1)


def slow_info_nce(anchor, positives, negatives, temperature):
    def similarity(other):
        return torch.nn.functional.cosine_similarity(anchor, other, dim=0) / temperature

    against = sum(math.exp(similarity(other)) for other in negatives)
    costs = [-math.log(math.exp(similarity(p)) / (math.exp(similarity(p)) + against)) for p in positives]
    return sum(costs) / len(costs)


def slow(given, mode, temperature):
    made, chosen = outputs(given), (given.gates_NE != 0) & given.available_E & given.real_N[:, None]
    items = [(int(n), int(e)) for n, e in chosen.nonzero()]
    costs = []
    for n, e in items:
        if mode == "same_other":
            positives = [made[m, f] for m, f in items if f == e and m != n]
            negatives = [made[m, f] for m, f in items if f != e]
        else:
            positives = [made[m, f] for m, f in items if m == n and f != e]
            negatives = [made[n, f] for f in range(4) if given.available_E[f] and not chosen[n, f]]
        if positives and negatives:
            costs.append(slow_info_nce(made[n, e], positives, negatives, temperature))
    return torch.tensor(sum(costs) / len(costs), dtype=torch.float64)


@pytest.mark.parametrize("mode", ["same_other", "active_inactive"])
@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_equals_the_slow_twin(mode, temperature, decisions, alone):
    logits = torch.randn(9, 4, dtype=torch.float64)
    real = torch.arange(9) != 4
    given = decisions(logits, real_N=real)
    value = Contrastive(mode=mode, temperature=temperature)(given, alone)
    assert_close(value, slow(given, mode, temperature))


@pytest.mark.parametrize("mode", ["same_other", "active_inactive"])
def test_all_experts_available(mode, decisions, alone):
    given = decisions(torch.randn(7, 4, dtype=torch.float64), k=3, available=torch.ones(4, dtype=torch.bool))
    assert_close(Contrastive(mode=mode, temperature=0.5)(given, alone), slow(given, mode, 0.5))


def test_alike_within_and_opposite_between_experts_costs_almost_nothing(decisions, alone):
    # two experts with one rank row each, same input: outputs b and -b
    b = torch.randn(1, 6)
    factors = LoraStack(torch.ones(2, 5), torch.cat([b, -b]), torch.ones(2), (1, 1))
    logits = torch.tensor([[9.0, 0], [9, 0], [0, 9], [0, 9]])
    given = decisions(logits, k=1, available=torch.ones(2, dtype=torch.bool), stack=factors, x_ND=torch.ones(4, 5))
    assert Contrastive()(given, alone).item() < 1e-10
    factors = LoraStack(torch.ones(2, 5), torch.cat([b, b]), torch.ones(2), (1, 1))
    # positive and both negatives alike: log(1 + 2)
    assert_close(Contrastive()(given._replace(stack=factors), alone), torch.tensor(math.log(3)))


def test_one_chosen_expert_has_no_partner_on_its_token(decisions, alone):
    given = decisions(torch.randn(6, 4), k=1)
    assert Contrastive(mode="active_inactive")(given, alone).item() == 0


def test_zero_b_gives_finite_gradients(decisions, alone):
    given = decisions(torch.randn(6, 4))
    a, b = given.stack.a_RD.clone().requires_grad_(), torch.zeros_like(given.stack.b_RO).requires_grad_()
    factors = LoraStack(a, b, given.stack.scaling_E, given.stack.ranks)
    for mode in ("same_other", "active_inactive"):
        Contrastive(mode=mode)(given._replace(stack=factors), alone).backward()
        assert bool(a.grad.isfinite().all())
        assert bool(b.grad.isfinite().all())


def test_the_sample_is_even_and_the_same_each_time(decisions, alone):
    logits = torch.randn(40, 4, dtype=torch.float64)
    loss = Contrastive(mode="active_inactive", items=10, temperature=1.0)
    sampled = decisions(logits[::4], x_ND=decisions(logits).x_ND[::4])
    assert_close(loss(decisions(logits), alone), loss(sampled, alone))
    assert loss(decisions(logits), alone) == loss(decisions(logits), alone)


def test_experts_without_factors_take_no_part(decisions, stack, alone):
    logits = torch.randn(6, 4, dtype=torch.float64)
    experts = torch.ones(4, dtype=torch.bool)
    given = decisions(logits, available=experts, stack=stack(ranks=(2, 0, 3, 2)))
    logits[:, 1] = -50
    for mode in ("same_other", "active_inactive"):
        hidden = decisions(logits, available=experts & (torch.arange(4) != 1), stack=given.stack)
        shown = hidden._replace(available_E=experts)
        assert_close(Contrastive(mode=mode)(shown, alone), Contrastive(mode=mode)(hidden, alone))


def test_info_nce_by_hand():
    cosine = torch.tensor([[1.0, 0.8, 0.1], [0.8, 1.0, 0.2], [0.1, 0.2, 1.0]])
    same = torch.tensor([[False, True, False], [True, False, False], [False, False, False]])
    other = torch.tensor([[False, False, True], [False, False, True], [True, True, False]])
    expected = (math.log1p(math.exp((0.1 - 0.8) / 0.5)) + math.log1p(math.exp((0.2 - 0.8) / 0.5))) / 2
    assert_close(info_nce(cosine, same, other, 0.5), torch.tensor(expected))


def test_bad_options_are_refused():
    for wrong in ({"mode": "all"}, {"temperature": 0.0}, {"items": 1}):
        with pytest.raises(IncompatibleError, match=next(iter(wrong))):
            Contrastive(**wrong)
