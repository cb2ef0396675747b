"""MOA and MeteoRA: gates taught the expert's number (arXiv:2403.03432, arXiv:2405.13053)."""

import pytest
import torch

from compose.routers.normalisations.softmax import Softmax
from compose.routers.presets.registry import PRESETS, preset


def test_the_chosen_adapter_acts_at_full_strength(small) -> None:
    mixture = small(preset("moa"), targets="layers")
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 0, 0, 0]]).bool()
    output = mixture.run(prompt_mask=mask)
    pooled = torch.stack([mixture.x[0, :3].mean(0), mixture.x[1, :2].mean(0)])
    best = (pooled @ mixture.gate.weight_ED.detach().double().T).argmax(-1)
    gates = torch.nn.functional.one_hot(best, 4)
    torch.testing.assert_close(output, mixture.by_hand(gates[:, None]), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 15.0])
def test_meteora_softmax_of_the_two_highest_scores(temperature, small) -> None:
    mixture = small(preset("meteora", normalise=Softmax(temperature=temperature)))
    output = mixture.run()
    scores = mixture.read() @ mixture.gate.weight_ED.detach().double().T
    best = scores.topk(2, dim=-1)
    gates = torch.zeros_like(scores).scatter(-1, best.indices, torch.softmax(best.values / temperature, -1))
    torch.testing.assert_close(output, mixture.by_hand(gates), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("name", "coefficient"), [("meteora", 50.0), ("moa", 1.0)])
def test_cross_entropy_is_added_with_its_coefficient(name, coefficient, routed_preset, say, inputs_of) -> None:
    routed, inputs, said = routed_preset(name), inputs_of("llama"), say(name)
    with torch.no_grad():
        total = routed(**inputs, **said).loss
        value = routed.last_losses["gate_ce"]
        plain = routed.model(**inputs).loss
    assert PRESETS[name].spec.losses[0].coefficient == coefficient
    torch.testing.assert_close(total, plain + coefficient * value, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["meteora", "moa"])
def test_gates_learn_the_labels(name, routed_preset, say, inputs_of) -> None:
    routed, inputs, said = routed_preset(name), inputs_of("llama"), say(name)
    optimizer = torch.optim.Adam(routed.trained_parameters().values(), lr=0.3)
    for _ in range(30):
        optimizer.zero_grad()
        routed.train()(**inputs, **said).loss.backward()
        optimizer.step()
    with torch.no_grad(), routed.eval().recording() as decisions:
        routed(**inputs, **said)
    right = [(each.gates_NE.argmax(1) == each.labels_N)[each.real_N].float().mean() for each in decisions]
    assert torch.stack(right).mean() > 0.75  # three rows, one label each: 0.33 by chance
