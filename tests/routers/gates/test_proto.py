"""Prototype gates: every score in float64, prototypes that depend on the product B A alone, clear refusals."""

import copy
import math

import pytest
import torch

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack
from compose.routers.gates.proto import ProtoGate, similarity

D = 6


def test_every_score_by_hand() -> None:
    torch.manual_seed(0)
    x, v = torch.randn(2, 3, D, dtype=torch.float64), torch.randn(4, 2, D, dtype=torch.float64)

    def best(one):
        scores = torch.empty(2, 3, 4, dtype=torch.float64)
        for row in range(2):
            for token in range(3):
                for expert in range(4):
                    scores[row, token, expert] = max(one(x[row, token], v[expert, place]) for place in range(2))
        return scores

    def unit(vector):
        return vector / vector.norm()

    def normed(vector):
        return (vector - vector.mean()) / (vector.var(correction=0) + 1e-5).sqrt()

    formulas = {
        "dot": lambda a, b: a @ b,
        "abs": lambda a, b: (a @ b).abs(),
        "cos": lambda a, b: unit(a) @ unit(b),
        "l2": lambda a, b: -((a - b) ** 2).sum(),
        "layer_norm": lambda a, b: normed(a) @ normed(b),
    }
    for score, formula in formulas.items():
        torch.testing.assert_close(similarity(score, x, v), best(formula), msg=score)


def test_svd_prototypes_are_the_first_right_singular_vectors(make_stack, shape_for) -> None:
    stack = make_stack()
    gate = ProtoGate(source="svd").build(shape_for(stack))
    for expert, rank in enumerate(stack.ranks):
        a, b = stack.factors(expert)
        got = gate.prototypes_EPD[expert, 0].double()
        if rank == 0:
            assert got.abs().sum() == 0
            continue
        wanted = torch.linalg.svd(b.T @ a).Vh[0]
        torch.testing.assert_close(got.dot(wanted).abs(), torch.tensor(1.0, dtype=torch.float64), rtol=0, atol=1e-6)
        assert got[got.abs().argmax()] > 0


def test_prototypes_do_not_depend_on_the_factorisation(make_stack, shape_for) -> None:
    """A rotation of the rank space, an invertible change of it, and sign flips leave them alone."""
    stack = make_stack((4, 4, 4))
    wanted = ProtoGate().build(shape_for(stack)).prototypes_EPD
    torch.manual_seed(1)
    rotation = torch.linalg.qr(torch.randn(4, 4, dtype=torch.float64)).Q
    skewed = torch.randn(4, 4, dtype=torch.float64) + 3 * torch.eye(4)
    for change in (rotation, skewed, -torch.eye(4, dtype=torch.float64)):
        a, b = (torch.cat([matrix @ each for each in factors.split(4)]) for matrix, factors in (
            (torch.linalg.inv(change), stack.a_RD), (change.T, stack.b_RO)
        ))  # fmt: skip
        other = LoraStack(a, b, stack.scaling_E, stack.ranks)
        torch.testing.assert_close(ProtoGate().build(shape_for(other)).prototypes_EPD, wanted, rtol=0, atol=1e-6)
    again = ProtoGate().build(shape_for(make_stack((4, 4, 4)))).prototypes_EPD
    assert torch.equal(again, wanted)


def test_arrow_score_in_float64(make_stack, shape_for, see) -> None:
    stack = make_stack()
    gate = ProtoGate(source="svd", score="abs").build(shape_for(stack)).double()
    x = torch.randn(2, 3, D, dtype=torch.float64)
    torch.testing.assert_close(gate(see(x)), (x @ gate.prototypes_EPD[:, 0].T).abs())


def test_unit_inputs_make_scores_independent_of_length(make_stack, shape_for, see) -> None:
    gate = ProtoGate(unit_input=True).build(shape_for(make_stack()))
    x = torch.randn(2, 3, D)
    torch.testing.assert_close(gate(see(x)), gate(see(50 * x)))
    plain = ProtoGate().build(shape_for(make_stack()))
    torch.testing.assert_close(plain(see(50 * x)), 50 * plain(see(x)))


def test_width_and_boost(make_stack, shape_for, see) -> None:
    x = torch.randn(5, D)
    plain = ProtoGate().build(shape_for(make_stack()))(see(x))
    divided = ProtoGate(sqrt_width=True).build(shape_for(make_stack()))(see(x))
    torch.testing.assert_close(divided, plain / math.sqrt(D))
    boosted = ProtoGate(boost=4.0).build(shape_for(make_stack()))(see(x))
    best = plain.argmax(-1, keepdim=True)
    torch.testing.assert_close(boosted, plain.scatter(-1, best, 4 * plain.gather(-1, best)))


def test_a_missing_expert_is_never_boosted(make_stack, shape_for, see) -> None:
    options = ProtoGate(source="calibrated", score="dot", boost=4.0)
    gate = options.build(shape_for(make_stack()))
    for expert in range(4):
        gate.fill_(expert, torch.full((1, D), 10.0 if expert == 1 else 1.0 + expert / 10))
    scores = gate(see(torch.ones(1, D)))[0]  # expert 1 has no factors and the highest score
    torch.testing.assert_close(scores, D * torch.tensor([1.0, 10.0, 1.2, 4 * 1.3]))


@pytest.mark.parametrize("source", ["calibrated", "trained"])
def test_empty_prototypes_are_refused_until_filled_or_loaded(source, make_stack, shape_for, see) -> None:
    options = ProtoGate(source=source, score="dot")
    gate = options.build(shape_for(make_stack()))
    x = torch.randn(2, D)
    with pytest.raises(IncompatibleError, match="no prototypes yet for 3 experts"):
        gate(see(x))
    for expert in (0, 2, 3):  # expert 1 does not exist here
        gate.fill_(expert, torch.full((1, D), float(expert)))
    scores = gate(see(x))
    other = options.build(shape_for(make_stack()))
    other.load_state_dict(gate.state_dict())
    assert torch.equal(other(see(x)), scores)
    emptied = copy.deepcopy(gate)
    emptied.filled_E[2] = False
    with pytest.raises(IncompatibleError, match="expert-2"):
        emptied(see(x))


def test_options_are_checked() -> None:
    for options in ({"source": "random"}, {"score": "l1"}, {"per_expert": 0}, {"per_expert": 2, "source": "svd"}):
        with pytest.raises(IncompatibleError):
            ProtoGate(**options)
