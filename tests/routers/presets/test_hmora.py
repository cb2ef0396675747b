"""HMoRA's blend of a token and a task router, by hand (ICLR 2025)."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.gates.blend import BlendGate
from compose.routers.presets.registry import preset
from compose.routers.spec import MixtureSpec


def blended(mixture, gate, x, mask):
    """``(1 - m) softmax(W x + b) + m softmax(V t + c)``, m = sigmoid(alpha)."""
    pooled = torch.stack([mixture.x[row, keep].mean(0) for row, keep in enumerate(mask)])
    tokens = torch.softmax(x @ gate.token_ED.detach().double().T + gate.token_bias_E.detach().double(), -1)
    task = torch.softmax(pooled @ gate.prompt_ED.detach().double().T + gate.prompt_bias_E.detach().double(), -1)
    share = torch.sigmoid(gate.alpha.detach().double())
    return (1 - share) * tokens + share * task[:, None]


@pytest.mark.parametrize("name", ["hmora", "hmora_top2"])
def test_token_and_task_are_blended(name, small) -> None:
    mixture = small(preset(name), targets="layers", depth=2)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]]).bool()
    mixture.run(prompt_mask=mask)
    target = "layers.1.mlp.up_proj"
    gate = mixture.routed.router.site(mixture.routed.router.site_of[target]).gate
    probs = blended(mixture, gate, mixture.read(target), mask)
    if name == "hmora_top2":
        best = probs.topk(2, dim=-1)
        probs = torch.zeros_like(probs).scatter(-1, best.indices, torch.softmax(best.values, -1))  # a second softmax
    torch.testing.assert_close(mixture.outputs[target], mixture.by_hand(probs, target), rtol=1e-5, atol=1e-6)


def test_alpha_rises_from_minus_two_to_two(small) -> None:
    mixture = small(preset("hmora"), targets="up_proj", depth=5)
    assert [float(site.gate.alpha.detach()) for site in mixture.routed.router.gates.values()] == [-2, -1, 0, 1, 2]


def test_groups_share_a_gate(routed_preset) -> None:
    layout = routed_preset("hmora", "llama").router.layout
    leaves = [[target.rpartition(".")[2] for target in site.targets] for site in layout.values()][:4]
    assert leaves == [["q_proj", "k_proj", "v_proj"], ["o_proj"], ["gate_proj", "up_proj"], ["down_proj"]]


def test_missing_experts_get_nothing_and_give_no_nan(routed_over, batch) -> None:
    spec = preset("hmora", train="router")
    routed = routed_over("llama", spec, skip="layers.0").train()
    with routed.recording() as decisions:
        routed(**batch("llama")).loss.backward()
    first = next(each for each in decisions if each.layer == 0)
    assert (first.gates_NE[:, 1] == 0).all()
    assert all(parameter.grad.isfinite().all() for parameter in routed.trained_parameters().values())


def test_it_needs_a_prompt_vector() -> None:
    with pytest.raises(IncompatibleError, match="reads the prompt too"):
        MixtureSpec(gate=BlendGate())
