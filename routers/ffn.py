"""Experts that are whole feed-forward parts, as published MixLoRA has them (arXiv:2404.15159).

Expert ``e`` is ``F_e(x) = W2_e z_e`` with ``z_e = act(W1_e x) * W3_e x`` and ``Wi_e = Wi + s_e B_e A_e``; the part
computes ``y = Σ_e g_e F_e(x)``. ``W1 x`` and ``W3 x`` are the same for all experts and computed once. Behind the
activation all is linear again: ``y = W2 Σ_e g_e z_e + Σ_e g_e s_e B_e A_e z_e``. So ``W2`` runs once per token, too,
and only low-rank updates and the activation run per routed (token, expert) pair.

Shape letters: ``B`` rows, ``T`` tokens, ``N = B T``, ``D`` width of the model, ``F`` inner width, ``E`` experts, ``K``
chosen, ``M`` routed pairs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.kernels.grouped_lora.op import GroupPlan, grouped_lora, plan_groups
from compose.routers.ffn_forms import FfnParts, find_parts
from compose.routers.router import Router
from compose.routers.routing import Routing
from compose.routers.sites import is_attention

Route = Callable[[torch.Tensor], Routing | None]


class Pairs(NamedTuple):
    """Routed (token, expert) pairs.

    Attributes:
        token_M: int64: their token, ascending.
        expert_M: int64: their expert.
        gate_M: float32.
        per_token: ``K`` where every token has as many, in order; None otherwise.
        num_tokens: ``N``.
    """

    token_M: torch.Tensor
    expert_M: torch.Tensor
    gate_M: torch.Tensor
    per_token: int | None
    num_tokens: int

    def spread(self, x_ND: torch.Tensor) -> torch.Tensor:
        """``(N, D)`` -> ``(M, D)``: the token's line for each of its pairs."""
        if self.per_token is not None:
            return x_ND.repeat_interleave(self.per_token, dim=0)
        return x_ND.index_select(0, self.token_M)

    def gathered(self, y_MO: torch.Tensor) -> torch.Tensor:
        """``(M, O)`` -> ``(N, O)``: sums over each token's pairs."""
        if self.per_token is not None:
            return y_MO.unflatten(0, (self.num_tokens, self.per_token)).sum(1)
        return y_MO.new_zeros(self.num_tokens, y_MO.shape[1]).index_add(0, self.token_M, y_MO)


def pairs_of(routing: Routing, lead: torch.Size) -> Pairs:
    """List the pairs of a routing for inputs with leading shape ``(B, T)`` or ``(N,)``; gates of 0 make none.

    With chosen experts there are ``K`` pairs per token, so nothing waits for the device.
    """
    gates, ids = routing.gates, routing.expert_ids
    while gates.dim() - 1 < len(lead):
        gates = gates.unsqueeze(-2)
        ids = None if ids is None else ids.unsqueeze(-2)
    gates = gates.expand(*lead, gates.shape[-1]).reshape(-1, gates.shape[-1])
    if ids is None:
        token_M, expert_M = (gates.detach() != 0).nonzero().unbind(1)
        return Pairs(token_M, expert_M, gates[token_M, expert_M], None, len(gates))
    ids = ids.expand(*lead, ids.shape[-1]).reshape(-1)
    token_M = torch.arange(len(gates), device=ids.device).repeat_interleave(gates.shape[1])
    return Pairs(token_M, ids, gates.reshape(-1), gates.shape[1], len(gates))


def mix_experts(x: torch.Tensor, parts: FfnParts, routing: Routing, *, backend: str = "auto") -> torch.Tensor:
    """Return ``Σ_e g_e F_e(x)``: ``x (B, T, D)`` or ``(N, D)`` -> the same with the output width.

    Args:
        x: Input of the part.
        parts: Its linear layers, with the experts' factors, and what stands between them.
        routing: Gates per token, per row, or for all.
        backend: Of `compose.kernels.grouped_lora.op.grouped_lora`.
    """
    x_ND = x.reshape(-1, x.shape[-1])
    pairs = pairs_of(routing, x.shape[:-1])
    plan = None if torch.compiler.is_compiling() or x.is_cuda else plan_groups(pairs.expert_M)
    x_MD = pairs.spread(x_ND)
    z_MF = _expanded(parts.up, x_ND, x_MD, pairs, plan, backend)
    if parts.gate is None:
        z_MF = parts.act(z_MF)
    else:
        z_MF = parts.act(_expanded(parts.gate, x_ND, x_MD, pairs, plan, backend)) * z_MF
    z_MF = parts.inner(z_MF)
    z_MF = (z_MF * pairs.gate_M[:, None].to(z_MF.dtype)).to(_dtype_of(parts.down, z_MF))
    y_NO = _contracted(parts.down, z_MF, pairs, plan, backend)
    return parts.outer(y_NO).to(x.dtype).unflatten(0, x.shape[:-1])


def _expanded(
    linear: Any, x_ND: torch.Tensor, x_MD: torch.Tensor, pairs: Pairs, plan: GroupPlan | None, backend: str
) -> torch.Tensor:
    """``(M, F)``: ``(W + s_e B_e A_e) x`` per pair, with ``W x`` once per token."""
    base_MF = pairs.spread(_base(linear)(x_ND))
    if not hasattr(linear, "stack"):
        return base_MF
    return grouped_lora(x_MD, linear.stack, pairs.expert_M, base=base_MF, plan=plan, backend=backend)


