"""Router: one gate per site, from scores to gates, in float32.

Shape letters: ``B`` rows, ``T`` tokens, ``D`` width of the gate's input, ``E`` experts, ``K`` chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from compose.routers.component import SiteShape
from compose.routers.gates.linear import LinearScores
from compose.routers.gates.mlp import MlpScores
from compose.routers.perturb import add_noise, drop_experts, limit_capacity
from compose.routers.renormalise import renormalise
from compose.routers.routing import Routing
from compose.routers.sites import Site
from compose.routers.soft import soft_gates
from compose.routers.spec import MixtureSpec
from compose.routers.steps import Seen, Selected, masked


class SiteRouter(nn.Module):
    """The gate of one site: network, normalisation, selection, renormalisation.

    Attributes:
        available_E: bool: experts that take part; always-on ones do not.
        always_E: float32: 1 for always-on experts.
        num_experts: ``E``.
        gate: The network; None for constant gates of 1.
        constant: Whether always-on experts are all that the site has.
        normalise: See `compose.routers.steps`.
        select: See `compose.routers.steps`.
        soft: How it decides in few operators; None where there is more to it.
    """

    available_E: torch.Tensor
    always_E: torch.Tensor

    def __init__(self, spec: MixtureSpec, shape: SiteShape) -> None:
        super().__init__()
        self.spec = spec
        always_E = torch.tensor([name in spec.always_on for name in shape.experts])
        present_E = shape.available_E
        shape = shape._replace(available_E=present_E & ~always_E)
        self.register_buffer("available_E", shape.available_E, persistent=False)
        self.num_experts = shape.num_experts
        self.num_available = int(shape.available_E.sum())
        self.complete = self.num_available == shape.num_experts
        self.register_buffer("always_E", (always_E & present_E).float(), persistent=False)
        self.constant = not bool(shape.available_E.any())  # nothing to choose from: always-on experts alone
        self.gate = None if spec.gate is None or self.constant else spec.gate.build(shape)
        if spec.gate is not None and self.gate is not None and spec.splits > 1:
            self.gate = _Splits([self.gate, *(spec.gate.build(shape) for _ in range(spec.splits - 1))])
        self.normalise = spec.normalise.build(shape)
        self.select = spec.select.build(shape)
        self.soft = soft_gates(spec, self.select) if self.complete else None
        self.post_E: nn.Parameter | None = None
        if spec.post != "none":
            self.post_E = nn.Parameter(torch.zeros(shape.num_experts) + torch.tensor(spec.post_init))

    def forward(self, seen: Seen) -> Routing:
        """Return the routing for what the gate sees."""
        if self.gate is None:
            ones = self.available_E.float() + self.always_E
            return Routing(ones * self.spec.global_scale, None, torch.zeros_like(ones), ones)
        device = self.available_E.device.type
        if torch.is_autocast_enabled(device):
            with torch.autocast(device_type=device, enabled=False):
                return self._decide(self.gate, seen)
        return self._decide(self.gate, seen)

    def quick(self, x: torch.Tensor) -> Routing | None:
        """`forward` of layer inputs ``x (..., D)`` in few operators where that is possible, else None.

        For callers that know that nobody watches the steps and that no autocast is on.
        """
        product = self.product()
        return None if product is None or self.soft is None else self.soft.decide(*product, x)

    def product(self) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """Weight and bias of the gate where its scores are one product of its input; else None."""
        return self.gate.product() if isinstance(self.gate, LinearScores | MlpScores) else None

    def _decide(self, gate: nn.Module, seen: Seen) -> Routing:
        """From scores to gates."""
        logits = gate(seen).float()
        if not self.complete:
            logits = masked(logits, self.available_E)
        if seen.training:
            logits = add_noise(logits, self.spec.noise)
            logits = drop_experts(logits, self.spec.expert_dropout)
        normalised = self.normalise(logits, seen, self.available_E)
        scores = logits if normalised.scores is None else normalised.scores
        selected = self.select(scores, normalised.probs, seen, self.available_E)
        gates, ids = self._finish(selected, seen)
        extras = {**normalised.extras, **selected.extras}
        routing = Routing(gates, ids, logits, normalised.probs, extras)
        return routing if self.spec.splits == 1 else _side_by_side(routing)

    def _finish(self, selected: Selected, seen: Seen) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Renormalise, apply what comes after it, and add the always-on experts."""
        spec = self.spec
        gates, ids = renormalise(spec.renormalise, selected), selected.expert_ids
        if seen.training and spec.capacity is not None:
            real = _real(seen, gates)
            gates = limit_capacity(gates, ids, self.num_experts, spec.capacity, real, available=self.num_available)
        if self.post_E is not None:
            post = self.post_E if ids is None else self.post_E[ids]
            if ids is None:
                post = post * (selected.logits > float("-inf"))  # nothing for experts that were not selected
            gates = gates + post if spec.post == "bias" else gates * post
        strength = 1.0 - gates.amax(-1, keepdim=True) if spec.universal == "complement" else 1.0
        if spec.gate_power != 1:
            gates = gates**spec.gate_power
        if spec.global_scale != 1.0:
            gates = gates * spec.global_scale
        if not spec.always_on:
            return gates, ids
        if ids is None:
            return gates + self.always_E * strength, None
        extra = self.always_E.nonzero().squeeze(-1).expand(*ids.shape[:-1], -1)
        return torch.cat([gates, (strength * torch.ones_like(extra, dtype=gates.dtype))], -1), torch.cat(
            [ids, extra], -1
        )


