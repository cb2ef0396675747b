"""Laws of every registered auxiliary loss: masks, missing experts, permutations, gradients, processes, JSON."""

import json
from dataclasses import fields

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack
from compose.routers.component import describe, from_description
from compose.routers.losses.registry import LOSSES
from compose.routers.routing import Decisions

CASES = [
    *((name, {}) for name in LOSSES),
    ("contrastive", {"mode": "active_inactive"}),
    ("entropy", {"sign": -1}),
    ("expert_cosine", {"of": "a"}),
    ("gate_ce", {"level": "sequence"}),
    ("gjs", {"gamma_balance": 0.9, "gamma_certain": 0.4}),
    ("l1_gate", {"of": "logits"}),
    ("localized_cv2", {"denominator": "mean", "expert_groups": (0, 1, 0, 1)}),
    ("tsallis", {"q": 1.0}),
    ("tsallis", {"q": 0.6}),
]
IDS = [name + "".join(f"-{value}" for value in options.values()) for name, options in CASES]
every_loss = pytest.mark.parametrize(("name", "options"), CASES, ids=IDS)
# Losses of this process's sample, or of the factors: they are no means over decisions.
LOCAL = {"contrastive", "mmd_align", "kl_align", "expert_cosine"}


def alone(counts):
    return counts


