"""The loading path under test, as users have it, and what must hold of everything that it accepts."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from compose.bank import Bank
from compose.formats import format_of
from compose.formats.header import AdapterHeader
from compose.kernels.stack import LoraStack


def load(folder: Path) -> Bank:
    """Open an adapter as a bank, stack it, and check what came out; refusals pass through.

    Everything a user's adapter goes through before it is composed: the format is found, configuration and header are
    inspected, the file is read once, hashed, parsed, and its factors are copied into stacks.
    """
    bank = Bank.open(folder)
    check(bank, {bank.names[0]: format_of(folder).inspect(folder)})
    return bank


def check(bank: Bank, headers: Mapping[str, AdapterHeader]) -> None:
    """Raise an AssertionError where a loaded value is not finite or has not the shape its header told."""
    stacks = bank.stacks()
    for position, name in enumerate(bank.names):
        adapter = bank[name]
        header = headers[name]
        assert adapter.targets.keys() == header.targets.keys()
        assert adapter.full_modules.keys() == header.full_modules.keys()
        for path, target in header.targets.items():
            update, stack = adapter.targets[path], stacks[path]
            assert tuple(update.a.shape) == (target.rank, target.in_features)
            assert tuple(update.b.shape) == (target.out_features, target.rank)
            assert update.scaling == target.scaling
            assert abs(target.scaling) <= 1e4
            assert stack.ranks[position] == target.rank
            delta = update.scaling * (update.b.float() @ update.a.float())
            assert torch.isfinite(delta).all(), f"the update of {path} is not finite"
        for path, full in header.full_modules.items():
            assert tuple(adapter.full_modules[path].shape) == full.shape
            assert torch.isfinite(adapter.full_modules[path]).all()
    check_stacks(stacks)


def check_stacks(stacks: Mapping[str, LoraStack]) -> None:
    """Raise an AssertionError where a stack holds a value that is not finite."""
    for stack in stacks.values():
        assert torch.isfinite(stack.a_RD).all()
        assert torch.isfinite(stack.b_RO).all()
        assert torch.isfinite(stack.scaling_E).all()
