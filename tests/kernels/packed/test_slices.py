"""Several outputs of one input (q, k and v) by one call: the same as a call per slice, values and gradients."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.library import opcheck

from compose.errors import IncompatibleError
from compose.kernels.grouped_lora.op import grouped_lora, plan_groups
from compose.kernels.mixture_lora.op import MixturePlan, mixture_lora
from compose.kernels.packed import launch as launching
from compose.kernels.packed import sliced_op
from compose.kernels.slices import SlicedStack
from compose.kernels.slots import LoraSlots
from compose.kernels.stack import LoraStack

LAUNCHES = ("rows", "dense", "dense long", "tiles", "tiles sorted")
# ranks differ between slices; adapter 1 has no update at all, 3 none in the first slice, 0 none in the last
RANKS = ((3, 0, 17, 0, 8), (1, 0, 2, 40, 8), (0, 0, 16, 5, 3))
WIDTHS = (21, 16, 7)
EVEN = (((16,) * 6,) * 3, (64, 16, 16))


def _stacks(width, dtype=torch.float32, ranks=RANKS, widths=WIDTHS) -> list[LoraStack]:
    """One stack per slice, with scalings of its own."""
    found = []
    for number, (own, out) in enumerate(zip(ranks, widths, strict=True)):
        a = torch.randn(sum(own), width).div(width**0.5).to(dtype)
        b = torch.randn(sum(own), out).div(max(1, sum(own)) ** 0.5).to(dtype)
        found.append(LoraStack(a, b, torch.linspace(-0.7, 2.0 + number, len(own)), own))
    return found


@pytest.fixture
def make_sliced(make_problem):
    """Return a factory of a problem whose stack is sliced, and the stacks it was made of."""

    def make(launch, top=0, dtype=torch.float32, *, ranks=RANKS, widths=WIDTHS, width=37):
        problem = make_problem(launch, top, dtype, ranks=ranks[0], width=width, out=sum(widths))
        stacks = _stacks(width, dtype, ranks, widths)
        return replace(problem, stack=SlicedStack.of(stacks)), stacks

    return make


def _by_slice(problem, stacks, backend="reference", **options) -> torch.Tensor:
    """A call per slice, outputs side by side."""
    widths = [one.b_RO.shape[1] for one in stacks]
    bases = [None] * len(stacks) if problem.base is None else problem.base.split(widths, -1)
    calls = (
        replace(problem, stack=one, base=part).run(backend, **options) for one, part in zip(stacks, bases, strict=True)
    )
    return torch.cat(list(calls), -1)


def _exact(problem, stacks):
    """The same in float64, everything a leaf."""
    exact = [LoraStack(one.a_RD.double().requires_grad_(), one.b_RO.double().requires_grad_(),
                       one.scaling_E.double().requires_grad_(), one.ranks, one.index) for one in stacks]  # fmt: skip
    x, gates, base = (
        None if one is None else one.detach().double().requires_grad_()
        for one in (problem.x, problem.gates, problem.base)
    )
    return replace(problem, x=x, gates=gates, base=base), exact


def _trained(problem):
    old = problem.stack
    a, b, scaling = (one.clone().requires_grad_() for one in (old.a_RD, old.b_flat, old.scaling_SE))
    stack = SlicedStack(a, b, scaling, old.ranks, old.widths)
    x, gates, base = (
        None if one is None else one.clone().requires_grad_() for one in (problem.x, problem.gates, problem.base)
    )
    return replace(problem, x=x, stack=stack, gates=gates, base=base)


def _leaves(problem, stacks=None) -> dict[str, torch.Tensor]:
    """Everything a gradient may reach; factors and scalings of several stacks as lists."""
    found = {name: one for name in ("x", "gates", "base") if (one := getattr(problem, name)) is not None}
    if stacks is None:
        stack = problem.stack
        return {**found, "a": stack.a_RD, "b": stack.b_flat, "scaling": stack.scaling_SE}
    return {**found, **{f"{name} {number}": leaf for number, one in enumerate(stacks)
                        for name, leaf in (("a", one.a_RD), ("b", one.b_RO), ("scaling", one.scaling_E))}}  # fmt: skip


def _joined(grads: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Gradients of several stacks in the shapes of a sliced one."""
    count = sum(name.startswith("a ") for name in grads)
    own = {name: grads[name] for name in ("x", "gates", "base") if name in grads}
    return {
        **own,
        "a": torch.cat([grads[f"a {number}"] for number in range(count)]),
        "b": torch.cat([grads[f"b {number}"].reshape(-1) for number in range(count)]),
        "scaling": torch.stack([grads[f"scaling {number}"] for number in range(count)]),
    }


def _compare(problem, stacks, backend, error, bounds=(2e-6, 5e-6)) -> None:
    trained = _trained(problem)
    exact, exact_stacks = _exact(problem, stacks)
    y, expected = trained.run(backend), _by_slice(exact, exact_stacks)
    assert error(y, expected) <= bounds[0]
    dy = torch.randn_like(y)
    leaves, exact_leaves = _leaves(trained), _leaves(exact, exact_stacks)
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    wanted = torch.autograd.grad(expected, list(exact_leaves.values()), dy.double())
    wanted = _joined(dict(zip(exact_leaves, wanted, strict=True)))
    errors = {name: error(found[name], wanted[name]) for name in leaves}
    assert {name: one for name, one in errors.items() if one > bounds[1]} == {}
    assert [found[name].dtype for name in leaves] == [leaf.dtype for leaf in leaves.values()]


