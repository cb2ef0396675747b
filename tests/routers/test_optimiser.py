"""AdamW beside torch's, masters of half precision, a state that comes back."""

import pytest
import torch
from torch import nn

from compose.errors import AdapterFormatError
from compose.routers.optimiser import Optimiser


def parameters(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"router.gates.model/layers.w": (3, 4), "model.up_proj.a_RD": (2, 4), "router.temperature": ()}
    return {name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for name, shape in shapes.items()}


def give_gradients(named, step):
    generator = torch.Generator().manual_seed(step)
    for parameter in named.values():
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)


def test_it_is_adamw_with_two_rates_and_clipping() -> None:
    ours, theirs = parameters(), parameters()
    optimiser = Optimiser(ours, weight_decay=0.1, betas=(0.8, 0.9))
    router = [value for name, value in theirs.items() if name.startswith("router.")]
    groups = [{"params": router, "lr": 0.1}, {"params": [theirs["model.up_proj.a_RD"]], "lr": 0.01}]
    oracle = torch.optim.AdamW(groups, weight_decay=0.1, betas=(0.8, 0.9))
    for step in range(4):
        give_gradients(ours, step)
        give_gradients(theirs, step)
        optimiser.set_rates(0.1, 0.01)
        norm = optimiser.step(0.5)
        wanted = nn.utils.clip_grad_norm_(theirs.values(), 0.5)
        assert norm == pytest.approx(float(wanted))
        oracle.step()
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name])
            assert value.grad is None


def test_a_gradient_that_is_not_there_is_zero() -> None:
    ours, theirs = parameters(), parameters()
    for named in (ours, theirs):
        give_gradients(named, 0)
    ours["model.up_proj.a_RD"].grad = None
    theirs["model.up_proj.a_RD"].grad.zero_()
    for named in (ours, theirs):
        optimiser = Optimiser(named, weight_decay=0.1)
        optimiser.set_rates(0.1, 0.1)
        optimiser.step(None)
    for name, value in ours.items():
        assert torch.equal(value, theirs[name])


def test_small_steps_are_not_lost_in_half_precision() -> None:
    named = {"router.w": nn.Parameter(torch.ones(3, dtype=torch.bfloat16))}
    optimiser = Optimiser(named)
    for _ in range(20):
        named["router.w"].grad = torch.ones(3, dtype=torch.bfloat16)
        optimiser.set_rates(1e-3, 1e-3)
        optimiser.step(None)
    torch.testing.assert_close(named["router.w"].float(), torch.full((3,), 0.98), rtol=0, atol=4e-3)
    assert named["router.w"].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_continues_to_the_bit(dtype) -> None:
    whole, parts = parameters(dtype), parameters(dtype)
    one, other = Optimiser(whole), Optimiser(parts)
    for step in range(6):
        if step == 3:
            state, kept = other.state(), {name: value.detach().clone() for name, value in parts.items()}
            parts = {name: nn.Parameter(value) for name, value in kept.items()}
            other = Optimiser(parts)
            other.load_state(state, "here")
            assert all("/" not in key for key in state)
        for named, optimiser in ((whole, one), (parts, other)):
            give_gradients(named, step)
            optimiser.set_rates(0.01, 0.1)
            optimiser.step(1.0)
    for name, value in whole.items():
        assert torch.equal(value, parts[name])


def test_nothing_changes_where_the_gradient_is_not_finite() -> None:
    named = parameters()
    before = {name: value.detach().clone() for name, value in named.items()}
    give_gradients(named, 0)
    named["router.temperature"].grad.fill_(float("inf"))
    optimiser = Optimiser(named)
    optimiser.set_rates(1.0, 1.0)
    assert optimiser.step(1.0) == float("inf")
    for name, value in named.items():
        assert torch.equal(value, before[name])


def test_a_state_of_other_parameters_is_refused() -> None:
    named = parameters()
    optimiser = Optimiser(named)
    give_gradients(named, 0)
    optimiser.step(None)
    state = optimiser.state()
    with pytest.raises(AdapterFormatError, match="is the state of nothing that trains"):
        Optimiser(parameters()).load_state({**state, "step:other": torch.ones(1)}, "here")
    with pytest.raises(AdapterFormatError, match=r"no state of the parameter 'model.up_proj.a_RD'"):
        Optimiser(parameters()).load_state({k: v for k, v in state.items() if "up_proj" not in k}, "here")