class _Splits(nn.ModuleList):
    """One gate per split: logits ``(..., S, E)``."""

    def forward(self, seen: Seen) -> torch.Tensor:
        return torch.stack([gate(seen) for gate in self], dim=-2)


def _side_by_side(routing: Routing) -> Routing:
    """Gates ``(..., S, E)`` as ``(..., S E)``; scores and probabilities are means over splits."""
    return Routing(routing.dense().flatten(-2), None, routing.logits.mean(-2), routing.probs.mean(-2))


class Router(nn.Module):
    """All gates of a mixture; parameters stay float32 whatever dtype the model is cast to.

    Attributes:
        spec: The mixture.
        layout: Name -> site.
        site_of: Target -> name of its site.
        experts: Names of the experts, in the bank's order.
        tasks: Names of the tasks, in the order of task ids.
        gates: One `SiteRouter` per site, keyed by the site's name with dots replaced (names of modules have none).
    """

    def __init__(
        self,
        spec: MixtureSpec,
        layout: Mapping[str, Site],
        shapes: Mapping[str, SiteShape],
        *,
        experts: tuple[str, ...],
        tasks: tuple[str, ...] = (),
    ) -> None:
        super().__init__()
        self.spec = spec
        self.layout = dict(layout)
        self.site_of = {target: name for name, site in layout.items() for target in site.targets}
        self.experts = experts
        self.tasks = tasks
        self.gates = nn.ModuleDict({module_key(name): SiteRouter(spec, shapes[name]) for name in layout})

    def site(self, name: str) -> SiteRouter:
        """The gate of a site."""
        return self.gates[module_key(name)]  # type: ignore[return-value]

    def forward(self, name: str, seen: Seen) -> Routing:
        """Return the routing of a site."""
        return self.site(name)(seen)

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> Router:
        def kept(value: torch.Tensor) -> torch.Tensor:
            moved = fn(value)
            low = moved.is_floating_point() and moved.dtype not in (torch.float32, torch.float64)
            return value.to(moved.device, torch.float32) if low else moved  # moved, never rounded

        super()._apply(kept, recurse)
        return self


def module_key(name: str) -> str:
    """A site's name as a key of ``nn.ModuleDict``, which allows no dots."""
    return name.replace(".", "/")


def _real(seen: Seen, gates: torch.Tensor) -> torch.Tensor | None:
    """Which decisions are no padding, in the leading shape of the gates; None where all are real."""
    if gates.dim() != 3:
        return None
    return seen.context.real(gates.shape[0], gates.shape[1], gates.device)
