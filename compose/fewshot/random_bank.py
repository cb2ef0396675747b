"""A bank of random adapters of the same norms: what a search gains there is fitting, not skill (arXiv:2602.12323)."""

from __future__ import annotations

import numpy as np
import torch

from compose.adapter import Adapter, LowRank
from compose.bank import Bank


def random_bank(bank: Bank, *, seed: int) -> Bank:
    """Return a bank of the same names, targets, ranks and delta norms, with Gaussian factors."""
    return Bank.from_adapters(
        [_random_like(bank[name], np.random.default_rng([seed, i])) for i, name in enumerate(bank.names)]
    )


def _random_like(adapter: Adapter, generator: np.random.Generator) -> Adapter:
    targets = {}
    for target, update in adapter.targets.items():
        a = torch.from_numpy(generator.standard_normal(update.a.shape)).to(update.a.dtype)
        b = torch.from_numpy(generator.standard_normal(update.b.shape)).to(update.b.dtype)
        wanted, drawn = update.norm(), LowRank(a, b, update.scaling, update.kind).norm()
        targets[target] = LowRank(a, b * (wanted / drawn if drawn else 0.0), update.scaling, update.kind)
    return Adapter(adapter.name, adapter.base, targets)
