"""Values and gradients of the Triton kernels on the GPU against float64."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.packed import op

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.usefixtures("poisoned_memory"),
]

FORWARD = {torch.bfloat16: 4e-3, torch.float16: 5e-4, torch.float32: 2e-6}
GRADIENTS = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 5e-6}
EVERY_LAUNCH = (
    "rows, mixed ranks, odd widths",
    "dense, top 2, odd widths",
    "dense, long, R > 256, top 2, odd widths",
    "tiles, few tokens, top 2, odd widths",
    "tiles, sorted, top 4, mixed ranks, odd widths",
)


def _compare_gradients(problem, float64_twin, frobenius_error, bound: dict) -> None:
    """Value and all gradients for one random gradient of the result."""
    trained, exact = problem.trained(), problem.exact()
    y, expected = trained.run(), float64_twin(exact)
    assert frobenius_error(y.detach(), expected.detach()) <= FORWARD[y.dtype]
    dy = torch.randn_like(y)
    found = torch.autograd.grad(y, list(trained.leaves().values()), dy)
    wanted = torch.autograd.grad(expected, list(exact.leaves().values()), dy.double())
    errors = {
        name: frobenius_error(got, want) for name, got, want in zip(trained.leaves(), found, wanted, strict=True)
    }
    assert {name: error for name, error in errors.items() if error > bound[y.dtype]} == {}
    assert [got.dtype for got in found] == [leaf.dtype for leaf in trained.leaves().values()]


def test_bfloat16_values_and_gradients_equal_float64(case, make_problem, float64_twin, frobenius_error):
    _compare_gradients(make_problem(case, torch.bfloat16), float64_twin, frobenius_error, GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("name", EVERY_LAUNCH)
def test_float32_and_float16_gradients_equal_float64(name, dtype, cases, make_problem, float64_twin, frobenius_error):
    _compare_gradients(make_problem(cases[name], dtype), float64_twin, frobenius_error, GRADIENTS)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(
    "name",
    ["rows", "dense, ids", "dense, long, gates", "dense, long, R > 128", "tiles, ids per example",
     "tiles, sorted, top 2"],
)  # fmt: skip
def test_float32_and_float16_values_equal_float64(name, dtype, cases, make_problem, float64_twin, frobenius_error):
    problem = make_problem(cases[name], dtype)
    for base in (problem.base, None):
        given = make_problem(cases[name], dtype).__class__(problem.x, problem.stack, problem.ids, problem.gates, base)
        assert frobenius_error(given.run(), float64_twin(given.exact()).detach()) <= FORWARD[dtype]


@pytest.mark.parametrize("name", ["dense, ids", "dense, long, gates", "tiles, sorted"])
def test_tf32_is_looser_and_only_on_request(name, cases, make_problem, float64_twin, frobenius_error):
    problem = make_problem(cases[name], torch.float32)
    expected = float64_twin(problem.exact()).detach()
    assert 1e-5 < frobenius_error(problem.run(input_precision="tf32"), expected) <= 2e-3


def test_the_cases_reach_the_launch_shapes_they_are_for(case, make_problem, monkeypatch):
    seen = []
    original = op.low_rank

    def spy(x, first, second, packed, route, *rest, **options):
        seen.append((route.shape, route.long, route.table is not None))
        return original(x, first, second, packed, route, *rest, **options)

    monkeypatch.setattr(op, "low_rank", spy)
    problem = make_problem(case, torch.bfloat16)
    assert torch.isfinite(problem.run()).all()
    assert seen == [case.launch]


@pytest.mark.parametrize("name", EVERY_LAUNCH)
def test_without_any_adapter_the_result_is_the_base(name, cases, make_problem):
    problem = make_problem(cases[name], torch.bfloat16)
    problem.ids.fill_(-1)
    assert torch.equal(problem.run(), problem.base)
    assert not problem.run(base=None).any()


@pytest.mark.parametrize("name", EVERY_LAUNCH)
def test_all_tokens_may_have_one_adapter(name, cases, make_problem, float64_twin, frobenius_error):
    problem = make_problem(cases[name], torch.bfloat16)
    problem.ids.fill_(4)  # the adapter of rank 128
    assert frobenius_error(problem.run(), float64_twin(problem.exact()).detach()) <= FORWARD[torch.bfloat16]


def test_the_result_takes_the_memory_of_its_base_only_on_request(case, make_problem):
    problem = make_problem(case, torch.bfloat16)
    before = problem.base.clone()
    y = problem.run()
    assert torch.equal(problem.base, before)
    reused = problem.run(reuse_base=True)
    assert reused.data_ptr() == problem.base.data_ptr()
    assert torch.equal(reused, y)
