from __future__ import annotations

import pytest
import torch

from compose.errors import BackendUnavailableError, IncompatibleError, UnknownNameError
from compose.kernels.mixture_lora.op import BACKENDS, mixture_lora
from compose.kernels.stack import LoraStack

CASES = {
    "one list": ((6, 5, 13), (5,)),
    "one list, no tokens dimension": ((6, 13), (5,)),
    "per row": ((6, 5, 13), (6, 5)),
    "per row, no tokens dimension": ((6, 13), (6, 5)),
    "per token": ((6, 4, 13), (6, 4, 5)),
    "one token": ((6, 1, 13), (6, 1, 5)),
    "no tokens": ((3, 0, 13), (3, 5)),
    "no rows": ((0, 4, 13), (5,)),
}
COMBINE = ["outputs", "parameters"]


def _problem(name: str, chosen: int | None = None, *, differentiable: bool = False):
    """x, gates, indices (None: dense) and base; indices repeat and hold -1."""
    x_shape, gates_shape = CASES[name]
    gates_shape = (*gates_shape[:-1], chosen or 5)
    x = torch.randn(x_shape, dtype=torch.float64, requires_grad=differentiable)
    gates = torch.randn(gates_shape, dtype=torch.float64, requires_grad=differentiable)
    base = torch.randn(*x_shape[:-1], 7, dtype=torch.float64, requires_grad=differentiable)
    return x, gates, None if chosen is None else torch.randint(-1, 5, gates_shape), base


def _two_adapters() -> LoraStack:
    """A_0 = [1 2], B_0 = [3], s_0 = 4; A_1 = [0 1], B_1 = [1], s_1 = -9."""
    factors = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[3.0], [1.0]])
    return LoraStack(*factors, torch.tensor([4.0, -9.0]), (1, 1))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    ("combine", "expected"),
    # x = (1, 1), g = (1, 2): A x = (3, 1). Outputs: 1·4·3·3 - 2·9·1·1 = 18.
    # Parameters: Σ g √|s| A x = 1·2·3 + 2·3·1 = 12, Σ g sgn √|s| B = 1·2·3 - 2·3·1 = 0, so 0.
    [("outputs", 18.0), ("parameters", 0.0)],
)
def test_both_sums_equal_a_hand_calculation(backend, combine, expected):
    operands = (torch.ones(1, 2), _two_adapters(), torch.tensor([1.0, 2.0]))
    if (backend, combine) == ("triton", "parameters"):
        with pytest.raises(BackendUnavailableError, match="combines outputs only"):
            mixture_lora(*operands, combine=combine, backend=backend)
        return
    torch.testing.assert_close(mixture_lora(*operands, combine=combine, backend=backend), torch.tensor([[expected]]))


def test_combined_parameters_with_equal_scalings_are_the_product_of_factor_sums(make_stack):
    stack, gates = make_stack((2, 2, 2), equal_scaling=True), torch.tensor([0.3, -1.0, 2.0], dtype=torch.float64)
    a = (gates[:, None, None] * stack.a_RD.view(3, 2, -1)).sum(0)
    b = (gates[:, None, None] * stack.b_RO.view(3, 2, -1)).sum(0)
    x = torch.randn(4, 13, dtype=torch.float64)
    torch.testing.assert_close(mixture_lora(x, stack, gates, combine="parameters"), 0.5 * (x @ a.T @ b))


@pytest.mark.parametrize("ranks", [(3, 0, 8, 1, 16), (4, 4, 4, 4, 4), (0, 0, 0, 0, 0)], ids=str)
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("chosen", [None, 1, 3], ids=["dense", "K=1", "K=3"])
@pytest.mark.parametrize("name", CASES)
def test_forward_equals_the_reference(make_stack, name, chosen, combine, ranks):
    x, gates, indices, base = _problem(name, chosen)
    for given in (base, None):
        expected = mixture_lora(x, make_stack(ranks), gates, indices, base=given, combine=combine, backend="reference")
        actual = mixture_lora(x, make_stack(ranks), gates, indices, base=given, combine=combine)
        torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("chosen", [None, 2], ids=["dense", "K=2"])
@pytest.mark.parametrize("name", CASES)
def test_every_gradient_equals_the_reference(make_stack, same_gradients, name, chosen, combine, trained):
    x, gates, indices, base = _problem(name, chosen, differentiable=True)
    stack = make_stack(trained=trained)
    leaves = [x, gates, base, *((stack.a_RD, stack.b_RO, stack.scaling_E) if trained else ())]
    gradients = []
    for backend in ("reference", "cpu"):
        y = mixture_lora(x, stack, gates, indices, base=base, combine=combine, backend=backend)
        gradients.append(torch.autograd.grad(y.square().sum(), leaves, allow_unused=True))
    same_gradients(gradients[1], gradients[0], leaves)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("gates_shape", [(3,), (4, 3), (4, 2, 3)], ids=str)
