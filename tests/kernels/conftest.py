"""Poisoned memory for every kernel test, and factories of stacks and ids."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from compose.kernels.stack import LoraStack

MIXED_RANKS = (3, 0, 8, 1, 16)  # rank 0: an adapter that misses the target; odd, one and unequal ranks


@pytest.fixture(autouse=True)
def _poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from ``torch.empty*`` starts as NaN (a huge number for integers), so reading it before writing shows."""

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned(*args, **kwargs) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if not torch.compiler.is_compiling() and tensor.device.type != "meta":
                with torch.no_grad():
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 127)
            return tensor

        return poisoned

    for owner, name in (
        (torch, "empty"),
        (torch, "empty_like"),
        (torch, "empty_strided"),
        (torch.Tensor, "new_empty"),
    ):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def make_stack() -> Callable[..., LoraStack]:
    """Return a factory of random stacks; scalings differ, one is negative."""

    def make(
        ranks: tuple[int, ...] = MIXED_RANKS,
        width: int = 13,
        out: int = 7,
        *,
        dtype: torch.dtype = torch.float64,
        trained: bool = False,
        equal_scaling: bool = False,
    ) -> LoraStack:
        generator = torch.Generator().manual_seed(len(ranks) + width)
        a = torch.randn(sum(ranks), width, generator=generator, dtype=torch.float64)
        b = torch.randn(sum(ranks), out, generator=generator, dtype=torch.float64)
        scaling = torch.full((len(ranks),), 0.5) if equal_scaling else torch.linspace(-0.5, 2.0, len(ranks))
        a, b = a.to(dtype).requires_grad_(trained), b.to(dtype).requires_grad_(trained)
        return LoraStack(a, b, scaling.requires_grad_(trained), ranks)

    return make


@pytest.fixture
def same_gradients() -> Callable[..., None]:
    """Return a comparator of gradients; None counts as zeros.

    The scaling is float32, so its gradient is a float32 sum in another order: 1e-4 there, the default for the rest.
    """

    def compare(actual, expected, leaves) -> None:
        for got, wanted, leaf in zip(actual, expected, leaves, strict=True):
            bounds = {"rtol": 1e-4, "atol": 1e-4} if leaf.dtype == torch.float32 else {}
            got, wanted = (torch.zeros_like(leaf) if g is None else g for g in (got, wanted))
            torch.testing.assert_close(got, wanted, **bounds)

    return compare
