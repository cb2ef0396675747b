"""Presets that read texts: gates by their formulas, a classifier that learns, scores from outside."""

import pytest
import torch
from torch.nn import functional

from compose.errors import IncompatibleError
from compose.routers.gates.external import ExternalGate
from compose.routers.presets.registry import preset

WIDTH = 6


def gates(routed, inputs, text):
    with torch.no_grad(), routed.recording() as decisions:
        routed(**inputs, text_embedding=text)
    return decisions[0].gates_NE


def texts(rows=3, seed=0):
    return torch.randn(rows, WIDTH, generator=torch.Generator().manual_seed(seed))


def filled(routed, seed=2):
    """Centroids ``(E, D)``, put into every gate."""
    centroids = torch.randn(4, WIDTH, generator=torch.Generator().manual_seed(seed))
    for site in routed.router.gates.values():
        for expert in range(4):
            site.gate.fill_(expert, centroids[expert][None])
    return functional.normalize(centroids.double(), dim=-1)


def test_token_level(routed_over, batch) -> None:
    routed = routed_over("llama", preset("token_level"), text_features=WIDTH)
    scores = functional.normalize(texts().double(), dim=-1) @ filled(routed).T
    best = scores.argmax(1, keepdim=True)
    scores.scatter_(1, best, 4 * scores.gather(1, best))
    torch.testing.assert_close(gates(routed, batch("llama"), texts()).double(), torch.softmax(scores, -1))


def test_router_retriever(routed_over, batch) -> None:
    routed = routed_over("llama", preset("router_retriever"), text_features=WIDTH)
    scores = functional.normalize(texts().double(), dim=-1) @ filled(routed).T
    assert torch.equal(gates(routed, batch("llama"), texts()), functional.one_hot(scores.argmax(1), 4).float())


def test_dlp_takes_a_softmax_of_the_nucleus_probabilities(routed_over, batch) -> None:
    routed = routed_over("llama", preset("dlp"), text_features=WIDTH)
    gate = next(iter(routed.router.gates.values())).gate
    with torch.no_grad():
        gate.weight_ED.copy_(2 * torch.randn(4, WIDTH))
        gate.bias_E.copy_(torch.randn(4))
    weight, bias = gate.weight_ED.detach().double(), gate.bias_E.detach().double()
    probs = torch.softmax(texts().double() @ weight.T + bias, -1)
    wanted = torch.zeros_like(probs)
    for row, line in enumerate(probs):
        order, total = line.argsort(descending=True), 0.0
        kept = []
        for expert in order.tolist():
            if total < 0.9:
                kept.append(expert)
            total += float(line[expert])
        wanted[row, kept] = torch.softmax(line[kept], -1)
    torch.testing.assert_close(gates(routed, batch("llama"), texts()).double(), wanted)
    assert (wanted == 0).any()


def test_dlp_learns_which_expert_a_text_belongs_to(routed_over, batch) -> None:
    routed = routed_over("llama", preset("dlp"), text_features=WIDTH).train()
    optimizer = torch.optim.Adam(routed.trained_parameters().values(), lr=0.1)
    labels = torch.tensor([2, 0, 3])
    for _ in range(40):
        optimizer.zero_grad()
        routed(**batch("llama"), text_embedding=texts(), expert_labels=labels).loss.backward()
        optimizer.step()
    assert torch.equal(gates(routed.eval(), batch("llama"), texts()).argmax(1), labels)


def test_scores_from_outside(routed_over, batch) -> None:
    spec = preset("dlp", gate=ExternalGate(), train="none", losses=())
    with pytest.raises(IncompatibleError, match="text_features=4"):
        routed_over("llama", spec, text_features=WIDTH)
    routed = routed_over("llama", spec, text_features=4)
    scores = torch.tensor([[9.0, 0.0, 0.0, 0.0], [0.0, 0.0, 9.0, 0.0], [5.0, 5.0, -9.0, -9.0]])
    wanted = torch.tensor([[1.0, 0, 0, 0], [0, 0, 1.0, 0], [0.5, 0.5, 0, 0]])
    torch.testing.assert_close(gates(routed, batch("llama"), scores), wanted)


@pytest.mark.parametrize("name", ["token_level", "dlp", "router_retriever"])
def test_a_text_has_to_be_told(name, routed_over, batch) -> None:
    routed = routed_over("llama", preset(name), text_features=WIDTH)
    if name != "dlp":
        filled(routed)
    with pytest.raises(IncompatibleError, match="text_embedding"):
        routed(**batch("llama"))
    routed.attached.detach()
    with pytest.raises(IncompatibleError, match="text_features"):
        routed_over("llama", preset(name))