def test_gradients_equal_numerical_ones(make_stack, combine, gates_shape):
    stack = make_stack((2, 0, 1), width=3, out=2, trained=True)
    scaling = torch.tensor([0.7, 1.0, -1.3], dtype=torch.float64, requires_grad=True)
    x = torch.randn(4, 2, 3, dtype=torch.float64, requires_grad=True)
    gates = torch.randn(gates_shape, dtype=torch.float64, requires_grad=True)

    def run(x, gates, a, b, scaling):
        return mixture_lora(x, LoraStack(a, b, scaling, stack.ranks), gates, combine=combine)

    assert torch.autograd.gradcheck(run, (x, gates, stack.a_RD, stack.b_RO, scaling))


@pytest.mark.parametrize("combine", COMBINE)
def test_gates_of_every_scope_agree_when_all_entries_are_equal(make_stack, combine):
    x, gates, _, base = _problem("one list")
    expected = mixture_lora(x, make_stack(), gates, base=base, combine=combine)
    for lead in ((6,), (6, 5)):
        spread = gates.expand(*lead, 5)
        torch.testing.assert_close(mixture_lora(x, make_stack(), spread, base=base, combine=combine), expected)


@pytest.mark.parametrize("combine", COMBINE)
def test_renaming_adapters_changes_nothing(make_stack, combine):
    stack, order = make_stack(), [4, 2, 0, 3, 1]
    renamed = LoraStack(
        torch.cat([stack.factors(e)[0] for e in order]),
        torch.cat([stack.factors(e)[1] for e in order]),
        stack.scaling_E[order],
        tuple(stack.ranks[e] for e in order),
    )
    x, gates, _, base = _problem("per row")
    expected = mixture_lora(x, stack, gates, base=base, combine=combine)
    torch.testing.assert_close(mixture_lora(x, renamed, gates[:, order], base=base, combine=combine), expected)


def test_a_gate_of_zero_still_gets_its_gradient(make_stack):
    gates = torch.tensor([0.0, 0.0, 1.0, 0.0, 0.0], dtype=torch.float64, requires_grad=True)
    x = torch.randn(2, 3, 13, dtype=torch.float64)
    mixture_lora(x, make_stack(), gates).sum().backward()
    assert gates.grad is not None
    assert (gates.grad != 0).tolist() == [True, False, True, True, True]  # adapter 1 has rank 0


@pytest.mark.parametrize("active", [(), (2,), (0, 3), (0, 2, 3, 4)], ids=str)
def test_base_is_never_written_to_and_the_result_is_new_memory(make_stack, active):
    x, base = torch.randn(3, 2, 13, dtype=torch.float64), torch.randn(3, 2, 7, dtype=torch.float64)
    gates = torch.zeros(5, dtype=torch.float64)
    gates[list(active)] = 0.7
    for combine in COMBINE:
        before = base.clone()
        mixture_lora(x, make_stack(), gates, base=base, combine=combine).fill_(9.0)
        torch.testing.assert_close(base, before, rtol=0, atol=0)
        expected = mixture_lora(x, make_stack(), gates, base=base, combine=combine)
        y = mixture_lora(x, make_stack(), gates, base=before, combine=combine, reuse_base=True)
        torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("combine", COMBINE)
def test_input_with_gaps_in_memory_is_accepted(make_stack, combine):
    x = torch.randn(13, 5, 12, dtype=torch.float64).permute(2, 1, 0)[::2]
    base = torch.randn(7, 6, 5, dtype=torch.float64).permute(1, 2, 0)
    for gates in (torch.randn(10)[::2], torch.randn(5, 6).T, torch.randn(5, 6, 5).permute(1, 0, 2)):
        operands = (x.contiguous(), make_stack(), gates.double().contiguous())
        expected = mixture_lora(*operands, base=base.contiguous(), combine=combine, backend="reference")
        torch.testing.assert_close(mixture_lora(x, make_stack(), gates.double(), base=base, combine=combine), expected)


@pytest.mark.parametrize(
    ("dtype", "bound"), [(torch.float32, 2e-6), (torch.float16, 3e-3), (torch.bfloat16, 2e-2)], ids=str
)
@pytest.mark.parametrize("combine", COMBINE)
def test_low_precision_stays_near_float64_on_the_same_rounded_inputs(make_stack, combine, dtype, bound):
    # a few roundings (gate times scaling, h, mixed factors, y) of relative size 2^-24, 2^-11, 2^-8 each
    stack = make_stack((8,) * 5, width=64, out=48, dtype=dtype)
    exact = LoraStack(stack.a_RD.double(), stack.b_RO.double(), stack.scaling_E, stack.ranks)
    x = torch.randn(6, 5, 64).to(dtype)
    for shape in ((5,), (6, 5), (6, 5, 5)):
        gates = torch.rand(shape)  # float32 gates, as a router gives them
        y = mixture_lora(x, stack, gates, combine=combine)
        expected = mixture_lora(x.double(), exact, gates.double(), combine=combine, backend="reference")
        assert y.dtype == dtype
        assert (y.double() - expected).norm() <= bound * expected.norm()