def _contracted(linear: Any, z_MF: torch.Tensor, pairs: Pairs, plan: GroupPlan | None, backend: str) -> torch.Tensor:
    """``(N, O)``: ``Σ_e (W + s_e B_e A_e) z_e + (Σ_e g_e) b`` with the gates inside ``z`` already."""
    base = _base(linear)
    y_NO = base(pairs.gathered(z_MF))
    bias = getattr(base, "bias", None)
    if bias is not None:  # the base layer added it once; the mixture holds it as often as gates sum up to
        surplus_N = pairs.gathered(pairs.gate_M[:, None]) - 1.0
        y_NO = y_NO + surplus_N.to(y_NO.dtype) * bias
    if not hasattr(linear, "stack"):
        return y_NO
    y_MO = grouped_lora(z_MF, linear.stack, pairs.expert_M, plan=plan, backend=backend)
    return y_NO + pairs.gathered(y_MO)


def _base(linear: Any) -> Any:
    return getattr(linear, "base_layer", linear)


def _dtype_of(linear: Any, z: torch.Tensor) -> torch.dtype:
    """The dtype the layer computes in: T5 keeps its last layer in float32 whatever the rest is."""
    weight = _base(linear).weight
    return weight.dtype if weight.is_floating_point() and not torch.is_autocast_enabled(z.device.type) else z.dtype


class FfnExperts(nn.Module):
    """In the place of a feed-forward part: mixes its experts while the router is in force, else calls the original.

    It has the original's children under their names, so that no path of the model changes.
    """

    def __init__(self, original: nn.Module, parts: FfnParts, route: Route, backend: str) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self.train(original.training)
        self._original, self._parts, self._route, self._backend = (original,), parts, route, backend

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(..., D)`` -> the same with the output width."""
        routing = self._route(x)
        if routing is None:
            return self._original[0](x)
        return mix_experts(x, self._parts, routing, backend=self._backend)


class _Through(nn.Module):
    """In the place of BERT's first half: hands the input on while the router is in force."""

    def __init__(self, original: nn.Module, in_force: Callable[[], bool]) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self._original, self._in_force = (original,), in_force

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if self._in_force() else self._original[0](x)


class _WithResidual(nn.Module):
    """In the place of BERT's second half, which ends in a residual sum and a layer normalisation."""

    def __init__(self, original: nn.Module, parts: FfnParts, route: Route, backend: str) -> None:
        super().__init__()
        for name, child in original.named_children():
            self.add_module(name, child)
        self._original, self._parts, self._route, self._backend = (original,), parts, route, backend

    def forward(self, hidden: torch.Tensor, residual: torch.Tensor) -> torch.Tensor:
        routing = self._route(hidden)
        if routing is None:
            return self._original[0](hidden, residual)
        norm: Any = self.LayerNorm
        return norm(mix_experts(hidden, self._parts, routing, backend=self._backend) + residual)


def place_ffn_experts(
    attached: Any, router: Router, route: Callable[[str, torch.Tensor], Routing | None], in_force: Callable[[], bool]
) -> Callable[[], None]:
    """Replace every routed feed-forward part by its experts; nothing is replaced unless all fit.

    Args:
        attached: The attached model.
        router: Its sites.
        route: Name of a site and input of its part -> routing, None while the router is not in force.
        in_force: Whether it is.

    Returns:
        What puts the very same module objects back.

    Raises:
        IncompatibleError: A part is of no known form, or experts stand on attention.
    """
    _check(router)
    backend = attached.backend
    planned: list[tuple[str, nn.Module]] = []
    for name, site in router.layout.items():
        if is_attention(site.leader):
            continue
        found = find_parts(attached, site)
        call = _routed_by(route, name)
        if found.second is None:
            planned.append((found.path, FfnExperts(found.first, found.parts, call, backend)))
        else:
            path, module = found.second
            planned.append((found.path, _Through(found.first, in_force)))
            planned.append((path, _WithResidual(module, found.parts, call, backend)))
    originals = {path: attached.model.get_submodule(path) for path, _ in planned}
    for path, module in planned:
        _set(attached.model, path, module)

    def undo() -> None:
        for path, original in originals.items():
            _set(attached.model, path, original)

    return undo


def _routed_by(route: Callable[[str, torch.Tensor], Routing | None], name: str) -> Route:
    return lambda x: route(name, x)


def _set(model: nn.Module, path: str, module: nn.Module) -> None:
    parent, _, child = path.rpartition(".")
    setattr(model.get_submodule(parent), child, module)


def _check(router: Router) -> None:
    """Experts stand on feed-forward parts, adapters outside the gates on attention."""
    names: Mapping[str, Any] = router.layout
    for name, site in names.items():
        gate = router.site(name)
        if is_attention(site.leader) and not gate.constant:
            raise IncompatibleError(
                f"{name}: these experts are feed-forward parts, and some have factors on attention; leave attention "
                "out (targets=FEED_FORWARD), or give it to one adapter that is always_on"
            )
        if not is_attention(site.leader) and bool(gate.always_E.any()):
            raise IncompatibleError(
                f"{name}: an adapter that is always_on would be one more whole feed-forward part here; "
                "let it stand on attention only"
            )
