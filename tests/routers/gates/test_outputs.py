"""Gates that judge outputs: entropy (LoGo), pooled outputs (MoLE), attention (AM-LoRA), scores from outside."""

import math

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.expert_outputs import expert_outputs
from compose.routers.gates.attention import AttentionGate
from compose.routers.gates.external import ExternalGate
from compose.routers.gates.output_entropy import OutputEntropyGate
from compose.routers.gates.pooled_outputs import PooledOutputsGate


def outputs(stack, x):
    results = []
    for expert in range(stack.num_adapters):
        a, b = stack.factors(expert)
        results.append(stack.scaling_E[expert].double() * (x @ a.T @ b))
    return torch.stack(results, -2)


def test_outputs_of_single_experts(make_stack) -> None:
    stack, x = make_stack(), torch.randn(2, 6, dtype=torch.float64)
    torch.testing.assert_close(expert_outputs(x, stack), outputs(stack, x))
    assert expert_outputs(x, stack)[:, 1].abs().sum() == 0


def test_inverse_entropy(make_stack, shape_for, see) -> None:
    stack, x = make_stack(), torch.randn(3, 6, dtype=torch.float64)
    probs = torch.softmax(outputs(stack, x), -1)
    wanted = 1 / (-(probs * probs.log()).sum(-1) + 1e-6)
    gate = OutputEntropyGate().build(shape_for(stack))
    torch.testing.assert_close(gate(see(x, stack)), wanted)
    torch.testing.assert_close(gate(see(x, stack))[:, 1], torch.full((3,), 1 / (math.log(7) + 1e-6)).double())


def test_pooled_outputs(make_stack, shape_for, see) -> None:
    stack, x = make_stack(), torch.randn(3, 6, dtype=torch.float64)
    gate = PooledOutputsGate().build(shape_for(stack)).double()
    assert gate.weight.shape == (4, 4 * 7)
    flat = outputs(stack, x).flatten(-2)
    normed = (flat - flat.mean(-1, keepdim=True)) / (flat.var(-1, correction=0, keepdim=True) + 1e-5).sqrt()
    torch.testing.assert_close(gate(see(x, stack)), normed @ gate.weight.T)


def test_the_output_of_a_mean_is_the_mean_of_outputs(make_stack) -> None:
    stack, x = make_stack(), torch.randn(3, 5, 6, dtype=torch.float64)
    torch.testing.assert_close(expert_outputs(x.mean(1), stack), outputs(stack, x).mean(1))


@pytest.mark.parametrize("options", [OutputEntropyGate(), PooledOutputsGate()])
def test_whole_outputs_are_for_sequences_only(options, make_stack, shape_for, see) -> None:
    stack = make_stack()
    with pytest.raises(IncompatibleError, match="scope='sequence'"):
        options.build(shape_for(stack))(see(torch.randn(2, 3, 6), stack))


def test_attention_without_outputs_is_attention_over_outputs(make_stack, shape_for, see) -> None:
    stack, x = make_stack(), torch.randn(2, 3, 6, dtype=torch.float64)
    gate = AttentionGate(width=5).build(shape_for(stack)).double()
    query = x @ gate.query_CD.T
    keys = outputs(stack, x) @ gate.key_CO.T  # (B, T, E, C)
    wanted = torch.einsum("btc,btec->bte", query, keys) / math.sqrt(5)
    got = gate(see(x, stack))
    torch.testing.assert_close(got, wanted)
    ours, theirs = (torch.autograd.grad(value.square().sum(), list(gate.parameters())) for value in (got, wanted))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other)


def test_attention_never_forms_outputs(make_stack, shape_for, see) -> None:
    """No tensor of the graph is as large as tokens x experts x output width."""
    stack = make_stack(width=6, out=64, dtype=torch.float32)
    gate = AttentionGate(width=2).build(shape_for(stack))
    sizes = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: sizes.append(tensor.numel()), lambda _: None):
        gate(see(torch.randn(4, 50, 6), stack))
    assert max(sizes) < 4 * 50 * 64


def test_scores_from_outside(make_stack, shape_for, see) -> None:
    gate = ExternalGate().build(shape_for(make_stack(), in_features=4))
    scores = torch.randn(3, 4)
    assert torch.equal(gate(see(scores, text=scores)), scores)
    with pytest.raises(IncompatibleError, match="text_features=4"):
        ExternalGate().build(shape_for(make_stack(), in_features=6))
    with pytest.raises(IncompatibleError, match="gate_input='text'"):
        gate(see(scores))


def test_options_are_checked() -> None:
    for make in (
        lambda: OutputEntropyGate(epsilon=0.0),
        lambda: PooledOutputsGate(std=-1.0),
        lambda: AttentionGate(width=0),
        lambda: AttentionGate(init="zeros"),
    ):
        with pytest.raises(IncompatibleError):
            make()
