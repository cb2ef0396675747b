"""Bitwise promises: repeatable, and a result that does not depend on the batch around it."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.packed import op

LAUNCHES = ("rows", "dense", "dense long", "tiles", "tiles sorted")
SMALL = {"ranks": (3, 0, 17, 8), "width": 40, "out": 19}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_the_same_call_gives_the_same_bits(launch, force, make_problem):
    force(launch)
    problem = make_problem(launch, 2, **SMALL).trained()
    dy = torch.randn_like(problem.base)
    first, second = (
        (y.detach(), *torch.autograd.grad(y, list(problem.leaves().values()), dy))
        for y in (problem.run(), problem.run())
    )
    assert all(torch.equal(one, two) for one, two in zip(first, second, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("launch", "top"), [("rows", 0), ("rows", 2), ("dense", 0), ("dense", 2), ("dense", -1)])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(launch, top, dtype, force, make_problem):
    taken = force(launch)
    whole = make_problem(launch, top, dtype, shape=((50,), (50,)), **SMALL)
    expected = whole.run()
    for rows in (slice(0, 1), slice(49, 50), slice(3, 5), slice(7, 24), slice(0, 33)):
        assert torch.equal(whole.rows(rows).run(), expected[rows])
    assert set(taken) == {launch}


@pytest.mark.parametrize(
    ("launch", "tokens", "per_token", "top"),
    [("dense long", 17, True, -1), ("dense long", 70, False, 2), ("tiles", 17, False, 2), ("tiles", 70, False, 0),
     ("tiles sorted", 17, True, 2), ("tiles sorted", 70, True, 0)],
)  # fmt: skip
def test_an_example_alone_has_the_bits_it_has_in_a_batch(launch, tokens, per_token, top, force, make_problem):
    taken = force(launch)
    shape = ((3, tokens), (3, tokens) if per_token else (3,))
    whole = make_problem(launch, top, shape=shape, **SMALL)
    expected = whole.run()
    for rows in (slice(0, 1), slice(2, 3), slice(1, 3)):
        assert torch.equal(whole.rows(rows).run(), expected[rows])
    assert set(taken) == {launch}


@pytest.mark.parametrize(
    ("rows", "tokens", "invariant", "expected"),
    [
        (513, None, True, "rows"),  # the number of examples does not count
        (512, None, False, "rows"),
        (513, None, False, "tiles"),
        (2, 16, True, "rows"),
        (600, 16, True, "rows"),
        (2, 17, True, "tiles"),
    ],
)
def test_what_counts_as_many_tokens(rows, tokens, invariant, expected, make_problem, monkeypatch):
    """The documented limits: 16 tokens of one example; 512 rows only where the result may depend on the batch."""
    taken = []

    def stub(x, first, second, packed, route, *rest, **options):
        taken.append(route.shape)
        return torch.zeros(x.shape[0], second.shape[1]), None

    monkeypatch.setattr(op, "low_rank", stub)
    lead = (rows,) if tokens is None else (rows, tokens)
    make_problem("", 0, ranks=(16,) * 17, shape=(lead, lead), width=2, out=2).run(batch_invariant=invariant)
    assert taken == [expected]
