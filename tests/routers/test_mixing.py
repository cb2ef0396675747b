"""Gates of one target: what experts without factors there would have had goes to the others."""

import pytest
import torch

from compose.engine.coefficients import LayerCall
from compose.kernels.stack import LoraStack
from compose.routers.mixing import Mixer
from compose.routers.routing import Routing
from compose.routers.spec import MixtureSpec


def stack_of(*ranks: int) -> LoraStack:
    rows = sum(ranks)
    return LoraStack(torch.zeros(rows, 4), torch.zeros(rows, 5), torch.ones(len(ranks)), ranks)


def fitted(gates, ranks, ids=None, **options):
    spec = MixtureSpec(**options)
    gates = torch.tensor(gates)
    wide = torch.zeros(*gates.shape[:-1], len(ranks))
    return Mixer(spec).fitted(Routing(gates, ids, wide, wide), stack_of(*ranks))[0]


def test_the_rest_takes_over_the_share_of_a_missing_expert() -> None:
    torch.testing.assert_close(fitted([0.5, 0.3, 0.2], (2, 0, 1)), torch.tensor([0.5, 0.0, 0.2]) / 0.7)
    chosen = fitted([[0.6, 0.2]], (2, 0, 1), ids=torch.tensor([[1, 2]]))
    torch.testing.assert_close(chosen, torch.tensor([[0.0, 0.8]]))


def test_missing_zero_and_complete_targets_keep_the_gates() -> None:
    assert fitted([0.5, 0.3, 0.2], (2, 0, 1), missing="zero").tolist() == pytest.approx([0.5, 0.3, 0.2])
    assert fitted([0.5, 0.3, 0.2], (2, 1, 1)).tolist() == pytest.approx([0.5, 0.3, 0.2])


def test_gates_of_all_missing_experts_are_nothing() -> None:
    assert fitted([1.0, 0.0], (0, 2)).tolist() == [0.0, 0.0]


def test_gates_of_both_signs_stay_bounded() -> None:
    """A softmax that is sure of the missing expert leaves small biases, whose sum says nothing of their size."""
    gates = fitted([0.98, 0.0100001, -0.01], (0, 2, 2))
    torch.testing.assert_close(gates, torch.tensor([0.0, 0.5, -0.5]), rtol=1e-4, atol=1e-4)
    assert float(gates.abs().sum()) == pytest.approx(1.0000001, abs=1e-6)


def random_stack(ranks: tuple[int, ...], seed: int = 0, dtype: torch.dtype = torch.float32) -> LoraStack:
    generator = torch.Generator().manual_seed(seed)
    draws = [torch.randn(sum(ranks), width, generator=generator, dtype=torch.float64).to(dtype) for width in (4, 5)]
    return LoraStack(*draws, torch.arange(1.0, len(ranks) + 1), ranks)


def routing_of(lead: tuple[int, ...], experts: int, k: int | None, seed: int = 1) -> Routing:
    logits = torch.randn(*lead, experts, generator=torch.Generator().manual_seed(seed))
    probs = torch.softmax(logits, -1)
    if k is None:
        return Routing(probs, None, logits, probs)
    gates, ids = probs.topk(k)
    ids[..., -1].view(-1)[0] = -1  # a place without an expert
    return Routing(gates, ids, logits, probs)


