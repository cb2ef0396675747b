"""Cosines of experts through Gram matrices equal those of the deltas themselves."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack
from compose.routers.expert_cosine import delta_products, expert_cosines


def stack(ranks: tuple[int, ...], width: int, out: int, seed: int) -> LoraStack:
    generator = torch.Generator().manual_seed(seed)
    scaling = torch.tensor([0.5, -2.0, 1.0, 3.0])[: len(ranks)]
    rows = sum(ranks)
    a, b = torch.randn(rows, width, generator=generator), torch.randn(rows, out, generator=generator)
    return LoraStack(a, b, scaling, ranks)


def deltas(given: LoraStack) -> torch.Tensor:
    each = [given.factors(index) for index in range(given.num_adapters)]
    whole = [(b.double().T @ a.double()).flatten() for a, b in each]
    return torch.stack([scaling * delta for scaling, delta in zip(given.scaling_E, whole, strict=True)])


def test_products_equal_those_of_the_deltas() -> None:
    given = stack((3, 1, 0, 5), 7, 6, 0)
    wanted = deltas(given)
    torch.testing.assert_close(delta_products(given), wanted @ wanted.T)


def test_cosines_over_several_targets() -> None:
    stacks = [stack((3, 1, 2), 7, 6, 0), stack((1, 4, 2), 5, 9, 1)]
    wanted = torch.nn.functional.normalize(torch.cat([deltas(each) for each in stacks], -1), dim=-1)
    torch.testing.assert_close(expert_cosines(stacks), wanted @ wanted.T)


def test_the_same_expert_scaled_is_the_same_and_its_negative_the_opposite() -> None:
    a, b = torch.eye(2, 5), torch.eye(2, 4)
    given = LoraStack(torch.cat([a, a, -2 * a]), torch.cat([b, 3 * b, b]), torch.tensor([1.0, 0.1, 1.0]), (2, 2, 2))
    wanted = torch.tensor([[1.0, 1, -1], [1, 1, -1], [-1, -1, 1]], dtype=torch.float64)
    torch.testing.assert_close(expert_cosines([given]), wanted)


def test_an_expert_of_zeros_has_no_direction() -> None:
    found = expert_cosines([stack((2, 0, 1), 4, 4, 0)])
    assert found.isnan().tolist() == [[False, True, False], [True, True, True], [False, True, False]]


def test_no_target_is_refused() -> None:
    with pytest.raises(IncompatibleError, match="no targets"):
        expert_cosines([])
