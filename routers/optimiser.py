"""AdamW over what trains, with float32 masters of parameters in half precision, and a state that files can hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from compose.errors import AdapterFormatError


class _Trained(NamedTuple):
    """A parameter and what the optimiser changes: itself, or a float32 copy of it."""

    parameter: nn.Parameter
    master: nn.Parameter


class Optimiser:
    """AdamW with one learning rate for the router and one for the experts.

    A parameter that got no gradient is treated as having gradient 0, so that a step does not depend on which
    process, or which batch, happened to use an expert.

    Args:
        named: Name -> parameter; names that start with ``router.`` are the router's.
        weight_decay: Of all.
        betas: Of AdamW.
    """

    def __init__(
        self,
        named: Mapping[str, nn.Parameter],
        *,
        weight_decay: float = 0.0,
        betas: tuple[float, float] = (0.9, 0.999),
    ) -> None:
        self._trained = {name: _Trained(one, _master(one)) for name, one in named.items()}
        router = [pair.master for name, pair in self._trained.items() if name.startswith("router.")]
        experts = [pair.master for name, pair in self._trained.items() if not name.startswith("router.")]
        groups = [{"params": router, "part": 0}, {"params": experts, "part": 1}]
        used = [group for group in groups if group["params"]]
        self._adamw = torch.optim.AdamW(used, lr=0.0, betas=betas, weight_decay=weight_decay)

    def set_rates(self, router: float, experts: float) -> None:
        """Set the learning rates of the next step."""
        for group in self._adamw.param_groups:
            group["lr"] = experts if group["part"] else router

    def gradients(self) -> list[torch.Tensor]:
        """The gradients, zeros where there was none; the very tensors that `step` reads."""
        found = []
        for parameter, _ in self._trained.values():
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            found.append(parameter.grad)
        return found

    def step(self, max_norm: float | None) -> float:
        """Clip the gradients, change the parameters and forget the gradients.

        Args:
            max_norm: Largest norm of all gradients together; None: any.

        Returns:
            Their norm before clipping. Nothing changes where it is not finite.
        """
        self.gradients()
        for parameter, master in self._trained.values():
            assert parameter.grad is not None  # noqa: S101 - set by gradients()
            master.grad = parameter.grad.to(master.dtype)
        masters = [master for _, master in self._trained.values()]
        norm = nn.utils.get_total_norm([master.grad for master in masters if master.grad is not None])
        if not bool(norm.isfinite()):
            return float(norm)
        if max_norm is not None:
            nn.utils.clip_grads_with_norm_(masters, max_norm, norm)
        self._adamw.step()
        for parameter, master in self._trained.values():
            if master is not parameter:
                parameter.data.copy_(master.data)
            parameter.grad = master.grad = None
        return float(norm)

    def state(self) -> dict[str, torch.Tensor]:
        """``<what>:<name of parameter>`` -> tensor on the CPU; empty before the first step."""
        found: dict[str, torch.Tensor] = {}
        for name, (parameter, master) in self._trained.items():
            held = dict(self._adamw.state.get(master, {}))
            if held and master is not parameter:
                held["master"] = master.data
            for what, value in held.items():
                found[f"{what}:{name}".replace("/", ".")] = (
                    value.detach().to("cpu", copy=True).reshape(value.shape or (1,))
                )
        return found

    def load_state(self, state: Mapping[str, torch.Tensor], where: object) -> None:
        """Put back what `state` returned.

        Raises:
            AdapterFormatError: It is of other parameters.
        """
        left = dict(state)
        for name, (parameter, master) in self._trained.items():
            key = name.replace("/", ".")
            found = {what: left.pop(f"{what}:{key}", None) for what in ("step", "exp_avg", "exp_avg_sq")}
            wanted = {"step": torch.Size((1,)), **dict.fromkeys(("exp_avg", "exp_avg_sq"), master.shape or (1,))}
            if master is not parameter:
                found["master"], wanted["master"] = left.pop(f"master:{key}", None), master.shape or (1,)
            held = {what: value for what, value in found.items() if value is not None and value.shape == wanted[what]}
            if held.keys() != wanted.keys():
                raise AdapterFormatError(f"{where}: no state of the parameter {name!r} in its shape")
            if master is not parameter:
                master.data.copy_(held.pop("master").reshape(master.shape))
            self._adamw.state[master] = {
                what: value.reshape(()).clone() if what == "step" else _beside(value, master)
                for what, value in held.items()
            }
        if left:
            raise AdapterFormatError(f"{where}: {sorted(left)[0]!r} is the state of nothing that trains")


def _beside(value: torch.Tensor, master: nn.Parameter) -> torch.Tensor:
    """A copy of a state where its parameter is, in its shape."""
    return value.reshape(master.shape).to(master.device, copy=True)


def _master(parameter: nn.Parameter) -> nn.Parameter:
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return nn.Parameter(parameter.detach().float())
