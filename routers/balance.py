"""Loss-free balance: after each optimiser step, move a bias on the selection towards equal loads (arXiv:2408.15664).

The bias decides who is selected and never enters a gate, so no gradient competes with the model's loss. SMoRA
(arXiv:2501.15103) does the same with single ranks as experts. Shape letters: ``N`` decisions, ``E`` experts.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import nn

from compose.errors import IncompatibleError, UnknownNameError
from compose.routers.losses.means import chosen
from compose.routers.losses.registry import WorldSum
from compose.routers.losses.total import over_processes
from compose.routers.routing import Decisions


def selection_bias(module: nn.Module) -> torch.Tensor | None:
    """The selection bias ``(E,)`` of a selector, or of a site's router; None where it has none."""
    for name, buffer in module.named_buffers():
        if name.rpartition(".")[2] == "selection_bias_E":
            return buffer
    return None


def nudge_(bias_E: torch.Tensor, load_E: torch.Tensor, available_E: torch.Tensor, rate: float) -> None:
    """``b += rate · sign(mean load - load)`` over available experts, in place; nothing where there was no load."""
    load_E = torch.where(available_E, load_E, 0).to(bias_E.device, torch.float32)
    mean = load_E.sum() / available_E.sum().clamp(min=1).to(bias_E.device)
    step_E = torch.sign(mean - load_E).masked_fill(~available_E.to(bias_E.device), 0)
    with torch.no_grad():
        bias_E.add_(rate * step_E.to(bias_E.dtype))


class SelectionBalance:
    """Measures loads and moves selection biases: `observe` each forward in training, `step` after the optimiser.

    Args:
        sites: Name of the site -> its selector or router, with ``TopK(selection_bias=True)``. Modules without a bias
            are left alone.
        rate: Step of the bias, against probabilities in [0, 1]; 1e-3 in the paper.

    Raises:
        IncompatibleError: ``rate`` is not positive, or no site has a selection bias.
    """

    def __init__(self, sites: Mapping[str, nn.Module], *, rate: float = 1e-3) -> None:
        if not rate > 0:
            raise IncompatibleError(f"rate must be positive, got {rate}")
        self.rate = rate
        self._sites = {name: module for name, module in sites.items() if selection_bias(module) is not None}
        if not self._sites:
            raise IncompatibleError("no site has a selection bias to balance; select with TopK(selection_bias=True)")
        self._loads: dict[str, torch.Tensor] = {}
        self._available: dict[str, torch.Tensor] = {}

    def observe(self, decisions: Iterable[Decisions]) -> None:
        """Add the real decisions of a forward to the loads; decisions of sites without a bias are ignored."""
        for of_site in decisions:
            if of_site.site not in self._sites:
                continue
            with torch.no_grad():
                load_E = (chosen(of_site) & of_site.real_N[:, None]).sum(0)
            self._loads[of_site.site] = self._loads.get(of_site.site, 0) + load_E
            self._available[of_site.site] = of_site.available_E

    def load(self, site: str) -> torch.Tensor:
        """Decisions ``(E,)`` that chose each expert since the last step, in this process.

        Raises:
            UnknownNameError: Nothing was observed for such a site.
        """
        if site not in self._loads:
            raise UnknownNameError(f"no decisions of {site!r}; observed: {', '.join(self._loads) or 'none'}")
        return self._loads[site]

    def step(self, world_sum: WorldSum | None = None) -> None:
        """Move the biases by the loads of all processes and start counting anew.

        Args:
            world_sum: Adds up a vector over processes; default: the run's processes.
        """
        add = over_processes if world_sum is None else world_sum
        for site, module in self._sites.items():  # all of them, so that processes add up the same vectors
            bias_E = selection_bias(module)
            if bias_E is None:
                continue
            load_E = self._loads.get(site, torch.zeros_like(bias_E)).to(bias_E.device, torch.float32)
            available_E = self._available.get(site, torch.ones_like(bias_E, dtype=torch.bool))
            nudge_(bias_E, add(load_E), available_E, self.rate)
        self._loads.clear()
