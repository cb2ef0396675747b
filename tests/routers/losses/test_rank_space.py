"""Outputs compared through Gram matrices, and the deterministic sample."""

import torch
from torch.testing import assert_close

from compose.routers.losses.rank_space import activations, cosines, gram, owners, sample


def test_dot_products_are_those_of_the_outputs(stack):
    factors, x = stack(torch.float64), torch.randn(3, 5, dtype=torch.float64)
    h_SR, owner_ER = activations(x, factors), owners(factors, torch.float64)
    items = (h_SR[:, None] * owner_ER).reshape(-1, factors.num_rows)
    outputs = torch.stack(
        [
            factors.scaling_E[expert] * (x[line] @ factors.factors(expert)[0].T) @ factors.factors(expert)[1]
            for line in range(3)
            for expert in range(4)
        ]
    )
    assert_close(items @ gram(factors.b_RO) @ items.T, outputs @ outputs.T)
    expected = torch.nn.functional.cosine_similarity(outputs[:, None], outputs[None], dim=-1)
    assert_close(cosines(items @ gram(factors.b_RO) @ items.T), expected)


def test_items_without_length_have_cosine_0_and_finite_gradients():
    vectors = torch.tensor([[1.0, 0], [0, 0]], requires_grad=True)
    cosine = cosines(vectors @ vectors.T)
    cosine.sum().backward()
    assert cosine.tolist() == [[1.0, 0.0], [0.0, 0.0]]
    assert bool(vectors.grad.isfinite().all())


def test_half_precision_is_computed_in_float32(stack):
    factors = stack(torch.bfloat16)
    assert gram(factors.b_RO).dtype == torch.float32
    assert activations(torch.randn(2, 5).bfloat16(), factors).dtype == torch.float32


def test_the_sample_is_even_and_deterministic():
    mask = torch.arange(40) % 4 != 0
    assert sample(mask, 30).tolist() == mask.nonzero().squeeze(1).tolist()
    assert sample(mask, 10).tolist() == mask.nonzero().squeeze(1)[::3].tolist()
    few = sample(torch.ones(7, dtype=torch.bool), 3)
    assert few.tolist() == [0, 2, 4]
    assert sample(torch.zeros(5, dtype=torch.bool), 3).tolist() == []
