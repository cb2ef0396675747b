"""Switch, Mixtral and shifted load balance: values by hand and values at balance."""

import pytest
import torch
from torch.testing import assert_close

from compose.routers.losses.load_balance import MixtralLoadBalance, ShiftedLoadBalance, SwitchLoadBalance

ALL = torch.ones(2, dtype=torch.bool)


def two_experts(decisions, alone, loss, **more):
    probs = torch.tensor([[0.9, 0.1], [0.6, 0.4], [0.2, 0.8]])
    return loss(decisions(probs.log(), k=1, available=ALL, **more), alone)


def test_switch_by_hand(decisions, alone):
    # f = (2/3, 1/3), P = (1.7/3, 1.3/3): 2 (2·1.7 + 1.3) / 9
    assert_close(two_experts(decisions, alone, SwitchLoadBalance()), torch.tensor(2 * 4.7 / 9))


def test_padding_does_not_count(decisions, alone):
    # the first two: f = (1, 0), P = (0.75, 0.25)
    real = torch.tensor([True, True, False])
    assert_close(two_experts(decisions, alone, SwitchLoadBalance(), real_N=real), torch.tensor(1.5))


@pytest.mark.parametrize("k", [1, 2, 3, 4])
@pytest.mark.parametrize("available", [4, 6])
def test_values_at_balance_are_1_and_k(k, available, decisions, alone):
    experts = torch.arange(6) < available
    logits = torch.zeros(available, 6, dtype=torch.float64)
    for line in range(available):  # every expert is among the first k equally often
        for place in range(k):
            logits[line, (line + place) % available] += 1
    given = decisions(logits, k=k, available=experts)
    assert_close(SwitchLoadBalance()(given, alone).item(), 1.0)
    assert_close(MixtralLoadBalance()(given, alone).item(), float(k))


def test_collapse_costs_up_to_the_number_of_experts(decisions, alone):
    logits = torch.tensor([[50.0, 0, 0, 0]]).repeat(5, 1)
    given = decisions(logits, k=1, available=torch.ones(4, dtype=torch.bool))
    assert_close(SwitchLoadBalance()(given, alone), torch.tensor(4.0))


def test_soft_mixtures_have_the_constant_1_and_no_gradient(decisions, alone):
    logits = torch.randn(7, 4).requires_grad_()
    value = SwitchLoadBalance()(decisions(logits, k=4, available=torch.ones(4, dtype=torch.bool)), alone)
    value.backward()
    assert_close(value.detach(), torch.tensor(1.0))
    assert_close(logits.grad, torch.zeros_like(logits), atol=1e-7, rtol=0)


def test_mixtral_agrees_with_transformers(decisions, alone):
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    logits = torch.randn(2 * 9, 4)
    mask = torch.ones(2, 9, dtype=torch.int64)
    mask[1, 6:] = 0
    expected = load_balancing_loss_func((logits,), num_experts=4, top_k=2, attention_mask=mask)
    given = decisions(logits, k=2, available=torch.ones(4, dtype=torch.bool), real_N=mask.reshape(-1).bool())
    assert_close(MixtralLoadBalance()(given, alone), expected)


def test_shifted_by_hand(decisions, alone):
    # thresholds 0.3, 0.5, 0: chosen {0}, {0}, {0, 1}; p - τ = (.6, -.2), (.1, -.1), (.2, .8)
    thresholds = torch.tensor([0.3, 0.5, 0.0])
    gates = torch.tensor([[1.0, 0], [1, 0], [0.2, 0.8]])
    value = two_experts(decisions, alone, ShiftedLoadBalance(), extras={"threshold": thresholds}, gates_NE=gates)
    assert_close(value, torch.tensor(2 * (3 / 3 * 0.9 / 3 + 1 / 3 * 0.5 / 3)))


def test_shifted_of_uniform_probabilities_is_not_a_constant(decisions, alone):
    threshold = torch.full((5,), 0.1)
    given = decisions(
        torch.zeros(5, 4), k=4, available=torch.ones(4, dtype=torch.bool), extras={"threshold": threshold}
    )
    assert_close(ShiftedLoadBalance()(given, alone), torch.tensor(4 * (1 - 4 * 0.1)))


def test_shifted_can_be_negative(decisions, alone):
    probs = torch.tensor([[0.97, 0.03]])
    given = decisions(probs.log(), k=2, available=ALL, extras={"threshold": torch.tensor([0.5])})
    value = ShiftedLoadBalance()(given._replace(gates_NE=torch.tensor([[0.0, 1.0]])), alone)
    assert_close(value, torch.tensor(2 * -0.47))
