"""Sparsegen: the projection it is, what λ does, and one network for all sites."""

from itertools import pairwise

import pytest
import torch
from torch.testing import assert_close

from compose.errors import IncompatibleError
from compose.routers.normalisations.sparsegen import Sparsegen, sparsegen


def test_sparsemax_by_hand():
    # λ = 0, z = (1, 0.5, -1): τ = (1.5 - 1) / 2
    assert_close(sparsegen(torch.tensor([1.0, 0.5, -1.0]), torch.tensor(0.0)), torch.tensor([0.75, 0.25, 0.0]))
    # λ = 0.5: (1.5 - 0.5) / 2 = 0.5 leaves one
    assert_close(sparsegen(torch.tensor([1.0, 0.5, -1.0]), torch.tensor(0.5)), torch.tensor([1.0, 0.0, 0.0]))


@pytest.mark.parametrize("sparsity", [-30.0, -1.0, 0.0, 0.6, 0.99])
def test_it_is_the_minimum_over_the_simplex(sparsity):
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(20, 5, generator=generator, dtype=torch.float64)
    p = sparsegen(z, torch.full((20,), sparsity, dtype=torch.float64))

    def objective(q):
        return ((q - z) ** 2).sum(-1) - sparsity * (q**2).sum(-1)

    assert_close(p.sum(-1), torch.ones(20, dtype=torch.float64))
    for _ in range(200):
        q = torch.distributions.Dirichlet(torch.ones(5, dtype=torch.float64)).sample((20,))
        near = p + 0.01 * (q - p)
        assert bool((objective(p) <= objective(q) + 1e-12).all())
        assert bool((objective(p) <= objective(near) + 1e-12).all())


def test_more_sparsity_leaves_fewer_and_at_least_one():
    z = torch.randn(50, 6)
    kept = [(sparsegen(z, torch.full((50,), value)) > 0).sum(-1) for value in (-100.0, -2.0, 0.0, 0.5, 0.99)]
    assert bool((kept[0] == 6).all())
    for more, fewer in pairwise(kept):
        assert bool((fewer <= more).all())
    assert bool((kept[-1] >= 1).all())


def test_an_offset_changes_nothing_even_where_it_swallows_one_minus_lambda():
    z = torch.tensor([[0.0, 1.0, -2.0, 0.5]]) * 0.25  # exact beside the offset
    for value in (-3.0, 0.0, 0.99):
        sparsity = torch.tensor([value])
        assert_close(sparsegen(z + 2.0**20, sparsity), sparsegen(z, sparsity))


def test_equal_scores_share_equally():
    assert_close(sparsegen(torch.zeros(2, 4), torch.tensor([0.99, -5.0])), torch.full((2, 4), 0.25))


def test_lambda_is_upstreams_network(shape, seen):
    site = shape(4)
    module = Sparsegen(hidden=3).build(site)
    sight = seen(7)
    normalised = module(torch.zeros(7, 4), sight, site.available_E)
    network = module.network
    assert bool((network.bias_H == -2.5).all())
    hidden = torch.relu(sight.x @ network.weight_HD.T + network.bias_H)
    expected = torch.nn.functional.logsigmoid(hidden @ network.out_H + network.out_bias) + 0.99
    assert_close(normalised.extras["lambda"], expected)
    assert bool((normalised.extras["lambda"] < 0.99).all())


def test_shared_networks_are_one_module_per_width(shape):
    shared = {}
    first, second = (Sparsegen().build(shape(4, shared=shared)) for _ in range(2))
    other = Sparsegen().build(shape(4, shared=shared, in_features=9))
    own = Sparsegen(shared=False).build(shape(4, shared=shared))
    assert first.network is second.network
    assert other.network is not first.network
    assert own.network is not first.network
    assert len(shared) == 2
    assert len(list(torch.nn.ModuleList([first, second]).parameters())) == 4


def test_text_is_read_where_there_are_no_hidden_states(shape, seen):
    site, sight = shape(4), seen(3)
    module = Sparsegen().build(site)
    by_text = module(torch.zeros(3, 4), sight._replace(x=None, text=sight.x), site.available_E)
    assert_close(by_text.extras["lambda"], module(torch.zeros(3, 4), sight, site.available_E).extras["lambda"])


def test_splits_of_a_decision_share_lambda(shape, seen):
    site = shape(4)
    normalised = Sparsegen().build(site)(torch.randn(3, 2, 4), seen(3), site.available_E)
    assert normalised.extras["lambda"].shape == (3, 2)
    assert_close(normalised.extras["lambda"][:, 0], normalised.extras["lambda"][:, 1])


def test_gates_without_an_input_are_refused(shape, seen):
    with pytest.raises(IncompatibleError, match="reads no vectors"):
        Sparsegen().build(shape(4, in_features=0))
    Sparsegen(fixed=0.5).build(shape(4, in_features=0))
    site = shape(4)
    with pytest.raises(IncompatibleError, match="width 6, the gate reads width 4"):
        Sparsegen().build(site)(torch.zeros(2, 4), seen(2)._replace(x=torch.zeros(2, 4)), site.available_E)
    for wrong in ({"maximum": 1.0}, {"fixed": 1.0}, {"hidden": 0}):
        with pytest.raises(IncompatibleError, match="below 1"):
            Sparsegen(**wrong)
