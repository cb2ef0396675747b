"""Bitwise promises of the Triton kernels on the GPU: repeatable, and a result that does not depend on the batch."""

from __future__ import annotations

import pytest
import torch
from triton.runtime.errors import OutOfResources

from compose.kernels.packed import trials, tuning

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


def test_the_same_call_gives_the_same_bits(case, make_problem):
    problem = make_problem(case, torch.bfloat16)
    first = problem.run()
    for _ in range(20):
        assert torch.equal(problem.run(), first)


@pytest.mark.parametrize(
    "name", ["rows, top 2", "dense, ids", "dense, long, gates", "tiles, ids per example", "tiles, sorted, top 2"]
)
def test_the_same_gradients_have_the_same_bits(name, cases, make_problem):
    trained = make_problem(cases[name], torch.bfloat16).trained()
    leaves = list(trained.leaves().values())
    dy = torch.randn_like(trained.base)
    first, *others = (torch.autograd.grad(trained.run(), leaves, dy) for _ in range(5))
    for other in others:
        assert all(torch.equal(one, two) for one, two in zip(first, other, strict=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("ranks", "top", "launch"),
    [((16,) * 64, 0, "rows"), ((16,) * 64, 2, "rows"), ((16,) * 8, 0, "dense"), ((16,) * 8, -1, "dense"),
     ((8, 3, 33, 128), 0, "dense")],
)  # fmt: skip
def test_a_row_alone_has_the_bits_it_has_in_a_batch(ranks, top, launch, dtype, make_problem, make_case):
    case = make_case((2500,), ranks, (2500,), top, (launch, False, False))
    whole = make_problem(case, dtype)
    expected = whole.run()
    for rows in (slice(0, 1), slice(2499, 2500), slice(7, 9), slice(100, 116), slice(3, 36), slice(0, 100),
                 slice(400, 700), slice(0, 512), slice(1, 514), slice(100, 1900)):  # fmt: skip
        assert torch.equal(whole.rows(rows).run(), expected[rows])


def test_larger_blocks_are_taken_on_request_only(make_problem, make_case, float64_twin, frobenius_error):
    """They give other bits, and an equally exact result."""
    case = make_case((1200,), (16,) * 64, (1200,), 2, ("rows", False, False))
    problem = make_problem(case, torch.bfloat16)
    invariant, large = problem.run(), problem.run(batch_invariant=False)
    assert not torch.equal(invariant, large)
    expected = float64_twin(problem.exact()).detach()
    assert max(frobenius_error(one, expected) for one in (invariant, large)) <= 4e-3


@pytest.mark.parametrize("top", [0, -1])
def test_blocks_that_the_number_of_tokens_may_choose_give_the_same_bits(top, make_problem, make_case):
    """Every candidate of the tuner, not only those in use."""
    trial = next(one for one in trials.TRIALS if one.kind == "dense few")
    case = make_case((77,), (16,) * 8, (77,), top, ("dense", False, False), 4096, 4096)
    problem = make_problem(case, torch.bfloat16)
    expected, fitted = problem.run(), 0
    blocks = trials.space(trial, torch.bfloat16).all(trial.start(torch.bfloat16, problem.x.device))
    for config in blocks[::3]:
        with tuning.trying({"dense few": config}):
            try:
                y = problem.run()
            except OutOfResources:
                continue
        fitted += 1
        assert torch.equal(y, expected), config
    assert fitted > 5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize(
    ("ranks", "entries", "top", "tokens"),
    [
        ((16,) * 8, (6, 129), -1, 129),  # dense
        ((16,) * 8, (6,), 2, 700),
        ((100, 128, 12), (6,), 0, 65),
        ((16,) * 40, (6,), 0, 129),  # tiles of one example
        ((16,) * 40, (6,), 2, 9),
        ((16,) * 40, (6,), 0, 1500),
        ((16,) * 40, (6, 129), 0, 129),  # sorted tokens
        ((16,) * 64, (6, 700), 2, 700),
    ],
    ids=str,
)
def test_an_example_alone_has_the_bits_it_has_in_a_batch(ranks, entries, top, tokens, dtype, make_problem, make_case):
    case = make_case((6, tokens), ranks, entries, top, ("", True, False), 1024, 1024)
    whole = make_problem(case, dtype)
    expected = whole.run()
    for rows in (slice(0, 1), slice(5, 6), slice(1, 4)):
        assert torch.equal(whole.rows(rows).run(), expected[rows])


@pytest.mark.parametrize(
    ("tokens", "entries", "ranks", "top"),
    [
        ((1, 524_416), (1, 524_416), (16,) * 8, 0),  # dense
        ((1, 524_416), (1, 524_416), (16,) * 20, 0),  # sorted
        ((2, 262_208), (2,), (16,) * 20, 0),  # tiles of one example
    ],
    ids=["dense", "sorted", "example"],
)
def test_more_than_two_billion_elements_are_addressed(
    tokens, entries, ranks, top, make_problem, make_case, float64_twin, frobenius_error
):
    case = make_case(tokens, ranks, entries, top, ("", True, False), 4096, 4096)
    problem = make_problem(case, torch.bfloat16)
    assert problem.x.numel() > 2**31
    x = problem.x.requires_grad_()
    y = problem.run(base=None)
    (dx,) = torch.autograd.grad(y, [x], y)
    picked = torch.cat([torch.arange(0, 4), torch.arange(524_280, 524_416)]).cuda()
    ids = problem.ids.repeat_interleave(524_416 // problem.ids.numel())[picked]
    part = problem.__class__(x.detach().view(-1, 4096)[picked], problem.stack, ids, None, None).exact()
    expected = float64_twin(part)
    dy = y.detach().view(-1, 4096)[picked].double()
    (wanted,) = torch.autograd.grad(expected, [part.x], dy)
    assert frobenius_error(y.detach().view(-1, 4096)[picked], expected.detach()) <= 4e-3
    assert frobenius_error(dx.view(-1, 4096)[picked], wanted) <= 6e-3


def test_factors_of_more_than_two_billion_elements_are_addressed(make_problem, make_case, frobenius_error):
    case = make_case((8,), (16,) * 4200, (8,), 0, ("rows", False, False), 32_768, 512)
    problem = make_problem(case, torch.bfloat16)
    problem.ids.copy_(torch.tensor([4199, 0, 4198, 4000, -1, 4199, 2100, 4111]))
    assert problem.stack.a_RD.numel() > 2**31
    y, expected = problem.run(), problem.base.double()
    for row, adapter in enumerate(problem.ids.tolist()):
        if adapter >= 0:
            a, b = (factor.double() for factor in problem.stack.factors(adapter))
            expected[row] += problem.stack.scaling_E[adapter].double() * (problem.x[row].double() @ a.T @ b)
    assert frobenius_error(y, expected) <= 4e-3
