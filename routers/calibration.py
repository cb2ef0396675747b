"""Calibration: prototypes of experts from data of theirs, for gates that compare inputs with means or centroids.

Shape letters: ``N`` inputs, ``D`` width of the gate's input, ``E`` experts, ``P`` prototypes of one expert.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Literal

import torch
from torch import nn

from compose.errors import IncompatibleError, UnknownNameError, unknown_name
from compose.kernels.mixture_lora.op import mixture_lora
from compose.kernels.stack import LoraStack
from compose.routers.centroids import centroids
from compose.routers.gates.proto import Prototypes
from compose.routers.routed import RoutedModel
from compose.routers.routing import Routing
from compose.routers.steps import Seen

Tokens = Literal["all", "last"]
Batches = Iterable[Mapping[str, torch.Tensor]]


def calibrate(
    routed: RoutedModel,
    batches_by_expert: Mapping[str, Batches],
    *,
    tokens: Tokens = "all",
    with_expert: bool = True,
) -> dict[str, int]:
    """Fill the prototypes of every gate whose source is ``"calibrated"`` from the experts' own data.

    A gate with one prototype per expert gets the mean of what it reads; one with several gets centroids by k-means.
    Padding does not count. Sums are float64, so the order and the cutting of batches do not matter beyond the rounding
    of the model's own forward pass. Prototypes are saved with the router. Mode and gradients of the model stay.

    Args:
        routed: The model with such a router.
        batches_by_expert: Expert -> batches of the model's inputs (with labels, where the model needs them) and of
            what the router is told. Routers that read text need ``text_embedding`` only. Experts left out keep theirs.
        tokens: Which tokens of a gate per token count: all real ones, or the last real one of each row.
        with_expert: Whether the expert itself acts while its data runs through the model; False: the bare base model.

    Returns:
        Expert -> number of inputs (tokens, or sequences) that its first gate counted.

    Raises:
        IncompatibleError: No gate of this router is calibrated, or an expert's data is empty.
        UnknownNameError: A name is not in the bank.
    """
    if tokens not in ("all", "last"):
        raise IncompatibleError(f"tokens must be all or last, got {tokens!r}")
    sites = _calibrated(routed)
    known = routed.router.experts
    for name in batches_by_expert:
        if name not in known:
            raise UnknownNameError(unknown_name("expert", name, known))
    counts = {}
    for name, batches in batches_by_expert.items():
        expert = known.index(name)
        collectors = {site: _Collector(gate, tokens) for site, gate in sites.items()}
        if routed.spec.gate_input == "text":
            _collect_texts(collectors, batches)
        else:
            _collect_inputs(routed, collectors, batches, expert if with_expert else None)
        counts[name] = next(iter(collectors.values())).count
        if counts[name] == 0:
            raise IncompatibleError(f"there is no data for expert {name!r}; give at least one batch with real tokens")
        for site, collector in collectors.items():
            sites[site].fill_(expert, collector.prototypes(name))
    return counts


def _calibrated(routed: RoutedModel) -> dict[str, Prototypes]:
    """Site -> gate with prototypes to fill."""
    found = {}
    for name in routed.router.layout:
        gate = routed.router.site(name).gate
        if isinstance(gate, Prototypes) and gate.options.source == "calibrated":
            found[name] = gate
    if not found:
        raise IncompatibleError(
            f"no gate of this router ({routed.spec.preset or 'no preset'}) is filled by calibration; presets that "
            "need it: avg_act, color, router_retriever, token_level"
        )
    return found


class _Collector(nn.Module):
    """Stands in for a gate: keeps what it would read, and scores all experts alike."""

    def __init__(self, gate: Prototypes, tokens: Tokens) -> None:
        super().__init__()
        prototypes_EPD = gate.prototypes_EPD
        self.num_experts, self.per_expert = prototypes_EPD.shape[:2]
        self.tokens = tokens
        self.count = 0
        self.total_D = torch.zeros(prototypes_EPD.shape[2], dtype=torch.float64)
        self.kept: list[torch.Tensor] = []

    def forward(self, seen: Seen) -> torch.Tensor:
        """Keep ``x (B, T, D)`` or ``(B, D)``; zeros ``(..., E)``."""
        assert seen.x is not None  # noqa: S101 - routers that read text do not come here
        self.add(_real_inputs(seen, self.tokens))
        return seen.x.new_zeros(*seen.x.shape[:-1], self.num_experts)

    def add(self, x_ND: torch.Tensor) -> None:
        """Count inputs."""
        x_ND = x_ND.detach().to("cpu", torch.float64)
        self.count += len(x_ND)
        self.total_D += x_ND.sum(0)
        if self.per_expert > 1:
            self.kept.append(x_ND)

    def prototypes(self, expert: str) -> torch.Tensor:
        """``(P, D)`` float32."""
        if self.per_expert == 1:
            return (self.total_D / self.count)[None].float()
        return centroids(torch.cat(self.kept), self.per_expert, what=f"expert {expert!r}").float()


def _real_inputs(seen: Seen, tokens: Tokens) -> torch.Tensor:
    """``(N, D)``: what a gate reads, without padding."""
    x = seen.x
    assert x is not None  # noqa: S101 - see the caller
    if x.dim() != 3:
        return x
    real_BT = seen.context.real(x.shape[0], x.shape[1], x.device)
    if tokens == "all":
        return x[real_BT]
    places = torch.where(real_BT, torch.arange(x.shape[1], device=x.device), -1).amax(1)
    rows = (places >= 0).nonzero().flatten()
    return x[rows, places[rows]]


def _collect_texts(collectors: Mapping[str, _Collector], batches: Batches) -> None:
    for batch in batches:
        if "text_embedding" not in batch:
            raise IncompatibleError("this router reads text: its batches need text_embedding (B, D)")
        for collector in collectors.values():
            collector.add(batch["text_embedding"])


def _collect_inputs(
    routed: RoutedModel, collectors: Mapping[str, _Collector], batches: Batches, expert: int | None
) -> None:
    """Run batches through the model with collectors in the place of gates."""
    was_training = routed.training
    routed.eval()
    try:
        with torch.no_grad(), _in_place(routed, collectors), _mixed_by(routed, _OneExpert(expert)):
            for batch in batches:
                routed(**batch)
    finally:
        routed.train(was_training)


@contextmanager
def _in_place(routed: RoutedModel, collectors: Mapping[str, _Collector]) -> Iterator[None]:
    gates = {name: routed.router.site(name).gate for name in collectors}
    try:
        for name, collector in collectors.items():
            routed.router.site(name).gate = collector
        yield
    finally:
        for name, gate in gates.items():
            routed.router.site(name).gate = gate


@contextmanager
def _mixed_by(routed: RoutedModel, mixer: Any) -> Iterator[None]:
    session = routed.session
    before = session.mixer
    session.mixer = mixer
    try:
        yield
    finally:
        session.mixer = before


class _OneExpert(nn.Module):
    """In the place of the mixer: one expert at full strength, or none, whatever the gates say."""

    def __init__(self, expert: int | None) -> None:
        super().__init__()
        self.expert = expert

    def spread(self, routing: Routing, stack: LoraStack, backend: str) -> None:
        """Gates are spread over nothing."""

    def forward(self, x: torch.Tensor, call: Any, routing: Routing) -> torch.Tensor:
        """Return the base output, plus the expert's."""
        gates = torch.zeros(call.stack.num_adapters, device=x.device)
        if self.expert is not None:
            gates[self.expert] = 1.0
        return mixture_lora(x, call.stack, gates, base=call.base, backend=call.backend)
