"""Stacks of random experts, the shape of a site with them, and what a gate sees."""

from __future__ import annotations

import pytest
import torch

from compose.kernels.stack import LoraStack
from compose.routers.component import SiteShape
from compose.routers.context import RoutingContext
from compose.routers.steps import Seen

RANKS = (3, 0, 1, 5)


def stack_of(ranks=RANKS, width=6, out=7, seed=0, dtype=torch.float64) -> LoraStack:
    """Random factors with scalings 0.5, 0.75 ..."""
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(sum(ranks), size, generator=generator, dtype=dtype) for size in (width, out))
    return LoraStack(a, b, 0.5 + 0.25 * torch.arange(len(ranks)), ranks)


@pytest.fixture
def make_stack():
    """Return `stack_of`."""
    return stack_of


@pytest.fixture
def shape_for():
    """Return a factory of site shapes: ``shape_for(stack)``."""

    def make(stack: LoraStack, *, in_features: int | None = None, **options) -> SiteShape:
        experts = tuple(f"expert-{index}" for index in range(stack.num_adapters))
        values = {
            "name": "layers.0.q_proj", "layer": 0, "num_layers": 1,
            "in_features": stack.a_RD.shape[1] if in_features is None else in_features, "experts": experts,
            "available_E": torch.tensor(stack.ranks) > 0, "stacks": {"layers.0.q_proj": stack}, "num_tasks": 0,
            "num_clusters": 0, "text_features": 0, "generator": torch.Generator().manual_seed(3),
        }  # fmt: skip
        return SiteShape(**{**values, **options})

    return make


@pytest.fixture
def see():
    """Return a factory of what gates see: ``see(x, stack)``."""

    def make(x=None, stack=None, *, text=None) -> Seen:
        return Seen(x, None, text, stack, RoutingContext(), False)

    return make
