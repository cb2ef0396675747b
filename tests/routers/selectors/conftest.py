"""Sites and what their gates see, for components on their own."""

import pytest
import torch

from compose.routers.component import SiteShape
from compose.routers.context import RoutingContext
from compose.routers.steps import Seen

WIDTH = 6


def site_shape(experts=4, available=None, **more) -> SiteShape:
    fields = {
        "name": "layers.1.up",
        "layer": 1,
        "num_layers": 4,
        "in_features": WIDTH,
        "experts": tuple(f"expert-{number}" for number in range(experts)),
        "available_E": torch.ones(experts, dtype=torch.bool) if available is None else torch.tensor(available),
        "stacks": {},
        "num_tasks": 0,
        "num_clusters": 0,
        "text_features": 0,
        "generator": torch.Generator().manual_seed(3),
    }
    return SiteShape(**{**fields, **more})


def sight(*lead, training=False, dtype=torch.float32, seed=5) -> Seen:
    x = torch.randn(*lead, WIDTH, generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return Seen(x, None, None, None, RoutingContext(), training)


@pytest.fixture
def shape():
    """Return a factory: ``shape(experts, available, <fields>)``."""
    return site_shape


@pytest.fixture
def seen():
    """Return a factory: ``seen(*lead, training=...)`` with inputs ``(*lead, 6)``."""
    return sight
