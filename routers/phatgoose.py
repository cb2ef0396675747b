"""PHATGOOSE's gates: one vector per expert and target, trained alone after the expert (arXiv:2402.05859).

Shape letters: ``B`` rows, ``T`` tokens, ``D`` in, ``E`` experts.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from compose.errors import IncompatibleError, UnknownNameError, unknown_name
from compose.kernels.mixture_lora.op import mixture_lora
from compose.routers.context import RoutingContext
from compose.routers.gates.proto import Prototypes
from compose.routers.routed import RoutedModel


def train_phatgoose_gates(
    routed: RoutedModel,
    batches_by_expert: Mapping[str, Sequence[Mapping[str, torch.Tensor]]],
    *,
    steps: int = 100,
    lr: float = 1e-3,
) -> dict[str, list[float]]:
    """Train the gates of a router with trained prototypes, expert by expert.

    For each expert alone ``y = W x + sigmoid(v . x) s B A x`` runs on its own data, with everything but the ``v`` of
    each target frozen. ``v`` starts at 0, so that all gates start at one half, and is minimised by AdamW without
    weight decay. Then the ``v`` become the router's prototypes, which are saved with it.

    Args:
        routed: The model with a router of preset ``phatgoose``.
        batches_by_expert: Expert -> batches of the model's inputs with labels, used in turn. Others keep their gates.
        steps: Updates per expert.
        lr: Step size.

    Returns:
        Expert -> loss at every step.

    Raises:
        IncompatibleError: The router has no trained prototypes, or an expert no batches.
        UnknownNameError: A name is not in the bank.
    """
    gates = _trained_gates(routed)
    if steps < 1 or not lr > 0:
        raise IncompatibleError(f"steps must be at least 1 and lr positive, got {steps}, {lr}")
    for name, batches in batches_by_expert.items():
        if name not in routed.router.experts:
            raise UnknownNameError(unknown_name("expert", name, routed.router.experts))
        if not len(batches):
            raise IncompatibleError(f"there are no batches for expert {name!r}; give at least one")
    losses = {}
    was_training = routed.training
    routed.eval()
    try:
        for name, batches in batches_by_expert.items():
            losses[name] = _train_one(routed, gates, name, batches, steps, lr)
    finally:
        routed.train(was_training)
    return losses


def _trained_gates(routed: RoutedModel) -> dict[str, Prototypes]:
    """Target -> its gate."""
    found = {}
    for name, site in routed.router.layout.items():
        gate = routed.router.site(name).gate
        if isinstance(gate, Prototypes) and gate.options.source == "trained":
            if len(site.targets) > 1 or routed.spec.gate_input != "layer":
                raise IncompatibleError("sigmoid gates train one per target: use site='linear' and gate_input='layer'")
            found[site.leader] = gate
    if not found:
        raise IncompatibleError(
            f"no gate of this router ({routed.spec.preset or 'no preset'}) has trained prototypes; use preset "
            "'phatgoose'"
        )
    return found


def _train_one(
    routed: RoutedModel,
    gates: Mapping[str, Prototypes],
    name: str,
    batches: Sequence[Mapping[str, torch.Tensor]],
    steps: int,
    lr: float,
) -> list[float]:
    expert = routed.router.experts.index(name)
    present = {target: gate for target, gate in gates.items() if bool(gate.available_E[expert])}
    single = _SigmoidGated(expert, present)
    vectors = list(single.vectors.values())
    optimizer = torch.optim.AdamW(vectors, lr=lr, weight_decay=0.0)
    losses = []
    said = set(RoutingContext.__dataclass_fields__) - {"attention_mask", "labels"}
    with routed.attached.using(single), torch.enable_grad():
        for batch in itertools.islice(itertools.cycle(batches), steps):
            loss = routed.model(**{key: value for key, value in batch.items() if key not in said}).loss
            for vector, gradient in zip(vectors, torch.autograd.grad(loss, vectors), strict=True):
                vector.grad = gradient
            optimizer.step()
            losses.append(float(loss.detach()))
    for target, vector in single.vectors.items():
        gates[target].fill_(expert, vector.detach()[None])
    return losses


class _SigmoidGated:
    """A selection: one expert, at every target behind a sigmoid of its input."""

    def __init__(self, expert: int, gates: Mapping[str, Prototypes]) -> None:
        self.expert = expert
        self.vectors = {
            target: nn.Parameter(torch.zeros_like(gate.prototypes_EPD[0, 0])) for target, gate in gates.items()
        }

    def check(self, targets: list[str], num_adapters: int) -> None:
        """It was made for this bank."""

    def to(self, device: torch.device) -> _SigmoidGated:
        """Its vectors are where the gates are."""
        return self

    def apply(self, x: torch.Tensor, call: Any) -> torch.Tensor:
        """``base + sigmoid(v . x) s B A x``."""
        vector = self.vectors.get(call.target)
        if vector is None:
            return call.base
        with torch.autocast(device_type=x.device.type, enabled=False):
            gates = torch.sigmoid(x.float() @ vector)[..., None]
        ids = torch.full(gates.shape, self.expert, device=x.device)
        return mixture_lora(x, call.stack, gates, ids, base=call.base, backend=call.backend)