def scores(lines=12, experts=4, dtype=torch.float64, seed=1):
    return torch.randn(lines, experts, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def select(given: Decisions, lines) -> Decisions:
    """The decisions of some lines."""
    per_line = {
        name: getattr(given, name)[lines]
        for name in given._fields
        if name[-2:] in ("_N",) or name.endswith(("_NE", "_ND"))
    }
    return given._replace(**per_line, extras={name: value[lines] for name, value in given.extras.items()})


@every_loss
def test_value_is_a_finite_float32_scalar(name, options, decisions):
    value = LOSSES[name](**options)(decisions(scores(dtype=torch.float32)), alone)
    assert value.shape == ()
    assert value.dtype == torch.float32
    assert bool(value.isfinite())


@every_loss
def test_half_precision_inputs_are_computed_in_float32(name, options, decisions):
    given = decisions(scores(dtype=torch.float32))
    half = given._replace(
        **{field: getattr(given, field).bfloat16() for field in ("logits_NE", "probs_NE", "gates_NE", "x_ND")}
    )
    assert LOSSES[name](**options)(half, alone).dtype == torch.float32


@every_loss
def test_padding_changes_nothing_even_where_it_holds_nonsense(name, options, decisions):
    loss = LOSSES[name](**options)
    given = decisions(scores())
    order = torch.tensor([0, 1, 12, 2, 3, 4, 13, 5, 6, 7, 8, 9, 14, 10, 11])
    wild = decisions(torch.full((3, 4), 1e4, dtype=torch.float64).fill_diagonal_(-7.0))._replace(
        x_ND=torch.full((3, 5), 1e5, dtype=torch.float64), real_N=torch.zeros(3, dtype=torch.bool)
    )
    both = Decisions(
        **{
            field: torch.cat([getattr(given, field), getattr(wild, field)])[order]
            if field.endswith(("_N", "_NE", "_ND"))
            else getattr(given, field)
            for field in given._fields
        }
    )
    extras = {key: torch.cat([given.extras[key], wild.extras[key]])[order] for key in given.extras}
    rows = torch.cat([given.rows_N, torch.zeros(3, dtype=torch.int64)])[order]
    assert_close(loss(both._replace(extras=extras, rows_N=rows), alone), loss(given, alone))


@every_loss
def test_over_response_looks_at_labelled_tokens_only(name, options, decisions):
    given = decisions(scores())
    response = torch.arange(12) % 3 != 1
    given = given._replace(response_N=response)
    expected = LOSSES[name](**options)(select(given, response), alone)
    assert_close(LOSSES[name](**options, over="response")(given, alone), expected)
    assert_close(LOSSES[name](**options, over="real")(given, alone), LOSSES[name](**options)(given, alone))


@every_loss
@pytest.mark.parametrize("lines", [0, 5])
def test_nothing_real_gives_zero_with_a_graph(name, options, lines, decisions):
    logits = scores(lines).requires_grad_()
    given = decisions(logits, real_N=torch.zeros(lines, dtype=torch.bool))
    given.stack.a_RD.requires_grad_()
    given.extras["lambda"].requires_grad_()
    value = LOSSES[name](**options)(given, alone)
    assert value.requires_grad
    value.backward()
    if name != "expert_cosine":  # of the factors alone
        assert value.item() == 0
    assert logits.grad is None or bool((logits.grad == 0).all())
    assert given.stack.a_RD.grad is None or bool(given.stack.a_RD.grad.isfinite().all())


@every_loss
@pytest.mark.parametrize("available", [(True, False, False, True), (False, True, False, False), (False,) * 4])
def test_few_experts_or_none_give_finite_values_and_gradients(name, options, available, decisions):
    logits = scores().requires_grad_()
    available_E = torch.tensor(available)
    given = decisions(logits, available=available_E) if any(available) else decisions(logits)
    if not any(available):
        given = given._replace(available_E=available_E, probs_NE=given.probs_NE * 0, gates_NE=given.gates_NE * 0)
    given.stack.a_RD.requires_grad_()
    given.extras["lambda"].requires_grad_()
    value = LOSSES[name](**options)(given, alone)
    assert bool(value.isfinite())
    value.backward()
    for leaf in (logits, given.stack.a_RD, given.extras["lambda"]):
        assert leaf.grad is None or bool(leaf.grad.isfinite().all())


@every_loss
def test_a_missing_expert_is_as_if_it_were_not_there(name, options, decisions, stack):
    here = torch.tensor([0, 1, 3])
    logits = scores()
    full = decisions(logits)
    whole = stack(torch.float64)
    rows = torch.isin(whole.index.adapter_R, here)
    ranks = tuple(whole.ranks[int(expert)] for expert in here)
    small = LoraStack(whole.a_RD[rows], whole.b_RO[rows], whole.scaling_E[here], ranks)
    labels = torch.where(full.labels_N == 3, 2, full.labels_N)
    part = decisions(logits[:, here], available=torch.ones(3, dtype=torch.bool), labels_N=labels, stack=small)
    groups = {"expert_groups": (1, 1, 0, 0)} if name == "localized_cv2" else {}
    fewer = {"expert_groups": (1, 1, 0)} if name == "localized_cv2" else {}
    expected = LOSSES[name](**{**options, **fewer})(part, alone)
    assert_close(LOSSES[name](**{**options, **groups})(full, alone), expected)


@every_loss
def test_order_of_experts_does_not_matter(name, options, decisions, stack):
    order = torch.tensor([2, 0, 3, 1])
    logits, whole = scores(), stack(torch.float64)
    given = decisions(logits)
    places = torch.cat([(whole.index.adapter_R == expert).nonzero().squeeze(1) for expert in order])
    ranks = tuple(whole.ranks[int(expert)] for expert in order)
    moved_stack = LoraStack(whole.a_RD[places], whole.b_RO[places], whole.scaling_E[order], ranks)
    inverse = torch.argsort(order)
    labels = torch.where(given.labels_N < 0, -1, inverse[given.labels_N.clamp(min=0)])
    moved = decisions(logits[:, order], available=given.available_E[order], labels_N=labels, stack=moved_stack)
    first, second = {}, {}
    if name == "localized_cv2":
        first = {"expert_groups": (1, 1, 0, 0)}
        second = {"expert_groups": tuple(first["expert_groups"][int(expert)] for expert in order)}
    expected = LOSSES[name](**{**options, **first})(given, alone)
    assert_close(LOSSES[name](**{**options, **second})(moved, alone), expected)


@every_loss
def test_order_of_decisions_does_not_matter(name, options, decisions):
    given = decisions(scores())
    order = torch.randperm(12, generator=torch.Generator().manual_seed(2))
    assert_close(LOSSES[name](**options)(select(given, order), alone), LOSSES[name](**options)(given, alone))


@pytest.mark.parametrize(
    ("name", "options"),
    [case for case in CASES if case[0] not in LOCAL],
    ids=[i for i in IDS if i.split("-")[0] not in LOCAL],
)
@pytest.mark.parametrize("halves", ["equal", "unequal"])
def test_two_processes_have_value_and_gradient_of_the_whole_batch(name, options, halves, decisions):
    loss = LOSSES[name](**options)
    cut = 6 if halves == "equal" else 3
    logits = scores().requires_grad_()
    sparsity = torch.linspace(-1, 0.5, 12, dtype=torch.float64).requires_grad_()
    extras = {"threshold": torch.linspace(0.05, 0.3, 12, dtype=torch.float64), "lambda": sparsity}
    whole = decisions(logits, extras=extras)
    value = loss(whole, alone)
    expected = torch.autograd.grad(value, [logits, sparsity], allow_unused=True, retain_graph=True)
    parts = [select(whole, slice(None, cut)), select(whole, slice(cut, None))]
    values = run_together(loss, parts)
    assert_close(values[0], value)
    assert_close(values[1], value)
    given = torch.autograd.grad(torch.stack(values).mean(), [logits, sparsity], allow_unused=True)
    for mine, theirs in zip(given, expected, strict=True):
        assert (mine is None) == (theirs is None)
        if mine is not None:
            assert_close(mine, theirs)


def run_together(loss, parts):
    """Losses of simulated processes: the vectors of each call to ``world_sum`` are exchanged round by round."""
    known: list[torch.Tensor] = []
    while True:
        asked = []

        def world_sum(counts, position, asked=asked):
            assert not counts.requires_grad
            if position[0] < len(known):
                position[0] += 1
                return known[position[0] - 1]
            asked.append(counts)
            raise StopAsyncIteration

        values = []
        for part in parts:
            position = [0]
            try:
                values.append(loss(part, lambda counts, position=position: world_sum(counts, position)))
            except StopAsyncIteration:
                continue
        if not asked:
            return values
        assert len(asked) == len(parts), "processes call world_sum a different number of times"
        known.append(torch.stack(asked).sum(0))


@every_loss
def test_gradients_are_those_of_finite_differences(name, options, decisions):
    if name == "contrastive":
        options = {**options, "temperature": 1.0}
    if name == "mmd_align":
        options = {**options, "bandwidths": (1.0, 5.0)}
    loss = LOSSES[name](**options)
    given = decisions(scores())
    whole = given.stack

    def of(logits, sparsity, x, a, b):
        factors = LoraStack(a, b, whole.scaling_E, whole.ranks)
        return loss(decisions(logits, extras={**given.extras, "lambda": sparsity}, x_ND=x, stack=factors), alone)

    leaves = [
        leaf.clone().requires_grad_()
        for leaf in (scores(), given.extras["lambda"], given.x_ND, whole.a_RD, whole.b_RO)
    ]
    if name == "sparsity_interval":
        leaves[0] = leaves[0].detach()  # scores carry no gradient there, by definition
    assert torch.autograd.gradcheck(of, leaves, fast_mode=True)


@every_loss
def test_bad_options_are_refused(name, options):
    for wrong in ({"coefficient": -1.0}, {"coefficient": float("nan")}, {"over": "all"}, {"reduce": "max"}):
        with pytest.raises(IncompatibleError, match=next(iter(wrong))):
            LOSSES[name](**options, **wrong)


@every_loss
def test_survives_json(name, options):
    loss = LOSSES[name](**options, reduce="sum", coefficient=0.25)
    assert from_description(LOSSES, json.loads(json.dumps(describe(LOSSES, loss)))) == loss


def test_options_have_defaults_and_no_loss_reads_fields_it_does_not_declare():
    for name in LOSSES:
        names = {field.name for field in fields(LOSSES[name])}
        assert {"coefficient", "over", "reduce"} <= names
        assert isinstance(LOSSES[name]().needs_inputs, bool)
        assert isinstance(LOSSES[name]().needs_labels, bool)


@pytest.mark.parametrize("name", [name for name in LOSSES if LOSSES[name]().needs_inputs])
def test_losses_that_read_inputs_say_so_where_there_are_none(name, decisions, stack):
    given = decisions(scores())
    with pytest.raises(IncompatibleError, match="inputs=True"):
        LOSSES[name]()(given._replace(x_ND=None, stack=None), alone)
    with pytest.raises(IncompatibleError, match="factors of 2 adapters"):
        LOSSES[name]()(given._replace(stack=stack(ranks=(2, 2))), alone)


@pytest.mark.parametrize("name", [name for name in LOSSES if not LOSSES[name]().needs_inputs])
def test_other_losses_need_no_inputs(name, decisions):
    given = decisions(scores())
    expected = LOSSES[name]()(given, alone)
    assert LOSSES[name]()(given._replace(x_ND=None, stack=None), alone) == expected


def test_losses_of_extras_name_the_component_that_gives_them(decisions):
    given = decisions(scores())._replace(extras={})
    with pytest.raises(IncompatibleError, match="selector 'threshold'"):
        LOSSES["shifted_lb"]()(given, alone)
    with pytest.raises(IncompatibleError, match="normalisation 'sparsegen'"):
        LOSSES["sparsity_interval"]()(given, alone)


@every_loss
def test_padding_stays_out_even_if_it_is_said_to_be_response(name, options, decisions):
    given = decisions(scores(), real_N=torch.arange(12) % 4 != 2)
    expected = LOSSES[name](**options, over="real")(given, alone)
    assert_close(LOSSES[name](**options, over="response")(given, alone), expected)


@every_loss
def test_gates_of_experts_beside_the_router_do_not_count(name, options, decisions):
    given = decisions(scores())
    gates = given.gates_NE.clone()
    gates[:, 2] = 1.0  # expert 2 is not the router's: always on
    assert_close(LOSSES[name](**options)(given._replace(gates_NE=gates), alone), LOSSES[name](**options)(given, alone))
