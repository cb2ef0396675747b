"""Banks of random experts over the tiny models, and batches with prompts, padding and tasks."""

from __future__ import annotations

import pytest
import torch

from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.attach import attach
from compose.routers.builder import build
from compose.routers.component import SiteShape
from compose.routers.context import RoutingContext
from compose.routers.experts import linear_targets, linear_widths
from compose.routers.steps import Seen

RANKS = (3, 1, 8, 5)


def experts_over(
    model: torch.nn.Module,
    ranks: tuple[int, ...] = RANKS,
    *,
    skip: str = "",
    seed: int = 0,
    scaling: float | None = None,
) -> Bank:
    """Experts with random A and B on every linear layer; the second misses the targets that contain ``skip``.

    ``scaling``: Of all experts; else every expert has another.
    """
    generator = torch.Generator().manual_seed(seed)
    targets = [target for target in linear_targets(model) if "relative_attention" not in target]
    adapters = []
    for index, rank in enumerate(ranks):
        updates = {}
        for target in targets:
            width, out = linear_widths(model, target)
            a = torch.randn(rank, width, generator=generator) / width**0.5
            b = torch.randn(out, rank, generator=generator) / rank**0.5
            if not (index == 1 and skip and skip in target):
                updates[target] = LowRank(a, b, 0.5 + 0.25 * index if scaling is None else scaling)
        adapters.append(Adapter(f"expert-{index}", "tiny", updates))
    return Bank.from_adapters(adapters)


@pytest.fixture
def make_experts():
    """Return a factory of banks: ``make_experts(model, ranks, skip=...)``."""
    return experts_over


@pytest.fixture
def routed_over(tiny_model):
    """Return a factory: a tiny model with a bank and a router: ``routed_over("llama", spec)``.

    ``layers``: how many of a Llama's stay, where more are but repetition.
    """
    made = []

    def make(name: str, spec, *, ranks=RANKS, skip="", scaling=None, trainable=None, layers=None, **options):
        model = tiny_model(name)
        if layers is not None:
            del model.model.layers[layers:]
        trainable = spec.trains_experts if trainable is None else trainable
        attached = attach(model, experts_over(model, ranks, skip=skip, scaling=scaling), trainable=trainable)
        made.append(build(attached, spec, **options))
        return made[-1]

    yield make
    for routed in made:
        routed.remove()


def lm_batch(name: str, rows: int = 3, tokens: int = 9, prompt: int = 5) -> dict[str, torch.Tensor]:
    """Inputs with labels on the response, padding on the right of the last row, for any tiny language model."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 67, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    if name == "t5":
        labels = torch.randint(3, 67, (rows, 6), generator=generator)
        labels[-1, -1] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    labels = ids.clone()
    labels[:, :prompt] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


@pytest.fixture
def batch():
    """Return a factory of batches: ``batch("llama")``."""
    return lm_batch


WIDTH = 6
"""Of what the gates of `site_shape` see."""


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


@pytest.fixture
def count_calls(monkeypatch):
    """Return a function that has the calls of an attribute counted: ``calls = count_calls(owner, name)``."""

    def count(owner, name: str) -> list[int]:
        calls: list[int] = []
        original = getattr(owner, name)

        def counted(*args, **options):
            calls.append(1)
            return original(*args, **options)

        monkeypatch.setattr(owner, name, counted)
        return calls

    return count
