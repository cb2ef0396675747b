"""Values and gradients of both ops' Triton backend against the float64 reference, in every launch shape."""

from __future__ import annotations

import pytest
import torch

FORWARD = {torch.float32: 2e-6, torch.float16: 5e-4}
GRADIENTS = {torch.float32: 5e-6, torch.float16: 1e-3}
LAUNCHES = ("rows", "dense", "dense long", "tiles", "tiles sorted")
ROUTES = [(launch, top) for launch in LAUNCHES for top in (0, 1, 2, 4)] + [("dense", -1), ("dense long", -1)]


def _compare(problem, error) -> None:
    """Value and every gradient, for one random gradient of the result."""
    trained, exact = problem.trained(), problem.exact()
    y, expected = trained.run(), exact.run("reference")
    assert y.dtype == problem.x.dtype
    assert error(y, expected) <= FORWARD[y.dtype]
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, list(trained.leaves().values()), dy)
    wanted = torch.autograd.grad(expected, list(exact.leaves().values()), dy.double())
    names = trained.leaves()
    errors = {name: error(got, want) for name, got, want in zip(names, found, wanted, strict=True)}
    assert {name: one for name, one in errors.items() if one > GRADIENTS[y.dtype]} == {}
    assert [got.dtype for got in found] == [leaf.dtype for leaf in names.values()]


@pytest.mark.parametrize(("launch", "top"), ROUTES)
def test_float32_equals_the_reference(launch, top, force, make_problem, error):
    taken = force(launch)
    _compare(make_problem(launch, top), error)
    assert set(taken) == {launch}


@pytest.mark.parametrize(("launch", "top"), [one for one in ROUTES if one[1] in (0, 2, -1)])
def test_float16_equals_the_reference(launch, top, force, make_problem, error):
    force(launch)
    _compare(make_problem(launch, top, torch.float16), error)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_values_alone_equal_the_reference_with_and_without_a_base(launch, force, make_problem, error):
    force(launch)
    problem = make_problem(launch, 2)
    for base in (problem.base, None):
        y = problem.run(base=base)
        assert error(y, problem.exact().run("reference", base=None if base is None else base.double())) <= 2e-6


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize(
    ("ranks", "width", "out"),
    [
        ((256, 8, 130), 16, 16),
        ((16,) * 5, 64, 128),  # blocks without masks
        ((1,), 8, 8),
        ((1, 1), 130, 3),
        ((0, 0, 2), 1, 1),
    ],
    ids=str,
)
def test_ranks_and_widths_at_the_edges(launch, ranks, width, out, force, make_problem, error):
    force(launch)
    _compare(make_problem(launch, 2, ranks=ranks, width=width, out=out), error)


@pytest.mark.parametrize("launch", ["dense", "rows"])
@pytest.mark.parametrize("width", [600, 1100, 4100])
def test_sums_over_a_long_input_are_split(launch, width, force, make_problem, error):
    force(launch)
    _compare(make_problem(launch, 0, ranks=(4, 3), shape=((3,), (3,)), width=width, out=600), error)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_an_adapter_named_twice_counts_twice(launch, force, make_problem, error):
    force(launch)
    problem = make_problem(launch, 3)
    problem.ids[..., 1] = problem.ids[..., 0]
    _compare(problem, error)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("adapter", [1, 4], ids=["rank 0", "rank 128"])
def test_all_tokens_may_have_one_adapter(launch, adapter, force, make_problem, error):
    force(launch)
    problem = make_problem(launch, 0)
    problem.ids.fill_(adapter)
    _compare(problem, error)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("top", [0, 2])
def test_without_any_adapter_the_result_is_the_base_and_gradients_are_zero(launch, top, force, make_problem):
    force(launch)
    problem = make_problem(launch, top).trained()
    problem.ids.fill_(-1)
    y = problem.run()
    assert torch.equal(y, problem.base)
    *others, base = torch.autograd.grad(y.sum(), list(problem.leaves().values()))
    assert torch.equal(base, torch.ones_like(base))
    assert not any(one.any() for one in others)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_gates_of_zero_leave_the_base_and_still_get_their_gradient(launch, force, make_problem, error):
    force(launch)
    problem = make_problem(launch, 2)
    problem.gates.zero_()
    assert torch.equal(problem.run(), problem.base)
    _compare(problem, error)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_ids_outside_the_stack_count_as_none(launch, force, make_problem):
    """Nothing is read on the host, so they cannot raise; they may not reach memory outside the stack either."""
    force(launch)
    problem = make_problem(launch, 0).trained()
    problem.ids.view(-1)[::2] = -1
    dy = torch.randn_like(problem.base)
    expected = torch.autograd.grad(problem.run(), list(problem.leaves().values()), dy)
    for outside in (len(problem.stack.ranks), -(10**12)):
        problem.ids.view(-1)[::2] = outside
        found = torch.autograd.grad(problem.run(), list(problem.leaves().values()), dy)
        for got, want in zip(found, expected, strict=True):
            assert torch.equal(got, want)


@pytest.mark.parametrize(("lead", "entries"), [((4, 5), ()), ((7,), ()), ((4, 5), (4,)), ((4, 5), (4, 5))], ids=str)
@pytest.mark.parametrize("top", [2, -1])
@pytest.mark.parametrize("dense", [True, False], ids=["dense", "look up"])
def test_gates_of_every_scope(lead, entries, top, dense, force, make_problem, error):
    force("dense" if dense else "rows")
    _compare(make_problem("", top, shape=(lead, entries), ranks=(3, 0, 5)), error)


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("tokens", [1, 17, 65])
def test_any_number_of_tokens(launch, tokens, force, make_problem, error):
    taken = force(launch)
    lead = (2, tokens) if launch == "tiles" else (1, tokens) if launch in ("dense long", "tiles sorted") else (tokens,)
    entries = (2,) if launch == "tiles" else lead
    problem = make_problem(launch, 2, shape=(lead, entries), ranks=(3, 0, 17), width=9, out=5)
    assert error(problem.run(), problem.exact().run("reference")) <= 2e-6
    assert taken == ["rows" if (launch, tokens) == ("tiles", 1) else launch]
