"""SiRA's capacity and expert dropout apply in training only (arXiv:2311.09179)."""

import torch

from compose.routers.presets.registry import preset


def gates(mixture):
    with torch.no_grad(), mixture.routed.recording() as decisions:
        mixture.run()
    return decisions[0].gates_NE


def test_capacity_keeps_the_highest_gates_in_training(small) -> None:
    mixture = small(preset("sira", expert_dropout=0.0, capacity=0.5), experts=6)
    free = gates(mixture)
    assert ((free > 0).sum(1) == 4).all()
    mixture.routed.train()
    kept = gates(mixture)
    room = -(-10 * 4 // 12)  # half of an even share of 10 tokens x 4 slots over 6 experts, rounded up
    assert ((kept > 0).sum(0) <= room).all()
    for expert in range(6):
        full = int((free[:, expert] > 0).sum()) > room
        taken = kept[:, expert] > 0
        if full:
            assert free[taken, expert].min() >= free[~taken, expert].max()


def test_expert_dropout_in_training_only(small) -> None:
    mixture = small(preset("sira", capacity=None), experts=6)
    assert torch.equal(gates(mixture), gates(mixture))
    mixture.routed.train()
    one = gates(mixture)
    assert ((one > 0).sum(1) >= 1).all()
    assert not torch.equal(one, gates(mixture))
