"""Noise, expert dropout and capacity."""

import pytest
import torch
from torch.testing import assert_close

from compose.routers.perturb import add_noise, drop_experts, limit_capacity

LOW = float("-inf")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def test_noise_has_its_standard_deviation_and_leaves_missing_experts():
    logits = torch.tensor([1.0, LOW, -2.0]).repeat(20000, 1)
    noisy = add_noise(logits, 0.3, generator())
    assert bool((noisy[:, 1] == LOW).all())
    off = (noisy - logits)[:, [0, 2]]
    assert_close(off.std(), torch.tensor(0.3), atol=0.005, rtol=0)
    assert_close(off.mean(), torch.tensor(0.0), atol=0.01, rtol=0)


def test_noise_passes_gradients_and_no_noise_draws_nothing():
    logits = torch.zeros(3, 4, requires_grad=True)
    add_noise(logits, 1.0, generator()).sum().backward()
    assert_close(logits.grad, torch.ones(3, 4))
    before = torch.get_rng_state()
    assert add_noise(logits, 0.0) is logits
    assert drop_experts(logits, 0.0) is logits
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("draw", [lambda x, g: add_noise(x, 1.0, g), lambda x, g: drop_experts(x, 0.5, g)])
def test_a_generator_decides_and_otherwise_torchs_state_does(draw):
    logits = torch.zeros(6, 5)
    assert torch.equal(draw(logits, generator(1)), draw(logits, generator(1)))
    assert not torch.equal(draw(logits, generator(1)), draw(logits, generator(2)))
    torch.manual_seed(7)
    first = draw(logits, None)
    torch.manual_seed(7)
    assert torch.equal(draw(logits, None), first)


@pytest.mark.parametrize("probability", [0.1, 0.5, 0.999])
@pytest.mark.parametrize("available", [(0, 1, 2, 3), (1, 3), (2,)])
def test_dropout_never_takes_all_experts(probability, available):
    logits = torch.full((5000, 4), LOW)
    logits[:, list(available)] = torch.randn(5000, len(available), generator=generator())
    dropped = drop_experts(logits, probability, generator(1))
    left = dropped > LOW
    assert bool(left.any(1).all())
    assert_close(dropped[left], logits[left], rtol=0, atol=0)
    assert not bool(left[:, [place for place in range(4) if place not in available]].any())
    expected = max(1.0, (1 - probability) * len(available) + probability ** len(available))
    assert_close(left.sum(1).float().mean().item(), expected, atol=0.06, rtol=0)


def test_the_survivor_is_equally_likely_any_available_expert():
    logits = torch.tensor([5.0, LOW, -5.0, 0.0]).repeat(30000, 1)
    left = drop_experts(logits, 0.9999, generator()) > LOW
    shares = left.float().mean(0)
    assert_close(shares, torch.tensor([1 / 3, 0.0, 1 / 3, 1 / 3]), atol=0.01, rtol=0)


def test_dropped_experts_get_no_gradient():
    logits = torch.zeros(50, 4, requires_grad=True)
    dropped = drop_experts(logits, 0.5, generator())
    torch.softmax(dropped, -1)[:, 0].sum().backward()
    assert bool((logits.grad[dropped == LOW] == 0).all())
    assert bool(logits.grad.isfinite().all())


def slow_capacity(gates, ids, experts, factor, real, available):
    """One expert at a time, in words."""
    taken = [
        (line, slot)
        for line in range(len(gates))
        for slot in range(gates.shape[1])
        if real[line] and gates[line, slot]
    ]
    capacity = -(-len(taken) * factor // (available or experts))
    kept = gates.clone()
    for expert in range(experts):
        mine = [(line, slot) for line, slot in taken if (slot if ids is None else int(ids[line, slot])) == expert]
        mine.sort(key=lambda place: -float(gates[place]))
        for place in mine[int(capacity) :]:
            kept[place] = 0
    return kept


@pytest.mark.parametrize("factor", [0.25, 1.0, 1.5, 100.0])
@pytest.mark.parametrize("sparse", [False, True])
@pytest.mark.parametrize("available", [None, 3])
def test_capacity_equals_its_slow_twin(factor, sparse, available):
    probs = torch.softmax(torch.randn(40, 5, generator=generator()) * 2, -1)
    gates, ids = probs.topk(2, dim=-1)
    if not sparse:
        gates, ids = torch.zeros_like(probs).scatter(1, ids, gates), None
    real = torch.arange(40) % 5 != 0
    mine = limit_capacity(gates, ids, 5, factor, real, available=available)
    assert_close(mine, slow_capacity(gates, ids, 5, factor, real, available), rtol=0, atol=0)


def test_capacity_by_hand():
    # four assignments on two experts: two each; expert 0 has three and loses its lowest
    gates = torch.tensor([[0.9, 0.0], [0.5, 0.0], [0.7, 0.0], [0.0, 0.2]])
    assert limit_capacity(gates, None, 2, 1.0).tolist() == (gates * torch.tensor([[1.0], [0], [1], [1]])).tolist()
    assert_close(limit_capacity(gates, None, 2, 1.5), gates)


def test_padding_takes_no_place_and_keeps_its_gates():
    gates = torch.tensor([[0.9], [0.5], [0.7], [0.6]])
    real = torch.tensor([False, True, True, False])
    assert_close(limit_capacity(gates, None, 1, 0.5, real), torch.tensor([[0.9], [0.0], [0.7], [0.6]]))


def test_equal_gates_are_kept_in_order():
    assert limit_capacity(torch.full((4, 1), 0.5), None, 1, 0.5).tolist() == [[0.5], [0.5], [0.0], [0.0]]


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3)])
@pytest.mark.parametrize("sparse", [False, True])
def test_capacity_keeps_shapes_and_gradients(lead, sparse):
    gates = torch.rand(*lead, 2 if sparse else 4, requires_grad=True)
    ids = torch.tensor([3, 1]).expand(gates.shape) if sparse else None
    given = limit_capacity(gates, ids, 4, 1.0, torch.ones(lead, dtype=torch.bool))
    assert given.shape == gates.shape
    given.sum().backward()
    assert_close(gates.grad, (given != 0).float())


def test_places_without_an_expert_take_no_place():
    ids = torch.tensor([[0, -1], [0, -1], [1, -1]])
    gates = torch.tensor([[0.4, 0.9], [0.6, 0.9], [0.5, 0.9]])
    # three assignments on two experts: two each
    kept = limit_capacity(gates, ids, 2, 1.0)
    assert kept[:, 0].tolist() == gates[:, 0].tolist()
    kept = limit_capacity(gates, ids, 2, 0.5)
    assert_close(kept[:, 0], torch.tensor([0.0, 0.6, 0.5]))
