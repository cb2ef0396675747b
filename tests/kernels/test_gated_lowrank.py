"""Gates and factors in one function equal the formula, gradients and all, for every set of what is trained."""

from __future__ import annotations

from itertools import product

import pytest
import torch

from compose.kernels.gated_lowrank import SoftGate, gated_lowrank

NAMES = ("x", "weight", "bias", "a", "b", "base")


def operands(*, bias: bool = True, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    ranks, width, out = (2, 1, 3), 5, 4
    shapes = {
        "x": (2, 3, width),
        "weight": (3, width),
        "bias": (3,),
        "a": (6, width),
        "b": (6, out),
        "base": (2, 3, out),
    }
    made = {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}
    owner = torch.tensor([expert for expert, rank in enumerate(ranks) for _ in range(rank)])
    made["spread"] = torch.nn.functional.one_hot(owner, 3).to(dtype) * torch.tensor([0.5, 2.0, 1.5], dtype=dtype)
    return made if bias else {**made, "bias": None}


def all_but_the_best_two(scores: torch.Tensor) -> torch.Tensor:
    return scores < scores.topk(2, dim=-1).values[..., -1:]


def mixed(given, **options):
    reuse_base = options.pop("reuse_base", False)
    gate = SoftGate(given["weight"], given["bias"], given["spread"], **options)
    return gated_lowrank(given["x"], gate, given["a"], given["b"], given["base"], reuse_base=reuse_base)


def formula(given, temperature=1.0, others=None):
    scores = torch.nn.functional.linear(given["x"], given["weight"], given["bias"]) / temperature
    if others is not None:
        scores = scores.masked_fill(others(scores), float("-inf"))
    c = torch.softmax(scores, -1) @ given["spread"].T
    return given["base"] + ((given["x"] @ given["a"].T) * c) @ given["b"]


OPTIONS = {
    "plain": {},
    "temperature": {"temperature": 0.4},
    "best two": {"others": all_but_the_best_two},
    "best two, temperature": {"others": all_but_the_best_two, "temperature": 3.0},
}


@pytest.mark.parametrize("trained", [set for set in product([False, True], repeat=6) if any(set)], ids=str)
def test_gradients_equal_those_of_the_formula_for_every_set_of_trained_operands(trained):
    given = operands()
    for name, needs in zip(NAMES, trained, strict=True):
        given[name].requires_grad_(needs)
    inputs = [given[name] for name, needs in zip(NAMES, trained, strict=True) if needs]
    weights = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    for options in OPTIONS.values():
        ours, wanted = mixed(given, **options), formula(given, **options)
        torch.testing.assert_close(ours, wanted)
        found, expected = (torch.autograd.grad((y * weights).sum(), inputs) for y in (ours, wanted))
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradients_equal_numerical_ones(options, bias):
    given = operands(bias=bias)
    names = [name for name in NAMES if given[name] is not None]

    def function(*tensors):
        return mixed({**given, **dict(zip(names, tensors, strict=True))}, **options)

    assert torch.autograd.gradcheck(function, [given[name].requires_grad_() for name in names])


def test_base_is_written_only_when_given_up_and_gradients_stay_the_same():
    given = operands()
    leaf = given["base"].requires_grad_()
    before = leaf.detach().clone()
    kept = mixed({**given, "base": leaf * 1.0})
    own = leaf * 1.0
    used = mixed({**given, "base": own}, reuse_base=True)
    assert used.data_ptr() == own.data_ptr()
    torch.testing.assert_close(used, kept)
    torch.testing.assert_close(*(torch.autograd.grad(y.sum(), leaf) for y in (used, kept)))
    mixed(given, reuse_base=True)  # a leaf that is trained cannot be given up
    torch.testing.assert_close(leaf.detach(), before)


def test_backward_leaves_saved_tensors_alone_so_it_can_run_twice():
    given = operands()
    inputs = [given[name].requires_grad_() for name in NAMES]
    y = mixed(given).pow(2).sum()
    torch.testing.assert_close(*(torch.autograd.grad(y, inputs, retain_graph=True) for _ in range(2)))


def test_an_expanded_gradient_and_a_strided_input_are_accepted():
    given = operands()
    strided = torch.randn(2, 5, 3, dtype=torch.float64).transpose(1, 2).requires_grad_()
    given["x"] = strided
    ours, wanted = (torch.autograd.grad(y.sum(), strided) for y in (mixed(given), formula(given)))
    torch.testing.assert_close(ours, wanted)
