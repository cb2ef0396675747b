"""Saved mixtures opened over a bank, and mixtures whose gates are constants as one ordinary adapter.

Shape letters: ``E`` experts, ``r`` rank of one expert, ``D`` in, ``O`` out, ``R`` rank rows.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.attach import attach
from compose.errors import IncompatibleError, UnknownNameError, unknown_name
from compose.merging.ops import concatenate, sum_factors
from compose.routers.context import RoutingContext
from compose.routers.residual import StartResidual
from compose.routers.routed import RoutedModel
from compose.routers.routing import Routing
from compose.routers.saved import restore
from compose.routers.saved_file import SavedMixture, read_mixture
from compose.routers.steps import Seen
from compose.routers.structures import SharedA, Split

_PER_INPUT = {
    "token": "its gates change with every token",
    "sequence": "its gates change with every prompt",
    "step": "its gates change with every step of generation",
}


def open_routed(
    model: torch.nn.Module,
    bank: Bank | None,
    folder: str | Path,
    *,
    backend: str = "auto",
    allow_changed: bool = False,
) -> RoutedModel:
    """Attach a saved mixture to a base model, ready to run or to train further.

    Args:
        model: The base model.
        bank: Holds the mixture's experts, among others and in any order; they are selected by name. Not needed, and
            not read, where the folder holds the experts.
        folder: Of ``routed.save``.
        backend: See `compose.engine.attach.attach`.
        allow_changed: Accept adapters whose weights are not those the router was trained on.

    Returns:
        The mixture; ``routed.attached.detach()`` restores the base model.

    Raises:
        AdapterFormatError: The folder is damaged, incomplete or hostile.
        IncompatibleError: Bank, model and mixture do not fit together.
    """
    saved = read_mixture(folder)
    own = saved.factors is not None
    trainable = own and saved.spec.structure not in ("shared_a", "ia3")  # their parameters are the mixture's own
    attached = attach(model, _bank_of(saved, bank), backend=backend, trainable=trainable)
    try:
        return restore(attached, saved, allow_changed=allow_changed or own)
    except BaseException:
        attached.detach()
        raise


def _bank_of(saved: SavedMixture, bank: Bank | None) -> Bank:
    if saved.factors is not None:
        return Bank.from_adapters(saved.adapters(), base=saved.base)
    if bank is None:
        raise IncompatibleError(
            f"{saved.folder}: this mixture stands over a bank; give the one with {', '.join(saved.experts)}"
        )
    missing = [name for name in saved.experts if name not in bank]
    if missing:
        raise IncompatibleError(
            f"{saved.folder}: the bank lacks the experts {', '.join(missing)}; it has {', '.join(bank.names)}"
        )
    return bank.select(saved.experts)


def export_static(
    routed: RoutedModel, task: str | None = None, *, cluster: int | None = None, name: str = ""
) -> Adapter:
    """Return the adapter that computes what a mixture with constant gates computes: exact, an ordinary LoRA.

    With outputs combined the factors of all experts stand side by side, at rank ``sum r``; experts with one shared A,
    or with parameters combined, keep the rank of one.

    Args:
        routed: Gates that are static, or read the task or the cluster.
        task: Name of the task, where gates read it.
        cluster: Number of the cluster, likewise.
        name: Of the adapter; by default the preset's name and the task's or the cluster's.

    Raises:
        IncompatibleError: Gates change with the input, or experts are no low-rank updates: there is no such adapter.
        UnknownNameError: No such task.
    """
    ids = _ids(routed, task, cluster)
    updates: dict[str, LowRank] = {}
    with torch.no_grad():
        for site in routed.router.layout.values():
            routing = routed.router(site.name, Seen(None, ids, None, None, RoutingContext(), False))
            constant = Routing(*(_one_row(value) for value in routing[:4]))
            for target in site.targets:
                update = _update(routed, target, constant)
                if update is not None:
                    updates[target] = update
    if not updates:
        raise IncompatibleError("all gates are 0: the result is the base model, there is no adapter to write")
    which = [word for word in (task, None if cluster is None else f"cluster-{cluster}") if word is not None]
    chosen = name or "-".join([routed.spec.preset or "mixture", *which])
    return Adapter(chosen, routed.attached.bank.base, updates)


def _ids(routed: RoutedModel, task: str | None, cluster: int | None) -> torch.Tensor | None:
    """int64 ``(1,)``: the number that gates read; None for static gates."""
    spec, tasks, clusters = routed.spec, routed.router.tasks, routed.numbers["num_clusters"]
    if spec.structure in ("ia3", "ffn"):
        kind = {"ia3": "vectors that scale outputs", "ffn": "whole feed-forward blocks"}[spec.structure]
        raise IncompatibleError(f"this mixture's experts are {kind}, no low-rank updates: it has no form as one LoRA")
    reads = spec.gate_input if spec.gate_input in ("none", "task_id", "cluster_id") else ""
    if not reads:
        reason = _PER_INPUT.get(spec.scope, f"its gates read {spec.gate_input}")
        raise IncompatibleError(
            f"this mixture {spec.preset!r} has no form as one adapter: {reason}; run it with open_routed"
        )
    if (task is not None) > (reads == "task_id") or (cluster is not None) > (reads == "cluster_id"):
        raise IncompatibleError(f"this mixture's gates read {reads}; leave out the {'task' if task else 'cluster'}")
    device = routed.attached.device
    if reads == "task_id":
        if task is None:
            raise IncompatibleError(f"this mixture's gates read the task; name one of {', '.join(tasks)}")
        if task not in tasks:
            raise UnknownNameError(unknown_name("task", task, tasks))
        return torch.tensor([tasks.index(task)], device=device)
    if reads == "cluster_id":
        if cluster is None or not 0 <= cluster < clusters:
            raise IncompatibleError(
                f"this mixture's gates read the cluster; give one in [0, {clusters}), got {cluster}"
            )
        return torch.tensor([cluster], device=device)
    return None


def _one_row(value: Any) -> Any:
    return value[0] if isinstance(value, torch.Tensor) and value.dim() > 1 else value


def _update(routed: RoutedModel, target: str, routing: Routing) -> LowRank | None:
    """The update of one target; None where it is zero."""
    layer, structure = routed.attached.layers[target], routed.mixer.structure(target)
    if isinstance(structure, Split):
        a, b = structure.factors(layer.stack, routing)
        return _stored(a, b.T)
    gates, ids = routed.mixer.fitted(routing, layer.stack)
    weights = Routing(gates, ids, routing.logits, routing.probs).dense()
    if isinstance(structure, SharedA):
        share_E11 = (weights * structure.scaling)[:, None, None]
        return _stored(structure.a_rD, (share_E11 * structure.b_ErO).sum(0).T) if bool(weights.any()) else None
    updates, values = _experts(layer.stack), weights.tolist()
    residual = routed.mixer.residual(target)
    if isinstance(residual, StartResidual):
        here = [rank > 0 for rank in layer.stack.ranks]
        updates += _experts(residual.start(layer.stack))
        values += [-float(there) / sum(here) for there in here]
    used = [(update, weight) for update, weight in zip(updates, values, strict=True) if update.rank and weight]
    if not used:
        return None
    combined = sum_factors if routed.spec.combine == "parameters" else concatenate
    return combined([update for update, _ in used], [weight for _, weight in used])


def _experts(stack: Any) -> list[LowRank]:
    """The factors of all experts at one target, on the CPU."""
    offsets, scaling = stack.offsets, stack.scaling_E.tolist()
    rows = [slice(offsets[index], offsets[index + 1]) for index in range(stack.num_adapters)]
    a_RD, b_RO = stack.a_RD.detach().cpu(), stack.b_RO.detach().cpu()
    return [LowRank(a_RD[one], b_RO[one].T, factor) for one, factor in zip(rows, scaling, strict=True)]


def _stored(a: torch.Tensor, b: torch.Tensor) -> LowRank:
    a, b = (factor.detach().to("cpu", copy=True).contiguous() for factor in (a, b))
    return LowRank(a, b, 1.0)
