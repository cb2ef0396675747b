"""What the packed kernels accept, leave alone, save, and do without."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compose.errors import IncompatibleError, UnknownNameError
from compose.kernels.grouped_lora.op import grouped_lora
from compose.kernels.grouped_lora.plan import plan_groups
from compose.kernels.mixture_lora.op import mixture_lora
from compose.kernels.slots import LoraSlots

LAUNCHES = ("rows", "dense", "dense long", "tiles", "tiles sorted")
SMALL = {"ranks": (3, 0, 17, 8), "width": 12, "out": 7}


def _with_gaps(tensor: torch.Tensor) -> torch.Tensor:
    """The same values, every second element of larger memory in every dimension."""
    larger = torch.full([2 * size for size in tensor.shape], 99, dtype=tensor.dtype)
    view = larger[tuple(slice(None, None, 2) for _ in tensor.shape)]
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("launch", LAUNCHES)
def test_operands_with_gaps_in_memory_give_the_same_bits(launch, force, make_problem):
    force(launch)
    problem = make_problem(launch, 2, **SMALL)
    leaves = {name: _with_gaps(leaf) for name, leaf in problem.leaves().items() if name != "scaling"}
    other = problem.with_leaves({**leaves, "scaling": problem.stack.scaling_E})
    other = replace(other, ids=_with_gaps(problem.ids))
    assert not any(one.is_contiguous() for one in (*leaves.values(), other.ids))
    assert torch.equal(other.run(), problem.run())
    dy = _with_gaps(torch.randn(problem.base.shape))
    both = [
        torch.autograd.grad(one.run(), list(one.leaves().values()), dy) for one in (problem.trained(), other.trained())
    ]
    assert all(torch.equal(*pair) for pair in zip(*both, strict=True))


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_gradient_without_memory_of_its_own_is_accepted(launch, force, make_problem, error):
    force(launch)
    problem = make_problem(launch, 2, **SMALL)
    trained, exact = problem.trained(), problem.exact()
    found = torch.autograd.grad(trained.run().sum(), list(trained.leaves().values()))  # an expanded 1
    wanted = torch.autograd.grad(exact.run("reference").sum(), list(exact.leaves().values()))
    assert max(error(got, want) for got, want in zip(found, wanted, strict=True)) <= 5e-6


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_gates_of_any_float_dtype_are_read_as_float32(launch, dtype, force, make_problem):
    """Gates keep their dtype: the result is that of the gates as float32, the gradient comes back in their dtype."""
    force(launch)
    problem = make_problem(launch, 2, **SMALL)
    gates = problem.gates.to(dtype)
    assert torch.equal(problem.run(gates=gates), problem.run(gates=gates.float()))
    given, plain = gates.clone().requires_grad_(), gates.float().requires_grad_()
    problem.run(gates=given).square().sum().backward()
    problem.run(gates=plain).square().sum().backward()
    assert given.grad.dtype == dtype
    assert torch.equal(given.grad, plain.grad.to(dtype))


@pytest.mark.parametrize("op", ["grouped", "mixture", "mixture with indices"])
@pytest.mark.parametrize("lead", [(0,), (0, 4), (3, 0)], ids=str)
@pytest.mark.parametrize("with_base", [True, False])
def test_no_rows_or_no_tokens(op, lead, with_base, make_problem):
    stack = make_problem("rows", **SMALL).stack
    x = torch.randn(*lead, 12, requires_grad=True)
    base = torch.randn(*lead, 7, requires_grad=True) if with_base else None
    ids = torch.zeros(lead[:1], dtype=torch.int64)
    if op == "grouped":
        y = grouped_lora(x, stack, ids, base=base, backend="triton")
    elif op == "mixture":
        y = mixture_lora(x, stack, torch.randn(*lead[:1], 4), base=base, backend="triton")
    else:
        y = mixture_lora(x, stack, torch.randn(*lead[:1], 1), ids[:, None], base=base, backend="triton")
    assert y.shape == (*lead, 7)
    assert y.dtype == torch.float32


def test_a_stack_of_rank_zero_leaves_the_base(make_problem):
    problem = make_problem("rows", ranks=(0, 0), width=12, out=7)
    y = problem.run()
    assert torch.equal(y, problem.base)
    assert y.data_ptr() != problem.base.data_ptr()
    assert not problem.run(base=None).any()


@pytest.mark.parametrize("launch", LAUNCHES)
def test_base_is_written_to_only_on_request_and_never_where_gradients_are_wanted(launch, force, make_problem):
    force(launch)
    problem = make_problem(launch, 2, **SMALL)
    before = problem.base.clone()
    y = problem.run()
    assert y.data_ptr() != problem.base.data_ptr()
    for name in problem.leaves():
        trained = problem.trained(name)
        trained = replace(trained, base=problem.base if name != "base" else trained.base)
        kept = trained.run(reuse_base=True)
        assert kept.data_ptr() != trained.base.data_ptr()
        with torch.no_grad():
            assert torch.equal(kept, y)
    assert torch.equal(problem.base, before)
    with torch.no_grad():
        reused = problem.run(reuse_base=True)
    assert reused.data_ptr() == problem.base.data_ptr()
    assert torch.equal(reused, y)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_base_with_gaps_in_memory_is_left_alone(launch, force, make_problem):
    force(launch)
    problem = make_problem(launch, 2, **SMALL)
    base = _with_gaps(problem.base)
    y = problem.run(base=base, reuse_base=True)
    assert torch.equal(base, problem.base)
    assert torch.equal(y, problem.run())


@pytest.mark.parametrize("launch", LAUNCHES)
def test_slots_may_be_loaded_and_emptied_in_place(launch, force, make_problem, error):
    """Live ranks below the capacity, written on the device between two calls with the same stack."""
    force(launch)
    slots = LoraSlots.empty((16, 32, 4, 20), 12, 7)
    problem = replace(make_problem(launch, 2, **SMALL), stack=slots.stack)
    assert torch.equal(problem.run(), problem.base)
    for ranks in ((3, 20, 4, 1), (16, 0, 2, 17)):
        for slot, rank in enumerate(ranks):
            if rank == 0:
                slots.evict(slot)
            elif slots.rank(slot) is None:
                slots.load(slot, torch.randn(rank, 12), torch.randn(7, rank), 0.3 * slot - 0.5)
            else:
                slots.replace(slot, torch.randn(rank, 12), torch.randn(7, rank), 0.3 * slot - 0.5)
        assert slots.stack.index.ranks_E.tolist() == list(ranks)
        assert error(problem.run(), problem.exact().run("reference")) <= 2e-6


@pytest.mark.parametrize("launch", ["rows", "tiles", "tiles sorted"])
def test_rows_beyond_the_live_rank_are_not_read(launch, force, make_problem):
    force(launch)
    problem = make_problem(launch, 2, ranks=(16, 40, 8), width=12, out=7)
    stack = problem.stack
    stack.index.ranks_E.copy_(torch.tensor([5, 33, 0], dtype=torch.int32))
    live = torch.cat([stack.index.position_R[s:e] < r for s, e, r in ((0, 16, 5), (16, 56, 33), (56, 64, 0))])
    stack.a_RD[~live] = float("nan")
    stack.b_RO[~live] = float("nan")
    y = problem.run()
    stack.a_RD[~live] = 0.0
    stack.b_RO[~live] = 0.0
    stack.index.ranks_E.copy_(torch.tensor([16, 40, 8], dtype=torch.int32))
    torch.testing.assert_close(y, problem.run(), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_each_gradient_is_the_same_whatever_else_is_trained(launch, force, make_problem):
    force(launch)
    shape = ((1, 17), (1,)) if launch == "tiles" else ((3,), (3,))
    problem = make_problem(launch, 2, ranks=(3, 0, 5), width=6, out=4, shape=shape)
    everything = problem.trained()
    names = list(everything.leaves())
    dy = torch.randn_like(problem.base)
    gradients = torch.autograd.grad(everything.run(), list(everything.leaves().values()), dy)
    expected = dict(zip(names, gradients, strict=True))
    for chosen in (*([name] for name in names), ["a", "b"], ["x", "gates"], ["x", "a", "b", "scaling", "base"]):
        trained = problem.trained(*chosen)
        found = torch.autograd.grad(trained.run(), [trained.leaves()[name] for name in chosen], dy)
        same = [torch.equal(got, expected[name]) for name, got in zip(chosen, found, strict=True)]
        assert (chosen, same) == (chosen, [True] * len(chosen))


@pytest.mark.parametrize("launch", LAUNCHES)
def test_one_stack_used_twice_in_one_graph_adds_its_gradients(launch, force, make_problem, error):
    force(launch)
    problem = make_problem(launch, 2, ranks=(3, 0, 17), width=12, out=12)
    trained, exact = problem.trained(), problem.exact()
    found, wanted = (
        torch.autograd.grad(one.run(backend, x=one.run(backend)).square().sum(), list(one.leaves().values()))
        for one, backend in ((trained, "triton"), (exact, "reference"))
    )
    assert max(error(got, want) for got, want in zip(found, wanted, strict=True)) <= 1e-5


@pytest.mark.parametrize("launch", LAUNCHES)
@pytest.mark.parametrize(
    ("trained", "saves_x", "saves_products"),
    [(("x",), False, False), (("x", "base"), False, False), (("gates",), False, True), (("a",), True, False),
     (("a", "b"), True, True)],
    ids=str,
)  # fmt: skip
def test_what_is_saved_for_backward(launch, trained, saves_x, saves_products, force, make_problem):
    """A frozen stack keeps neither x nor anything as long as the tokens."""
    force(launch)
    problem = make_problem(launch, 2, width=90, out=91).trained(*trained)
    tokens = problem.x.numel() // 90
    saved: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        problem.run()
    stack = problem.stack
    given = [one.data_ptr() for one in (stack.a_RD, stack.b_RO, *stack.index, stack.scaling_E)]
    own = [one for one in saved if one.numel() and one.data_ptr() not in given]
    x, others = ([one for one in own if (one.data_ptr() == problem.x.data_ptr()) is same] for same in (True, False))
    products = [one for one in others if one.is_floating_point() and one.numel() > 4 * tokens]
    assert (bool(x), bool(products)) == (saves_x, saves_products)
    assert not any(one.shape[-1] in (90, 91) for one in others)


@pytest.mark.parametrize("op", ["grouped", "mixture"])
def test_an_unknown_precision_is_refused(op, make_problem):
    problem = make_problem("rows", 0 if op == "grouped" else 2, **SMALL)
    with pytest.raises(UnknownNameError, match=r"input_precision 'fp32'.*ieee, tf32"):
        problem.run(input_precision="fp32")


def test_tf32_is_accepted(make_problem, force, error):
    force("tiles")
    problem = make_problem("tiles", 2, **SMALL)
    assert error(problem.run(input_precision="tf32"), problem.exact().run("reference")) <= 2e-3


def test_operands_of_different_dtypes_are_refused(make_problem):
    problem = make_problem("rows", **SMALL)
    with pytest.raises(IncompatibleError, match="one dtype"):
        problem.run(x=problem.x.half())


def test_a_plan_keeps_the_sorted_tokens_of_its_ids(make_problem, force):
    force("tiles sorted")
    problem = make_problem("tiles sorted", 0, **SMALL)
    plan, of_none = plan_groups(problem.ids), plan_groups(torch.full_like(problem.ids, -1))
    expected = problem.run()
    assert torch.equal(problem.run(plan=plan), expected)
    assert torch.equal(problem.run(plan=plan), expected)
    replace(problem, ids=of_none.ids).run(plan=of_none)
    plan.tables.update(of_none.tables)  # what the plan holds is what is used
    assert torch.equal(problem.run(plan=plan), problem.base)
