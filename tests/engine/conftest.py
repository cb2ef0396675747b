"""Random adapters over any model: mixed ranks, missing targets, an embedding where there is one."""

import pytest
import torch
from torch import nn

from compose.adapter import Adapter, LowRank
from compose.bank import Bank

RANKS = (3, 1, 8, 5)


def widths(module: nn.Module) -> tuple[str, int, int] | None:
    if isinstance(module, nn.Linear):
        return "linear", module.in_features, module.out_features
    if type(module).__name__ == "Conv1D":
        return "linear", *module.weight.shape
    return None


def random_adapter(model: nn.Module, name: str, rank: int, *, skip: str = "", embeddings: bool = False) -> Adapter:
    generator = torch.Generator().manual_seed(len(name) + rank)
    targets = {}
    for path, module in model.named_modules():
        shape = widths(module)
        if embeddings and isinstance(module, nn.Embedding) and "position" not in path and "wpe" not in path:
            shape = ("embedding", module.num_embeddings, module.embedding_dim)
        if shape is None or (skip and skip in path) or "relative_attention" in path or "lm_head" in path:
            continue
        kind, width_in, width_out = shape
        a = torch.randn(rank, width_in, generator=generator) / width_in**0.5
        b = torch.randn(width_out, rank, generator=generator) / rank**0.5
        targets[path] = LowRank(a, b, 0.5 + 0.25 * rank, kind)
    return Adapter(name, "tiny", targets)


@pytest.fixture
def make_bank():
    """Return a factory: a bank of four adapters of ranks 3, 1, 8, 5; the second misses the first layer's targets."""

    def make(model: nn.Module, *, embeddings: bool = False) -> Bank:
        skips = ("", "0", "", "")
        return Bank.from_adapters(
            [
                random_adapter(model, f"expert-{i}", rank, skip=skip, embeddings=embeddings)
                for i, (rank, skip) in enumerate(zip(RANKS, skips, strict=True))
            ]
        )

    return make


@pytest.fixture
def dense_copy():
    """Return a function: a deep copy of a model with ``{target: delta (O, I)}`` added to its weights."""
    import copy

    def add(model: nn.Module, deltas: dict[str, torch.Tensor]) -> nn.Module:
        changed = copy.deepcopy(model)
        for target, delta in deltas.items():
            module = changed.get_submodule(target)
            transpose = isinstance(module, nn.Embedding) or type(module).__name__ == "Conv1D"
            # Tied weights must not see the change: adapters act on one module only.
            module.weight = nn.Parameter(module.weight.detach() + (delta.T if transpose else delta))
        return changed

    return add
