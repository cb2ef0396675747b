from __future__ import annotations

import pytest
import torch

from compose.errors import IncompatibleError, UnknownNameError
from compose.kernels.grouped_lora.op import BACKENDS, grouped_lora, plan_groups
from compose.kernels.stack import LoraStack

CASES = {
    "rows": ((6, 5, 13), (6,)),
    "rows without tokens": ((6, 13), (6,)),
    "tokens": ((6, 5, 13), (6, 5)),
    "one token": ((6, 1, 13), (6,)),
    "one row": ((1, 9, 13), (1,)),
    "no tokens": ((3, 0, 13), (3,)),
    "no rows": ((0, 4, 13), (0,)),
    "many entries of few adapters": ((150, 1, 13), (150,)),
}


def _problem(name: str, *, differentiable: bool = False) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    x_shape, ids_shape = CASES[name]
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=differentiable)
    base = torch.randn(*x_shape[:-1], 7, dtype=torch.float64, requires_grad=differentiable)
    return x, torch.randint(-1, 5, ids_shape), base


def test_reference_equals_a_hand_calculation():
    # A_0 = [1 2], B_0 = [3], s_0 = 2; A_1 = [0 1], B_1 = [1], s_1 = 10; x = (1, 1): 2·3·(1+2) = 18 and 10·1·1 = 10
    stack = LoraStack(
        torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0], [1.0]]), torch.tensor([2.0, 10.0]), (1, 1)
    )
    x, base = torch.ones(3, 2), torch.tensor([[0.5], [0.5], [0.5]])
    y = grouped_lora(x, stack, torch.tensor([1, 0, -1]), base=base, backend="reference")
    torch.testing.assert_close(y, torch.tensor([[10.5], [18.5], [0.5]]))


@pytest.mark.parametrize("given_base", [True, False], ids=["base", "no base"])
@pytest.mark.parametrize("ranks", [(3, 0, 8, 1, 16), (4, 4, 4, 4, 4), (0, 0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("name", CASES)
def test_forward_equals_the_reference(make_stack, name, ranks, given_base):
    x, ids, base = _problem(name)
    stack, base = make_stack(ranks), base if given_base else None
    expected = grouped_lora(x, stack, ids, base=base, backend="reference")
    torch.testing.assert_close(grouped_lora(x, stack, ids, base=base), expected)
    torch.testing.assert_close(grouped_lora(x, stack, ids, base=base, plan=plan_groups(ids)), expected)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("name", CASES)
def test_every_gradient_equals_the_reference(make_stack, same_gradients, name, trained):
    x, ids, base = _problem(name, differentiable=True)
    stack = make_stack(trained=trained)
    leaves = [x, base, *((stack.a_RD, stack.b_RO, stack.scaling_E) if trained else ())]
    expected = torch.autograd.grad(
        grouped_lora(x, stack, ids, base=base, backend="reference").square().sum(), leaves, allow_unused=True
    )
    y = grouped_lora(x, stack, ids, base=base)
    actual = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    same_gradients(actual, expected, leaves)


def test_gradients_equal_numerical_ones(make_stack):
    stack = make_stack((2, 0, 1), width=3, out=2, trained=True)
    scaling = stack.scaling_E.detach().double().requires_grad_()
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    ids = torch.tensor([2, 0, -1, 0])

    def run(x, a, b, scaling):
        return grouped_lora(x, LoraStack(a, b, scaling, stack.ranks), ids)

    assert torch.autograd.gradcheck(run, (x, stack.a_RD, stack.b_RO, scaling))


def test_renaming_adapters_changes_nothing(make_stack):
    stack, order = make_stack(), [4, 2, 0, 3, 1]
    renamed = LoraStack(
        torch.cat([stack.factors(e)[0] for e in order]),
        torch.cat([stack.factors(e)[1] for e in order]),
        stack.scaling_E[order],
        tuple(stack.ranks[e] for e in order),
    )
    x, ids, base = _problem("tokens")
    new_ids = torch.tensor([order.index(e) for e in range(5)] + [-1])[ids]
    torch.testing.assert_close(grouped_lora(x, renamed, new_ids, base=base), grouped_lora(x, stack, ids, base=base))


@pytest.mark.parametrize("ids", [[0, 0, 0], [2, 2, 2], [0, 2, -1]], ids=str)
def test_base_is_never_written_to_and_the_result_is_new_memory(make_stack, ids):
    x, base = torch.randn(3, 2, 13, dtype=torch.float64), torch.randn(3, 2, 7, dtype=torch.float64)
    for ranks in ((3, 0, 8), (0, 0, 0)):
        before = base.clone()
        y = grouped_lora(x, make_stack(ranks), torch.tensor(ids), base=base)
        y.fill_(9.0)
        torch.testing.assert_close(base, before, rtol=0, atol=0)


def test_giving_up_base_gives_the_same_values(make_stack):
    x, ids, base = _problem("rows")
    expected = grouped_lora(x, make_stack(), ids, base=base)
    for backend in ("auto", "reference"):
        y = grouped_lora(x, make_stack(), ids, base=base.clone(), backend=backend, reuse_base=True)
        torch.testing.assert_close(y, expected)


def test_input_with_gaps_in_memory_is_accepted(make_stack):
    x = torch.randn(13, 5, 12, dtype=torch.float64).permute(2, 1, 0)[::2]
    base = torch.randn(7, 6, 5, dtype=torch.float64).permute(1, 2, 0)
    for ids in (torch.randint(-1, 5, (6,)), torch.randint(-1, 5, (6, 10))[:, ::2], torch.full((6,), 2)):
        expected = grouped_lora(
            x.contiguous(), make_stack(), ids.contiguous(), base=base.contiguous(), backend="reference"
        )
        torch.testing.assert_close(grouped_lora(x, make_stack(), ids, base=base), expected)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.float16, 2e-3), (torch.bfloat16, 1.5e-2)], ids=str
)
def test_low_precision_stays_near_float64_on_the_same_rounded_inputs(make_stack, dtype, bound):
    # three roundings (h, scaled h, y) of relative size 2^-24, 2^-11, 2^-8 each
    stack = make_stack((8,) * 5, width=64, out=48, dtype=dtype)
    exact = LoraStack(stack.a_RD.double(), stack.b_RO.double(), stack.scaling_E, stack.ranks)
    x, ids = torch.randn(6, 5, 64).to(dtype), torch.tensor([0, 1, 2, 3, 4, -1])
    y = grouped_lora(x, stack, ids)
    expected = grouped_lora(x.double(), exact, ids, backend="reference")
    assert y.dtype == dtype
    assert (y.double() - expected).norm() <= bound * expected.norm()