ROUTES = [(launch, top) for launch in LAUNCHES for top in (0, 2)] + [("dense", -1), ("dense long", -1)]


@pytest.mark.parametrize(("launch", "top"), ROUTES)
def test_it_equals_a_call_per_slice_with_all_gradients(launch, top, force, make_sliced, error):
    taken = force(launch)
    problem, stacks = make_sliced(launch, top)
    _compare(problem, stacks, "triton", error)
    assert taken[0] == launch


@pytest.mark.parametrize("launch", LAUNCHES)
def test_float16_equals_a_call_per_slice(launch, force, make_sliced, error):
    force(launch)
    problem, stacks = make_sliced(launch, 2, torch.float16)
    _compare(problem, stacks, "triton", error, (5e-4, 1.5e-3))


@pytest.mark.parametrize("launch", LAUNCHES)
def test_widths_that_fit_blocks_take_the_path_without_masks(launch, force, make_sliced, error):
    force(launch)
    problem, stacks = make_sliced(launch, 2, ranks=EVEN[0], widths=EVEN[1], width=64)
    _compare(problem, stacks, "triton", error)


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("top", [0, 2, -1])
def test_the_other_backends_equal_a_call_per_slice(backend, top, make_sliced, error):
    problem, stacks = make_sliced("rows" if top >= 0 else "dense", top)
    _compare(problem, stacks, backend, error)


@pytest.mark.parametrize("launch", LAUNCHES)
def test_two_kernels_do_all_slices_of_a_forward_pass(launch, force, make_sliced, monkeypatch):
    """One of them reads x; sorted tiles take one more per further slot, as without slices."""
    force(launch)
    started = []
    original = launching.start
    monkeypatch.setattr(
        launching,
        "start",
        lambda kernel, *rest, **more: started.append(kernel.fn.__name__) or original(kernel, *rest, **more),
    )
    problem, _ = make_sliced(launch, 1)
    problem.run()
    assert len(started) == 2
    assert [name.split("_")[1] for name in started] == ["shrink", "expand"]


@pytest.mark.parametrize("launch", LAUNCHES)
def test_without_a_base_there_is_the_update_alone(launch, force, make_sliced, error):
    force(launch)
    problem, stacks = make_sliced(launch, 2)
    bare = replace(problem, base=None)
    exact, exact_stacks = _exact(bare, stacks)
    assert error(bare.run(), _by_slice(exact, exact_stacks)) <= 2e-6


def test_the_result_takes_the_memory_of_its_base_only_on_request(force, make_sliced):
    force("rows")
    problem, _ = make_sliced("rows")
    before = problem.base.clone()
    y = problem.run()
    assert torch.equal(problem.base, before)
    reused = problem.run(reuse_base=True)
    assert reused.data_ptr() == problem.base.data_ptr()
    assert torch.equal(reused, y)


def test_gradients_are_computed_for_what_wants_them_alone(force, make_sliced):
    """Frozen factors with trained gates: what is saved holds no x and no z."""
    force("tiles sorted")
    problem, _ = make_sliced("tiles sorted", 2)
    full = _trained(problem)
    y = full.run()
    dy = torch.randn_like(y)
    (expected,) = torch.autograd.grad(y, [full.gates], dy)
    gates = problem.gates.clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: saved.append(one) or one, lambda one: one):
        alone = problem.run(gates=gates)
    (found,) = torch.autograd.grad(alone, [gates], dy)
    assert torch.equal(found, expected)
    assert not any(one.numel() == problem.x.numel() and one.data_ptr() == problem.x.data_ptr() for one in saved)


def test_parameters_are_combined_slice_by_slice(make_sliced, error):
    problem, stacks = make_sliced("dense", -1)
    expected = _by_slice(problem, stacks, "reference", combine="parameters")
    assert error(problem.run("auto", combine="parameters"), expected.double()) <= 2e-6


@pytest.mark.parametrize("launch", LAUNCHES)
def test_torch_accepts_both_operators(launch, force, make_sliced, monkeypatch):
    force(launch)
    calls = {}
    for name in ("_sliced_lora", "_sliced_lora_backward"):
        original = getattr(sliced_op, name)
        monkeypatch.setattr(
            sliced_op, name, lambda *args, n=name, f=original: calls.update({n: (f, args)}) or f(*args)
        )
    problem, _ = make_sliced(launch, 2)
    trained = _trained(problem)
    torch.autograd.grad(trained.run(), list(_leaves(trained).values()), torch.ones_like(problem.base))
    for name in calls:
        opcheck(*calls[name], test_utils=("test_schema", "test_faketensor"))
    opcheck(*calls["_sliced_lora"], test_utils="test_autograd_registration")
    assert len(calls) == 2


