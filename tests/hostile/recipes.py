"""A recipe of a merge run as ``compose merge`` runs it, up to the bytes that would be written."""

from __future__ import annotations

from pathlib import Path

import torch

from compose.adapter import Adapter
from compose.bank import Bank
from compose.cli.loading import checked_device
from compose.cli.merge import open_bank, passed_options
from compose.cli.merge_data import check_data, run_with_data
from compose.cli.merge_plan import rule_of
from compose.cli.merge_recipe import read_request
from compose.engine.merge import merge
from compose.errors import ComposeError
from compose.formats.peft import adapter_files


def merge_recipe(file: Path, *, bank: Path | None = None) -> Adapter:
    """Merge what the recipe says, with ``bank`` as ``--bank``, and check the result; refusals pass through.

    Raises:
        AssertionError: The result is not finite, or not of the shapes of the bank.
    """
    request = read_request(file, {"bank": None if bank is None else [bank]}, [])
    if not request.bank:
        raise ComposeError("give the adapters: --bank DIR")
    with_data = check_data(request)
    rule = rule_of(request, request.options)
    bank = open_bank(request)
    options = passed_options(request.options)
    device = checked_device(request.device)
    if with_data:
        merged = run_with_data(bank, request, options)
    else:
        merged = merge(
            bank, rule.name, request.weights, rank=request.rank, energy=request.energy, device=device,
            seed=request.seed, **options,
        )  # fmt: skip
    adapter_files(merged.adapter)
    check_merged(merged.adapter, bank)
    return merged.adapter


def check_merged(adapter: Adapter, bank: Bank) -> None:
    """Raise an AssertionError where an update is not finite or does not have the shape that the bank has for it."""
    for target, update in adapter.targets.items():
        delta = update.scaling * (update.b.float() @ update.a.float())
        assert torch.isfinite(delta).all(), f"the merged update of {target} is not finite"
        shape = bank.targets[target]
        assert (update.in_features, update.out_features) == (shape.in_features, shape.out_features)
