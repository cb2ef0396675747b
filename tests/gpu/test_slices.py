"""Sliced stacks on the GPU: values and gradients against a float64 call per slice, bits, graphs, torch.compile."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from compose.kernels.slices import SlicedStack
from compose.kernels.stack import LoraStack

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

NAMES = (
    "rows",
    "rows, top 2",
    "rows, mixed ranks, odd widths",
    "dense, ids",
    "dense, gates",
    "dense, top 2, odd widths",
    "dense, long, gates",
    "dense, long, R > 128",
    "dense, long, R > 256, top 2, odd widths",
    "tiles, ids per example",
    "tiles, few tokens, top 2, odd widths",
    "tiles, sorted",
    "tiles, sorted, top 2",
    "tiles, sorted, top 4, mixed ranks, odd widths",
)
FORWARD = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
GRADIENTS = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 5e-6}


@pytest.fixture
def make_sliced(cases, make_problem):
    """Return a factory of a problem of three slices, and its parts: the same x, ids and gates, other factors."""

    def make(name, dtype=torch.bfloat16):
        case = cases[name]
        widths = (case.out, 256, 256) if case.out % 16 == 0 else (case.out, 77, 130)
        ranks = (case.ranks, tuple(reversed(case.ranks)), case.ranks)
        parts = [
            make_problem(replace(case, out=out, ranks=own), dtype, seed=seed)
            for seed, (out, own) in enumerate(zip(widths, ranks, strict=True))
        ]
        first = parts[0]
        parts = [replace(one, x=first.x, ids=first.ids, gates=first.gates) for one in parts]
        whole = replace(
            first,
            stack=SlicedStack.of([one.stack for one in parts]),
            base=torch.cat([one.base for one in parts], -1),
        )
        return whole, parts

    return make


def _leaves(problem) -> dict[str, torch.Tensor]:
    stack = problem.stack
    named = {"x": problem.x, "a": stack.a_RD, "b": stack.b_flat, "scaling": stack.scaling_SE, "gates": problem.gates,
             "base": problem.base}  # fmt: skip
    return {name: leaf for name, leaf in named.items() if leaf is not None}


def _trained(problem):
    leaves = {name: leaf.detach().clone().requires_grad_() for name, leaf in _leaves(problem).items()}
    stack = SlicedStack(leaves["a"], leaves["b"], leaves["scaling"], problem.stack.ranks, problem.stack.widths)
    return replace(problem, x=leaves["x"], stack=stack, gates=leaves.get("gates"), base=leaves["base"])


def _expected(parts, float64_twin, dy=None):
    """The float64 result of a call per slice, and all gradients, in the shapes of a sliced stack."""
    x, gates = (
        None if one is None else one.detach().double().requires_grad_() for one in (parts[0].x, parts[0].gates)
    )
    exact = [replace(one.exact(), x=x, gates=gates) for one in parts]
    y = torch.cat([float64_twin(one) for one in exact], -1)
    if dy is None:
        return y.detach(), {}
    leaves = [leaf for leaf in (x, gates) if leaf is not None]
    for one in exact:
        leaves += [one.stack.a_RD, one.stack.b_RO, one.stack.scaling_E, one.base]
    found = list(torch.autograd.grad(y, leaves, dy.double()))
    named = {"x": found.pop(0)}
    if gates is not None:
        named["gates"] = found.pop(0)
    a, b, scaling, base = found[::4], found[1::4], found[2::4], found[3::4]
    return y.detach(), {**named, "a": torch.cat(a), "b": torch.cat([one.reshape(-1) for one in b]),
                        "scaling": torch.stack(scaling), "base": torch.cat(base, -1)}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_bfloat16_equals_a_call_per_slice_with_all_gradients(name, make_sliced, float64_twin, frobenius_error,
                                                             poisoned_memory):  # fmt: skip
    problem, parts = make_sliced(name)
    trained = _trained(problem)
    y = trained.run()
    dy = torch.randn_like(y)
    leaves = _leaves(trained)
    # ours first: where cuBLAS is the first thing a new thread of autograd calls, torch warns, and warnings are errors
    found = dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))
    expected, wanted = _expected(parts, float64_twin, dy)
    assert frobenius_error(y.detach(), expected) <= FORWARD[torch.bfloat16]
    errors = {key: float((found[key].double() - wanted[key]).norm() / wanted[key].norm()) for key in leaves}
    assert {key: one for key, one in errors.items() if not one <= 1.5 * GRADIENTS[torch.bfloat16]} == {}
    # dx is rounded to bfloat16 once per slice, hence the half more
    with torch.no_grad():
        assert torch.equal(problem.run(), y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name", ["rows", "dense, ids", "dense, long, gates", "tiles, ids per example", "tiles, sorted"]
)
def test_float32_and_float16_equal_a_call_per_slice(name, dtype, make_sliced, float64_twin, frobenius_error):
    problem, parts = make_sliced(name, dtype)
    expected, _ = _expected(parts, float64_twin)
    assert frobenius_error(problem.run(), expected) <= FORWARD[dtype]


@pytest.mark.parametrize("name", ["rows", "rows, top 2", "dense, ids"])
def test_a_row_alone_has_the_bits_it_has_in_a_batch(name, make_sliced):
    problem, _ = make_sliced(name)
    expected = problem.run()
    for rows in (slice(0, 1), slice(7, 9), slice(3, 70)):
        assert torch.equal(problem.rows(rows).run(), expected[rows])


@pytest.mark.parametrize("name", ["rows", "dense, ids", "tiles, sorted, top 2"])
def test_a_replayed_graph_follows_operands_that_changed_in_place(name, make_sliced):
    problem, _ = make_sliced(name)
    problem.run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = problem.run()
    problem.x.normal_()
    problem.ids.copy_(problem.ids.flip(0))
    a, b = problem.stack.slices[1].factors(3)
    a.normal_(std=0.02)
    b.normal_()
    problem.stack.scaling_SE[1, 3] = 0.5
    graph.replay()
    assert torch.equal(y, problem.run())


@pytest.mark.filterwarnings("ignore")  # of the compiler about its own parts
@pytest.mark.parametrize("name", ["rows, top 2", "dense, long, R > 128", "tiles, sorted, top 2"])
def test_compiled_without_a_break_it_computes_the_same(name, make_sliced, frobenius_error):
    problem, _ = make_sliced(name)
    trained = _trained(problem)
    torch.compiler.reset()
    compiled = torch.compile(lambda x, base: trained.run(x=x * 2, base=base).float(), fullgraph=True)
    y, expected = compiled(trained.x, trained.base), trained.run(x=trained.x * 2).float()
    assert frobenius_error(y.detach(), expected.detach().double()) <= 1e-5
    leaves, dy = list(_leaves(trained).values()), torch.randn_like(y)
    for got, want in zip(*(torch.autograd.grad(one, leaves, dy) for one in (y, expected)), strict=True):
        assert float((got.double() - want.double()).norm() / want.double().norm()) <= 6e-3


def test_slices_are_the_stacks_they_were_made_of(make_sliced):
    problem, parts = make_sliced("rows")
    for mine, theirs in zip(problem.stack.slices, parts, strict=True):
        assert isinstance(mine, LoraStack)
        assert torch.equal(mine.a_RD, theirs.stack.a_RD)
        assert torch.equal(mine.b_RO, theirs.stack.b_RO)
