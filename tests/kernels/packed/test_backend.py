"""How torch and the ops' choice of backends see the packed kernels: operators, torch.compile, autocast, messages."""

from __future__ import annotations

import logging
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.library import opcheck

from compose.errors import BackendUnavailableError
from compose.kernels import checks
from compose.kernels.grouped_lora.op import grouped_lora
from compose.kernels.packed import front, op, tuning

LAUNCHES = ("rows", "dense", "dense long", "tiles", "tiles sorted")
SMALL = {"ranks": (3, 0, 17, 8), "width": 12, "out": 7}


@pytest.mark.parametrize("launch", LAUNCHES)
def test_torch_accepts_both_operators(launch, force, make_problem, monkeypatch):
    force(launch)
    calls = {}
    for name in ("_packed_lora", "_packed_lora_backward"):
        original = getattr(op, name)
        monkeypatch.setattr(op, name, lambda *args, n=name, f=original: calls.update({n: (f, args)}) or f(*args))
    problem = make_problem(launch, 2, **SMALL)
    problem = replace(problem, gates=problem.gates.half()).trained()
    torch.autograd.grad(problem.run(), list(problem.leaves().values()), torch.ones_like(problem.base))
    for wanted in ([True] * 5, [True, False, False, False, False]):
        forward, backward = calls["_packed_lora"], calls["_packed_lora_backward"]
        opcheck(forward[0], (*forward[1][:-1], wanted[1]), test_utils=("test_schema", "test_faketensor"))
        opcheck(backward[0], (*backward[1][:-1], wanted), test_utils=("test_schema", "test_faketensor"))
    opcheck(*calls["_packed_lora"], test_utils="test_autograd_registration")


@pytest.mark.filterwarnings("ignore")  # of the compiler about its own parts
@pytest.mark.parametrize("launch", LAUNCHES)
def test_compiled_without_a_break_it_computes_the_same(launch, force, make_problem, error):
    force(launch)
    problem = make_problem(launch, 2, **SMALL).trained()
    leaves = list(problem.leaves().values())

    def step(x, base, gates):
        return problem.run(x=x * 2, base=base, gates=gates).relu()

    torch.compiler.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    operands = (problem.x, problem.base, problem.gates)
    y, expected = compiled(*operands), step(*operands)
    assert error(y, expected) <= 1e-6
    dy = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(one, leaves, dy) for one in (y, expected))
    assert max(error(got, want) for got, want in zip(found, wanted, strict=True)) <= 1e-6
    with torch.no_grad():
        assert error(compiled(*operands), expected) <= 1e-6


@pytest.mark.filterwarnings("ignore")  # of the compiler about its own parts
def test_a_look_up_in_tables_does_not_break_the_graph(force, make_problem, monkeypatch, error):
    """On a GPU it asks for the device's name and reads files, which the compiler cannot trace."""
    force("tiles sorted")
    read = []
    monkeypatch.setattr(tuning, "_measured", lambda *given: read.append(Path(__file__).read_text()[:1]) or None)
    tuning.forget()
    problem = make_problem("tiles sorted", 2, **SMALL)
    torch.compiler.reset()
    compiled = torch.compile(lambda x: problem.run(x=x * 2), fullgraph=True, backend="aot_eager")
    assert error(compiled(problem.x), problem.run(x=problem.x * 2)) <= 1e-6
    assert read
    tuning.forget()


@pytest.mark.filterwarnings("ignore")  # of the compiler about its own parts
def test_compiled_it_takes_any_number_of_rows_without_a_compilation_for_each(force, make_problem, error):
    force("rows")
    problem = make_problem("rows", 0, shape=((12,), (12,)), **SMALL)
    torch.compiler.reset()

    def step(x, ids, base):
        return grouped_lora(x, problem.stack, ids, base=base, backend="triton")

    compilations = []

    def count(graph, inputs):
        compilations.append(graph)
        return graph.forward

    compiled = torch.compile(step, fullgraph=True, backend=count)
    for rows in (12, 5, 7, 9):
        part = problem.rows(slice(0, rows))
        assert error(compiled(part.x, part.ids, part.base), part.run()) <= 1e-6
    assert len(compilations) == 2  # the first, and one with a size that may change


@pytest.mark.parametrize("launch", LAUNCHES)
def test_autocast_equals_a_cast_by_hand(launch, force, make_problem):
    force(launch)
    problem = make_problem(launch, 2, **SMALL)
    with torch.autocast("cpu", torch.float16):
        y = problem.run()
    leaves = {
        name: leaf.half() if name in ("x", "a", "b", "base") else leaf for name, leaf in problem.leaves().items()
    }
    assert y.dtype == torch.float16
    assert torch.equal(y, problem.with_leaves(leaves).run())


def test_gradients_under_autocast_come_back_in_the_dtype_of_their_leaves(force, make_problem, error):
    force("dense")
    problem = make_problem("dense", 2, **SMALL)
    trained, exact = problem.trained(), problem.exact()
    with torch.autocast("cpu", torch.float16):
        y = trained.run()
    dy = torch.randn(y.shape).half()
    found = torch.autograd.grad(y, list(trained.leaves().values()), dy)
    wanted = torch.autograd.grad(exact.run("reference"), list(exact.leaves().values()), dy.double())
    assert {got.dtype for got in found} == {torch.float32}
    assert max(error(got, want) for got, want in zip(found, wanted, strict=True)) <= 2e-3


@pytest.mark.parametrize("top", [0, 2], ids=["grouped", "mixture"])
@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("float64", r"float16, bfloat16 or float32, not in torch\.float64"),
        ("bfloat16", "interpreter computes bfloat16 products wrongly"),
        ("rank", "ranks up to 256, not 257"),
        ("no device", "runs on CUDA devices, not on cpu"),
        ("not installed", r"pip install 'adapter-compose\[triton\]'"),
    ],
)
def test_a_backend_asked_for_by_name_that_cannot_run_says_why(top, case, reason, make_problem, monkeypatch):
    ranks = (257, 1) if case == "rank" else SMALL["ranks"]
    dtype = getattr(torch, case) if case.startswith(("float", "bfloat")) else torch.float32
    problem = make_problem("rows", top, dtype, **{**SMALL, "ranks": ranks})
    if case == "no device":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
    if case == "not installed":
        monkeypatch.setattr(front, "_INSTALLED", False)
    with pytest.raises(BackendUnavailableError, match=f"backend 'triton' cannot run here: .*{reason}.*backend='auto'"):
        problem.run()
    assert torch.isfinite(problem.run("auto")).all()


@pytest.mark.parametrize("top", [0, 2], ids=["grouped", "mixture"])
def test_auto_takes_another_backend_on_the_cpu_and_says_so_once(top, make_problem, caplog, force):
    taken = force("rows")
    checks._log_once.cache_clear()
    problem = make_problem("rows", top, **SMALL)
    with caplog.at_level(logging.INFO, logger="compose.kernels"):
        first = problem.run("auto")
        problem.run("auto")
    assert taken == []
    name = "grouped_lora" if top == 0 else "mixture_lora"
    message = f"{name}: backend 'triton' is not used: the operands are not on a CUDA device"
    assert [record.getMessage() for record in caplog.records if "triton" in record.getMessage()] == [message]
    assert torch.equal(first, problem.run("cpu"))
