"""The blend of two routers at its ends, and with missing experts."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.component import SiteShape
from compose.routers.context import RoutingContext
from compose.routers.gates.blend import BlendGate
from compose.routers.steps import Seen


def gate_at(layer, depth=2.0, layers=3, available=(True, True, True, True), **options):
    shape = SiteShape(
        name="site", layer=layer, num_layers=layers, in_features=5, experts=tuple("abcd"),
        available_E=torch.tensor(available), stacks={}, num_tasks=0, num_clusters=0, text_features=0,
        generator=torch.Generator().manual_seed(0), prompt_features=7,
    )  # fmt: skip
    return BlendGate(depth=depth, dropout=0.0, **options).build(shape)


def seen(tokens=3):
    generator = torch.Generator().manual_seed(1)
    x, prompt = torch.randn(2, tokens, 5, generator=generator), torch.randn(2, 7, generator=generator)
    return Seen(x, None, None, None, RoutingContext(), training=False, prompt=prompt)


def test_scores_are_the_log_of_the_blend() -> None:
    gate, inputs = gate_at(1, depth=0.0), seen()
    tokens = torch.softmax(inputs.x @ gate.token_ED.T, -1)
    task = torch.softmax(inputs.prompt @ gate.prompt_ED.T, -1)
    torch.testing.assert_close(gate(inputs).exp(), 0.5 * tokens + 0.5 * task[:, None])
    torch.testing.assert_close(torch.softmax(gate(inputs), -1), gate(inputs).exp())


def test_tokens_decide_in_the_first_layer_and_the_task_in_the_last() -> None:
    first, last, inputs = gate_at(0, depth=50.0), gate_at(2, depth=50.0), seen()
    torch.testing.assert_close(first(inputs).exp(), torch.softmax(inputs.x @ first.token_ED.T, -1))
    task = torch.softmax(inputs.prompt @ last.prompt_ED.T, -1)
    torch.testing.assert_close(last(inputs).exp(), task[:, None].expand(2, 3, 4))


def test_missing_experts_take_no_mass_and_pass_no_nan() -> None:
    gate, inputs = gate_at(1, available=(True, False, True, True)), seen()
    scores = gate(inputs)
    torch.testing.assert_close(scores[..., [0, 2, 3]].exp().sum(-1), torch.ones(2, 3))
    scores.masked_fill(~gate.available_E, float("-inf")).softmax(-1)[..., 0].sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in gate.parameters())


@pytest.mark.parametrize("options", [{"dropout": 1.0}, {"depth": float("inf")}])
def test_impossible_options_are_refused(options) -> None:
    with pytest.raises(IncompatibleError, match="dropout"):
        BlendGate(**options)