def test_autocast_casts_everything(make_stack):
    stack = make_stack(dtype=torch.float32)
    x, ids, base = torch.randn(6, 5, 13), torch.randint(-1, 5, (6,)), torch.randn(6, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = grouped_lora(x, stack, ids, base=base)
    cast = stack.cast(torch.bfloat16)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, grouped_lora(x.bfloat16(), cast, ids, base=base.bfloat16()))


@pytest.mark.parametrize("planned", [True, False], ids=["plan", "no plan"])
@pytest.mark.parametrize("name", ["rows", "tokens"])
def test_compiles_to_one_graph_with_the_same_values_and_gradients(make_stack, same_gradients, name, planned):
    torch._dynamo.reset()
    stack, (x, ids, base) = make_stack(trained=True), _problem(name, differentiable=True)
    plan = plan_groups(ids) if planned else None

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: torch.Tensor, ids: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return grouped_lora(x, stack, ids, base=base, plan=plan)

    leaves = (x, base, stack.a_RD, stack.b_RO, stack.scaling_E)
    expected = grouped_lora(x, stack, ids, base=base, backend="reference")
    y = run(x, ids, base)
    torch.testing.assert_close(y, expected)
    gradients = [torch.autograd.grad(result.square().sum(), leaves) for result in (y, expected)]
    same_gradients(*gradients, leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 5, 12)}, r"\(B, 13\) or \(B, T, 13\)"),
        ({"x": torch.zeros(13)}, r"got \(13,\)"),
        ({"x": torch.zeros(6, 5, 13, dtype=torch.float64)}, "one dtype"),
        ({"base": torch.zeros(6, 5, 8)}, r"base must be \(6, 5, 7\)"),
        ({"base": torch.zeros(6, 5, 7, dtype=torch.float64)}, "float64"),
        ({"ids": torch.zeros(5, dtype=torch.int64)}, r"\(6,\) or \(6, 5\)"),
        ({"ids": torch.zeros(6, 5, 1, dtype=torch.int64)}, "int64"),
        ({"ids": torch.zeros(6, dtype=torch.int32)}, "int32"),
        ({"ids": torch.tensor([0, 1, 2, 3, 4, 5])}, "id 5 is out of range; allowed are -1"),
        ({"ids": torch.tensor([0, 1, 2, 3, 4, -2])}, "id -2 is out of range"),
        ({"plan": plan_groups(torch.tensor([5] * 6))}, "id 5 is out of range"),
        ({"plan": plan_groups(torch.tensor([0]))}, "plan again"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_operands_that_do_not_fit_are_refused(make_stack, change, message):
    operands = {
        "x": torch.zeros(6, 5, 13),
        "ids": torch.zeros(6, dtype=torch.int64),
        "base": None,
        "plan": None,
    } | change
    with pytest.raises(IncompatibleError, match=message):
        grouped_lora(stack=make_stack(dtype=torch.float32), **operands)


def test_ids_per_token_need_tokens(make_stack):
    with pytest.raises(IncompatibleError, match="must be"):
        grouped_lora(torch.zeros(6, 13), make_stack(dtype=torch.float32), torch.zeros(6, 13, dtype=torch.int64))


def test_an_unknown_backend_is_named(make_stack):
    with pytest.raises(UnknownNameError, match="'gpu'; known: auto, triton, cpu, reference"):
        grouped_lora(
            torch.zeros(2, 13), make_stack(dtype=torch.float32), torch.zeros(2, dtype=torch.int64), backend="gpu"
        )


@pytest.mark.parametrize("name", BACKENDS)
def test_every_backend_gives_the_same_result(make_stack, name):
    x, ids, base = _problem("rows")
    x, base, stack = x.float(), base.float(), make_stack(dtype=torch.float32)
    expected = grouped_lora(x, stack, ids, base=base)
    torch.testing.assert_close(grouped_lora(x, stack, ids, base=base, backend=name), expected)