def test_gradients_of_float32_gates_with_bfloat16_input_are_float32(make_stack):
    stack = make_stack((8,) * 5, width=64, out=48, dtype=torch.bfloat16)
    x, gates = torch.randn(6, 33, 64).bfloat16(), torch.rand(6, 5, requires_grad=True)
    (gradient,) = torch.autograd.grad(mixture_lora(x, stack, gates).float().sum(), gates)
    exact = LoraStack(stack.a_RD.double(), stack.b_RO.double(), stack.scaling_E, stack.ranks)
    double = gates.detach().double().requires_grad_()
    (expected,) = torch.autograd.grad(mixture_lora(x.double(), exact, double).sum(), double)
    assert gradient.dtype == torch.float32
    assert (gradient.double() - expected).norm() <= 1.5e-2 * expected.norm()  # bfloat16 products, float32 sum


@pytest.mark.parametrize("combine", COMBINE)
def test_autocast_casts_everything(make_stack, combine):
    stack, gates = make_stack(dtype=torch.float32), torch.randn(6, 5)
    x, base = torch.randn(6, 5, 13), torch.randn(6, 5, 7)
    with torch.autocast("cpu", torch.bfloat16):
        y = mixture_lora(x, stack, gates, base=base, combine=combine)
    cast = stack.cast(torch.bfloat16)
    expected = mixture_lora(x.bfloat16(), cast, gates, base=base.bfloat16(), combine=combine)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("combine", COMBINE)
@pytest.mark.parametrize("chosen", [None, 2], ids=["dense", "K=2"])
@pytest.mark.parametrize("name", ["one list", "per row", "per token"])
def test_compiles_to_one_graph_with_the_same_values_and_gradients(make_stack, same_gradients, name, chosen, combine):
    torch._dynamo.reset()
    stack, (x, gates, indices, base) = make_stack(trained=True), _problem(name, chosen, differentiable=True)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def run(x: torch.Tensor, gates: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        return mixture_lora(x, stack, gates, indices, base=base, combine=combine)

    leaves = (x, gates, base, stack.a_RD, stack.b_RO, stack.scaling_E)
    expected = mixture_lora(x, stack, gates, indices, base=base, combine=combine, backend="reference")
    y = run(x, gates, base)
    torch.testing.assert_close(y, expected)
    gradients = [torch.autograd.grad(result.square().sum(), leaves) for result in (y, expected)]
    same_gradients(*gradients, leaves)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x": torch.zeros(6, 5, 12)}, r"\(B, 13\) or \(B, T, 13\)"),
        ({"gates": torch.zeros(4)}, r"5 adapters, gates \(4,\) have 4"),
        ({"gates": torch.zeros(5, 5)}, r"\(5\) or \(6, 5\) or \(6, 5, 5\)"),
        ({"gates": torch.tensor(1.0)}, r"got \(\)"),
        ({"gates": torch.zeros(5, dtype=torch.int64)}, "floating point"),
        ({"gates": torch.zeros(2), "indices": torch.zeros(3, dtype=torch.int64)}, r"indices must be int64 \(2,\)"),
        ({"gates": torch.zeros(2), "indices": torch.zeros(2, dtype=torch.int32)}, "int32"),
        ({"gates": torch.zeros(2), "indices": torch.tensor([0, 5])}, "id 5 is out of range"),
        ({"gates": torch.zeros(2), "indices": torch.tensor([0, -2])}, "id -2 is out of range"),
        ({"base": torch.zeros(6, 5, 8)}, r"base must be \(6, 5, 7\)"),
    ],
    ids=lambda value: None if isinstance(value, str) else next(iter(value)),
)
def test_operands_that_do_not_fit_are_refused(make_stack, change, message):
    operands = {"x": torch.zeros(6, 5, 13), "gates": torch.zeros(5), "indices": None, "base": None} | change
    with pytest.raises(IncompatibleError, match=message):
        mixture_lora(stack=make_stack(dtype=torch.float32), **operands)


@pytest.mark.parametrize("option", [{"combine": "sum"}, {"backend": "gpu"}], ids=["combine", "backend"])
def test_an_unknown_name_is_refused_with_the_known_ones(make_stack, option):
    with pytest.raises(UnknownNameError, match="known:"):
        mixture_lora(torch.zeros(2, 13), make_stack(dtype=torch.float32), torch.zeros(5), **option)