@pytest.mark.filterwarnings("ignore")  # of the compiler about its own parts
def test_compiled_without_a_break_it_computes_the_same(force, make_sliced, error):
    force("tiles sorted")
    problem, _ = make_sliced("tiles sorted", 2)
    trained = _trained(problem)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, base: trained.run(x=x * 2, base=base), fullgraph=True, backend="aot_eager")
    y, expected = compiled(trained.x, trained.base), trained.run(x=trained.x * 2)
    assert error(y, expected.double()) <= 1e-6
    dy = torch.randn_like(y)
    leaves = list(_leaves(trained).values())
    for got, want in zip(*(torch.autograd.grad(one, leaves, dy) for one in (y, expected)), strict=True):
        assert error(got, want.double()) <= 1e-6


def test_plans_serve_all_slices(make_sliced):
    problem, _ = make_sliced("rows")
    plan = plan_groups(problem.ids)
    for backend in ("cpu", "triton"):
        assert torch.equal(problem.run(backend, plan=plan), problem.run(backend))
    problem, _ = make_sliced("rows", 2)
    for backend in ("cpu", "triton"):
        assert torch.equal(problem.run(backend, plan=MixturePlan()), problem.run(backend))


def test_autocast_casts_it_once(make_sliced, force):
    force("rows")
    problem, _ = make_sliced("rows")
    with torch.autocast("cpu", torch.float16):
        y = problem.run()
    cast = problem.stack.cast(torch.float16)
    assert cast is problem.stack.cast(torch.float16)
    assert torch.equal(y, replace(problem, x=problem.x.half(), stack=cast, base=problem.base.half()).run())
    problem.stack.a_RD.mul_(2)
    assert problem.stack.cast(torch.float16) is not cast


@pytest.mark.parametrize("launch", LAUNCHES)
def test_a_slot_of_a_slice_is_written_in_place(launch, force, make_sliced, error):
    force(launch)
    problem, stacks = make_sliced(launch)
    problem.run()
    slots = LoraSlots(problem.stack.slices[0])
    a, b = torch.randn(5, 37), torch.randn(21, 5)
    slots.replace(2, a, b, scaling=1.5)
    changed = [one.a_RD for one in stacks]
    first, rank = stacks[0].offsets[2], stacks[0].ranks[2]
    changed[0] = stacks[0].a_RD.clone()
    changed[0][first : first + rank] = torch.cat([a, torch.zeros(rank - 5, 37)])
    ups = stacks[0].b_RO.clone()
    ups[first : first + rank] = torch.cat([b.T, torch.zeros(rank - 5, 21)])
    scaling = stacks[0].scaling_E.clone()
    scaling[2] = 1.5
    expected = [LoraStack(changed[0], ups, scaling, stacks[0].ranks), *stacks[1:]]
    assert problem.stack.live_SE[0, 2] == 5
    assert error(problem.run(), _by_slice(problem, expected).double()) <= 2e-6


def test_slices_are_views_that_gradients_pass_through():
    stacks = _stacks(8)
    trained = [LoraStack(one.a_RD.requires_grad_(), one.b_RO.requires_grad_(), one.scaling_E, one.ranks)
               for one in stacks]  # fmt: skip
    fused = SlicedStack.of(trained)
    ids = torch.tensor([0, 2, 3])
    grouped_lora(torch.randn(3, 8), fused, ids, backend="cpu").square().sum().backward()
    assert all(one.a_RD.grad is not None and one.b_RO.grad.any() for one in trained)
    frozen = SlicedStack.of(_stacks(8))
    assert frozen.slices is frozen.slices
    assert frozen.slices[1].a_RD.data_ptr() == frozen.a_RD[sum(RANKS[0])].data_ptr()


def test_stacks_that_do_not_fit_are_refused():
    first, second, third = _stacks(8)
    wider = _stacks(9)[1]
    fewer = LoraStack(torch.randn(2, 8), torch.randn(2, 4), torch.ones(1), (2,))
    for stacks in ([first, wider, third], [first, fewer], []):
        with pytest.raises(IncompatibleError, match="slices need one input width and the same adapters"):
            SlicedStack.of(stacks)
    whole = SlicedStack.of([first, second, third])
    with pytest.raises(IncompatibleError, match=r"got a \(.*\), b \("):
        SlicedStack(whole.a_RD, whole.b_flat[1:], whole.scaling_SE, whole.ranks, whole.widths)
    with pytest.raises(IncompatibleError, match="one width and one list of ranks per slice"):
        SlicedStack(whole.a_RD, whole.b_flat, whole.scaling_SE, whole.ranks, whole.widths[1:])


@pytest.mark.parametrize("backend", ["triton", "cpu", "reference"])
def test_a_base_of_the_wrong_width_is_refused(backend):
    fused = SlicedStack.of(_stacks(8))
    x, ids = torch.randn(3, 8), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(IncompatibleError, match=r"base must be \(3, 44\)"):
        grouped_lora(x, fused, ids, base=torch.randn(3, 21), backend=backend)
    with pytest.raises(IncompatibleError, match=r"x must be \(B, 8\)"):
        mixture_lora(torch.randn(3, 9), fused, torch.ones(5), backend=backend)
