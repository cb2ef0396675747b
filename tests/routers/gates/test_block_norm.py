"""Norms of outputs through the rank space: equal to the norms themselves, for every factorisation."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack
from compose.routers.gates.block_norm import BlockNormGate


def build(options, shape):
    """The gate with rows in float64 (rounded to float32 when built)."""
    return options.build(shape).double()


def norms(stack, x, *, scaled=False):
    outputs = []
    for expert in range(stack.num_adapters):
        a, b = stack.factors(expert)
        scale = stack.scaling_E[expert].double() if scaled else 1.0
        outputs.append((scale * (x @ a.T @ b)).norm(dim=-1))
    return torch.stack(outputs, -1)


@pytest.mark.parametrize("scaled", [False, True])
def test_spectral_rows_give_the_norm_of_the_output(scaled, make_stack, shape_for, see) -> None:
    stack = make_stack()
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    scores = build(BlockNormGate(scaled=scaled), shape_for(stack))(see(x))
    torch.testing.assert_close(scores, norms(stack, x, scaled=scaled), rtol=1e-6, atol=1e-6)
    assert scores[..., 1].max() < 1e-30  # no factors


def test_subspace_rows_give_the_length_inside_the_row_space(make_stack, shape_for, see) -> None:
    stack = make_stack()
    x = torch.randn(4, 6, dtype=torch.float64)
    scores = build(BlockNormGate(rows="subspace"), shape_for(stack))(see(x))
    for expert in (0, 2, 3):
        a, _ = stack.factors(expert)
        projected = torch.linalg.pinv(a) @ (a @ x.T)
        torch.testing.assert_close(scores[:, expert], projected.norm(dim=0), rtol=1e-6, atol=1e-6)


def test_rank_keeps_the_strongest_directions(make_stack, shape_for, see) -> None:
    stack = make_stack()
    x = torch.randn(4, 6, dtype=torch.float64)
    for rows in ("spectral", "subspace"):
        scores = build(BlockNormGate(rows=rows, rank=2), shape_for(stack))(see(x))
        for expert in (0, 3):
            a, b = stack.factors(expert)
            _, sigma, v = torch.linalg.svd(b.T @ a)
            weights = sigma[:2] if rows == "spectral" else torch.ones(2, dtype=torch.float64)
            wanted = (weights[:, None] * (v[:2] @ x.T)).norm(dim=0)
            torch.testing.assert_close(scores[:, expert], wanted, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("rows", ["spectral", "subspace"])
def test_scores_do_not_depend_on_the_factorisation(rows, make_stack, shape_for, see) -> None:
    stack = make_stack((4, 4))
    x = torch.randn(4, 6)
    change = torch.randn(4, 4, dtype=torch.float64) + 3 * torch.eye(4)
    a = torch.cat([torch.linalg.inv(change) @ each for each in stack.a_RD.split(4)])
    b = torch.cat([change.T @ each for each in stack.b_RO.split(4)])
    other = LoraStack(a, b, stack.scaling_E, stack.ranks)
    options = BlockNormGate(rows=rows)
    got, wanted = (options.build(shape_for(each))(see(x)) for each in (other, stack))
    torch.testing.assert_close(got, wanted, rtol=1e-5, atol=1e-5)


def test_an_untrained_expert_reads_nothing(make_stack, shape_for, see) -> None:
    """B = 0: there are no directions, not arbitrary ones."""
    stack = make_stack((3, 2))
    stack.b_RO[:3] = 0
    for rows in ("spectral", "subspace"):
        gate = BlockNormGate(rows=rows).build(shape_for(stack))
        assert gate.expert_R.tolist() == [1, 1]
        assert gate(see(torch.randn(2, 6)))[:, 0].max() < 1e-15


def test_nothing_wide_is_formed_and_gradients_are_finite(make_stack, shape_for, see) -> None:
    stack = make_stack((3, 0, 1, 5), width=6, out=500)
    gate = BlockNormGate().build(shape_for(stack))
    assert gate.rows_RD.shape == (9, 6)
    x = torch.zeros(2, 6, requires_grad=True)
    gate(see(x)).sum().backward()
    assert x.grad.isfinite().all()
    assert not gate.state_dict()  # made from the bank


def test_the_tapped_target_is_read(make_stack, shape_for, see) -> None:
    stack, tapped = make_stack(), make_stack(width=4, seed=9)
    x = torch.randn(2, 4, dtype=torch.float64)
    gate = build(BlockNormGate(), shape_for(stack, tapped=tapped))
    torch.testing.assert_close(gate(see(x)), norms(tapped, x), rtol=1e-6, atol=1e-6)


def test_options_are_checked() -> None:
    for options in ({"rows": "all"}, {"rank": 0}, {"rows": "subspace", "scaled": True}):
        with pytest.raises(IncompatibleError):
            BlockNormGate(**options)