def mixed(x: torch.Tensor, stack: LoraStack, base: torch.Tensor, routing: Routing, *, owns: bool, rows: bool):
    mixer = Mixer(MixtureSpec())
    call = LayerCall(stack, base.clone() if owns else base, "q", "auto", owns)
    if not rows:
        return mixer(x, call, routing)
    found = mixer.spread(routing, stack, "auto")
    assert found is not None
    assert found.fit(x, base)
    assert found.are_of(stack)
    return found.add(x, call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("owns", [False, True], ids=["kept base", "own base"])
@pytest.mark.parametrize("k", [None, 2])
@pytest.mark.parametrize("lead", [(2, 3), (2, 1), (2,)], ids=str)
@pytest.mark.parametrize("ranks", [(2, 2, 2), (3, 1, 4)], ids=str)
def test_rows_mix_as_the_op_does_gradients_and_all(ranks, lead, k, owns, dtype) -> None:
    stack, routing = random_stack(ranks, dtype=dtype), routing_of(lead, 3, k)
    generator = torch.Generator().manual_seed(2)
    tokens = lead[1] if len(lead) == 2 else 3
    x, base, seed = (torch.randn(2, tokens, n, generator=generator).to(dtype) for n in (4, 5, 5))
    tolerance = {} if dtype != torch.bfloat16 else {"rtol": 2e-2, "atol": 5e-2}
    with torch.no_grad():
        one, other = (mixed(x, stack, base, routing, owns=owns, rows=rows) for rows in (True, False))
        torch.testing.assert_close(one, other, **tolerance)
    found = []
    for rows in (True, False):
        leaves = [each.detach().requires_grad_(True) for each in (x, routing.gates, stack.a_RD, stack.b_RO)]
        trained = LoraStack(leaves[2], leaves[3], stack.scaling_E, ranks)
        y = mixed(leaves[0], trained, base, routing._replace(gates=leaves[1]), owns=owns, rows=rows)
        found.append(torch.autograd.grad((y * seed).sum(), leaves))
    torch.testing.assert_close(*found, **tolerance)


def test_rows_are_for_stacks_whose_ranks_and_scalings_are_alike() -> None:
    stack, routing, x = random_stack((2, 2)), routing_of((2, 3), 2, None), torch.zeros(2, 3, 4)
    rows = Mixer(MixtureSpec()).spread(routing, stack, "auto")
    assert rows is not None
    assert rows.are_of(random_stack((2, 2), seed=7))
    assert not rows.are_of(random_stack((1, 3)))
    assert rows.fit(x, None)
    assert not rows.fit(torch.zeros(2, 4, 4), None)
    assert not rows.fit(x.double(), None)
    assert not rows.fit(x, torch.zeros(2, 3, 5, dtype=torch.float64))
    stack.scaling_E[0] = 9.0  # noticed
    assert not rows.are_of(stack)


def test_gates_of_single_tokens_are_not_stretched_over_several() -> None:
    stack = random_stack((2, 2))
    rows = Mixer(MixtureSpec()).spread(routing_of((2, 1), 2, None), stack, "auto")
    assert rows is not None
    assert not rows.fit(torch.zeros(2, 6, 4), None)


@pytest.mark.parametrize(
    ("spec", "ranks", "lead", "k"),
    [
        (MixtureSpec(), (2, 0, 1), (2, 3), None),  # a missing expert's share goes to the others
        (MixtureSpec(combine="parameters"), (2, 1, 1), (2, 3), None),
        (MixtureSpec(expert_grad="sqrt_gate", train="both"), (2, 1, 1), (2, 3), None),
        (MixtureSpec(), (2, 1, 1), (), None),  # few active experts may be picked
        (MixtureSpec(), (40, 40, 40), (2, 3), 2),  # chosen experts may be cheaper than all
        (MixtureSpec(), (1,) * 17, (2, 3), None),  # spread by copies
    ],
    ids=["missing", "parameters", "sqrt gate", "static", "sparse", "many"],
)
def test_where_the_op_has_to_choose_nothing_is_spread(spec, ranks, lead, k) -> None:
    stack, routing = random_stack(ranks), routing_of(lead, len(ranks), k)
    assert Mixer(spec).spread(routing, stack, "auto") is None


@pytest.mark.parametrize("backend", ["reference", "triton"])
def test_a_named_backend_gets_the_call(backend) -> None:
    assert Mixer(MixtureSpec()).spread(routing_of((2, 3), 2, None), random_stack((2, 2)), backend) is None
