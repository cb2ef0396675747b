"""What published methods do after selection: a truth table, and no NaN anywhere."""

import pytest
import torch
from torch.testing import assert_close

from compose.errors import UnknownNameError
from compose.routers.renormalise import RENORMALISATIONS, renormalise
from compose.routers.selectors.top_k import take_top
from compose.routers.selectors.top_p import keep
from compose.routers.spec import _CLOSED
from compose.routers.steps import Selected

LOGITS = torch.tensor([[2.0, 1.0, 0.0, -1.0]])
PROBS = torch.softmax(LOGITS, -1)
SPARSE = take_top(LOGITS, PROBS, 2)
DENSE = keep(torch.tensor([[True, True, False, False]]), LOGITS, PROBS)
LOW = float("-inf")


def softmax(*values) -> torch.Tensor:
    return torch.softmax(torch.tensor([values]), -1)


@pytest.mark.parametrize(
    ("method", "how", "expected"),
    [
        ("molora with top-k", "none", PROBS[:, :2]),
        ("x-lora top_k_lora", "none", PROBS[:, :2]),
        ("mola", "sum", PROBS[:, :2] / PROBS[:, :2].sum()),
        ("mixtral", "sum", PROBS[:, :2] / PROBS[:, :2].sum()),
        ("phatgoose", "softmax", softmax(2.0, 1.0)),
        ("meteora", "softmax", softmax(2.0, 1.0)),
        ("arrow", "softmax", softmax(2.0, 1.0)),
        ("hmora", "softmax_probs", softmax(float(PROBS[0, 0]), float(PROBS[0, 1]))),
        ("dlp-lora", "softmax_probs", softmax(float(PROBS[0, 0]), float(PROBS[0, 1]))),
    ],
)
def test_truth_table(method, how, expected):
    assert_close(renormalise(how, SPARSE), expected)
    dense = renormalise(how, DENSE)
    assert_close(dense[:, :2], expected)
    assert dense[:, 2:].tolist() == [[0.0, 0.0]]


def test_mass():
    mass = {how: renormalise(how, SPARSE).sum().item() for how in RENORMALISATIONS}
    assert mass["none"] < 0.9
    assert all(abs(mass[how] - 1) < 1e-6 for how in ("sum", "softmax", "softmax_probs"))
    near_uniform = torch.full((1, 8), 0.125)
    assert renormalise("none", take_top(near_uniform.log(), near_uniform, 2)).sum().item() == 0.25


def test_sum_and_softmax_are_one_function_of_softmax_probabilities():
    logits = torch.randn(50, 6)
    selected = take_top(logits, torch.softmax(logits, -1), 3)
    assert_close(renormalise("sum", selected), renormalise("softmax", selected))


def test_the_double_softmax_is_flatter():
    # two experts of logits log 3.5 apart: 0.78 becomes 0.64
    probs = torch.tensor([[0.78, 0.22]])
    double = renormalise("softmax_probs", Selected(probs, None, probs.log()))
    assert_close(double, torch.tensor([[1 / (1 + 2.718281828**-0.56), 1 / (1 + 2.718281828**0.56)]]))


@pytest.mark.parametrize("how", RENORMALISATIONS)
@pytest.mark.parametrize(
    "logits", [[[0.0, 0, 0]], [[LOW, LOW, LOW]], [[3.0, LOW, -2.0]]], ids=["finite", "none selected", "some selected"]
)
def test_a_line_of_zeros_stays_zero_with_finite_gradients(how, logits):
    scores = torch.tensor(logits).requires_grad_()
    gates = torch.zeros(1, 3, requires_grad=True)
    given = renormalise(how, Selected(gates, None, scores))
    assert given.tolist() == [[0.0, 0.0, 0.0]]
    given.sum().backward()
    for leaf in (gates, scores):
        assert leaf.grad is None or bool(leaf.grad.isfinite().all())


@pytest.mark.parametrize("how", RENORMALISATIONS)
def test_lines_do_not_touch_each_other_and_not_selected_entries_stay_zero(how):
    logits = torch.tensor([[1.0, LOW, 0.5], [LOW, LOW, LOW], [2.0, 0.0, LOW]], dtype=torch.float64)
    gates = torch.tensor([[0.6, 0, 0.2], [0, 0, 0], [0.7, 0.1, 0]], dtype=torch.float64)
    given = renormalise(how, Selected(gates, None, logits))
    assert bool(given.isfinite().all())
    assert (given > 0).tolist() == (gates > 0).tolist()
    for line in range(3):
        one = slice(line, line + 1)
        assert_close(renormalise(how, Selected(gates[one], None, logits[one])), given[one])


@pytest.mark.parametrize("how", RENORMALISATIONS)
@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (2, 3)])
def test_shapes(how, lead):
    probs = torch.softmax(torch.randn(*lead, 4), -1)
    assert renormalise(how, Selected(probs, None, probs.log())).shape == (*lead, 4)


@pytest.mark.parametrize("how", RENORMALISATIONS)
def test_gradients_are_those_of_finite_differences(how):
    def of(logits):
        return renormalise(how, take_top(logits, torch.softmax(logits, -1), 2))

    logits = torch.randn(4, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert torch.autograd.gradcheck(of, [logits.requires_grad_()])


def test_unknown_names_are_refused_and_the_specification_knows_the_same():
    with pytest.raises(UnknownNameError, match="known: none, sum"):
        renormalise("max", SPARSE)
    assert tuple(_CLOSED["renormalise"]) == RENORMALISATIONS
