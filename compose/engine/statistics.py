"""What a merge with data needs to know of the inputs: collected from the attached model as it runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from compose.engine.attach import AttachedModel
from compose.errors import IncompatibleError

Statistics = dict[str, dict[str, torch.Tensor]]
"""Target -> name -> ``(N, ...)``: what `compose.merging.method.Context.statistics` holds for each target."""


class InputGrams:
    """Sums ``X^T X`` of every target's inputs, adapter by adapter (RegMean, arXiv:2212.09849).

    Example:
        ``grams = InputGrams(attached)``, for every adapter ``with grams.of("math"): model(**batch)``, and then
        ``merge(bank, "regmean", statistics=grams.statistics())``.

    A target's matrix is ``(I, I)`` float32 on the target's device: 64 MiB at ``I = 4096``. Embedding targets take no
    part. Every token of a batch counts, padding too, unless a mask is given to `of`.
    """

    def __init__(self, attached: AttachedModel) -> None:
        self._attached = attached
        self._sums: dict[str, dict[str, torch.Tensor]] = {name: {} for name in attached.bank.names}

    @contextmanager
    def of(self, name: str, mask_BT: torch.Tensor | None = None) -> Iterator[None]:
        """Run the model with adapter ``name`` in force inside the block, and add up its inputs.

        Args:
            name: Of the adapter.
            mask_BT: Which tokens of the batch count, bool or 0/1; None: all.
        """
        sums = self._sums[self._attached.bank.names[self._attached.bank.index(name)]]
        handles = [
            layer.register_forward_pre_hook(_adder(sums, target, mask_BT))
            for target, layer in self._attached.layers.items()
            if self._attached.bank.targets[target].kind == "linear"
        ]
        try:
            with self._attached.using(name), torch.no_grad():
                yield
        finally:
            for handle in handles:
                handle.remove()

    def statistics(self) -> Statistics:
        """Return ``{"input_gram": (N, I, I)}`` per target, adapters in the bank's order.

        Raises:
            IncompatibleError: An adapter was never run.
        """
        missing = [name for name, sums in self._sums.items() if not sums]
        if missing:
            raise IncompatibleError(
                f"no inputs were collected for {', '.join(missing)}; run the model within of(name)"
            )
        targets = {target: None for sums in self._sums.values() for target in sums}
        gaps = [f"{name} at {target}" for name, sums in self._sums.items() for target in targets if target not in sums]
        if gaps:
            raise IncompatibleError(f"no inputs were collected for {gaps[0]} (and {len(gaps) - 1} more)")
        return {
            target: {"input_gram": torch.stack([sums[target] for sums in self._sums.values()])} for target in targets
        }


def _adder(
    sums: dict[str, torch.Tensor], target: str, mask_BT: torch.Tensor | None
) -> Callable[[nn.Module, tuple[torch.Tensor, ...]], None]:
    """A forward pre-hook that adds ``X^T X`` of its module's input to ``sums[target]``."""

    def add(module: nn.Module, arguments: tuple[torch.Tensor, ...]) -> None:
        x = arguments[0].detach()
        rows = x.reshape(-1, x.shape[-1])
        if mask_BT is not None and x.shape[:-1] == mask_BT.shape:
            rows = rows[mask_BT.reshape(-1).bool()]
        product = rows.float().T @ rows.float()
        sums[target] = product if target not in sums else sums[target] + product

    return add
