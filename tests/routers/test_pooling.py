"""Pooling of hidden states over masked tokens."""

import pytest
import torch

from compose.errors import IncompatibleError
from compose.routers.gates.linear import LinearGate
from compose.routers.pooling import pool, pooled_width
from compose.routers.spec import MixtureSpec

HIDDEN = torch.randn(3, 5, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
MASK = torch.tensor(
    [[True, True, True, True, True], [False, False, True, True, True], [True, False, False, False, False]]
)


def rows() -> list[torch.Tensor]:
    return [hidden[mask].float() for hidden, mask in zip(HIDDEN, MASK, strict=True)]


def test_mean_and_last_read_only_masked_tokens() -> None:
    torch.testing.assert_close(pool("mean", HIDDEN, MASK), torch.stack([row.mean(0) for row in rows()]))
    torch.testing.assert_close(pool("last", HIDDEN, MASK), torch.stack([row[-1] for row in rows()]))


def test_mean_std_is_both_statistics_each_normalised() -> None:
    def normal(vector: torch.Tensor) -> torch.Tensor:
        centred = vector - vector.mean()
        return centred / (centred.square().mean() + 1e-5).sqrt()

    expected = [torch.cat([normal(row.mean(0)), normal(row.std(0, correction=0))]) for row in rows()]
    torch.testing.assert_close(pool("mean_std", HIDDEN, MASK), torch.stack(expected))
    assert pooled_width("mean_std", 4) == 8
    assert pooled_width("mean", 4) == 4


def test_mean_std_has_finite_gradients_where_all_tokens_are_alike() -> None:
    alike = torch.ones(1, 3, 4, requires_grad=True)
    pool("mean_std", alike, torch.ones(1, 3, dtype=torch.bool)).square().sum().backward()
    assert alike.grad is not None
    assert torch.isfinite(alike.grad).all()


def test_a_gate_that_compares_inputs_with_experts_gets_no_statistics() -> None:
    with pytest.raises(IncompatibleError, match="mean_std"):
        MixtureSpec(scope="sequence", gate_input="layer", pooling="mean_std", gate=LinearGate())
