"""Decisions with everything a loss may read: masks, tasks, labels, a missing expert, mixed ranks."""

import pytest
import torch

from compose.kernels.stack import LoraStack
from compose.routers.routing import Decisions

RANKS = (2, 1, 3, 2)
EXPERTS, WIDTH, OUT = len(RANKS), 5, 6
AVAILABLE = torch.tensor([True, True, False, True])


def make_stack(dtype=torch.float64, *, ranks=RANKS, generator=None) -> LoraStack:
    generator = generator or torch.Generator().manual_seed(9)
    rows = sum(ranks)
    a = torch.randn(rows, WIDTH, generator=generator, dtype=dtype)
    b = torch.randn(rows, OUT, generator=generator, dtype=dtype)
    return LoraStack(a, b, torch.linspace(0.5, 1.5, len(ranks)), ranks)


def decide(logits_NE, *, k=2, available=AVAILABLE, **more) -> Decisions:
    """Decisions of a softmax gate with top-k renormalised by sum; every field may be replaced."""
    lines = logits_NE.shape[0]
    logits_NE = logits_NE.masked_fill(~available, float("-inf"))
    probs_NE = torch.softmax(logits_NE, 1)
    places = torch.sort(probs_NE.detach(), dim=1, descending=True, stable=True).indices[:, :k]
    gates_NE = torch.zeros_like(probs_NE).scatter(1, places, probs_NE.gather(1, places))
    gates_NE = gates_NE / gates_NE.sum(1, keepdim=True)
    real_N = torch.ones(lines, dtype=torch.bool)
    fields = {
        "site": "site",
        "layer": 0,
        "logits_NE": logits_NE,
        "probs_NE": probs_NE,
        "gates_NE": gates_NE,
        "real_N": real_N,
        "response_N": real_N,
        "tasks_N": torch.arange(lines) % 2,
        "labels_N": torch.tensor([0, 1, 3, -1]).repeat(lines)[:lines],
        "available_E": available,
        "extras": {
            "threshold": torch.linspace(0.05, 0.3, max(1, lines))[:lines].to(logits_NE.dtype),
            "lambda": torch.linspace(-1, 0.5, max(1, lines))[:lines].to(logits_NE.dtype),
        },
        "x_ND": torch.randn(lines, WIDTH, generator=torch.Generator().manual_seed(4), dtype=logits_NE.dtype),
        "stack": make_stack(logits_NE.dtype),
        "rows_N": torch.arange(lines) // 3,
    }
    return Decisions(**{**fields, **more})


@pytest.fixture
def decisions():
    """Return a factory: ``decisions(logits_NE, k=..., available=..., <fields>)``."""
    return decide


@pytest.fixture
def stack():
    """Return a factory of factors: ``stack(dtype, ranks=...)``."""
    return make_stack


@pytest.fixture
def alone():
    """``world_sum`` of one process."""
    return lambda counts: counts
