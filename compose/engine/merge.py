"""merge: the adapters of a bank combined once and for all, target by target, by a registered method."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.merge_weights import Weight, parse_expression, resolve_weights
from compose.engine.merged import Merged, MergedTarget
from compose.engine.statistics import Statistics
from compose.errors import IncompatibleError
from compose.merging.deltas import Deltas, Factors, Streamed, compact, compact_dense
from compose.merging.method import METHODS, Context, Method, Space, make_method


def merge(
    bank: Bank | Sequence[Adapter],
    method: str = "sum",
    weights: Mapping[str, Weight] | Sequence[float] | str | None = None,
    *,
    space: Space = "full",
    rank: int | None = None,
    energy: float | None = None,
    device: str | torch.device = "cpu",
    seed: int = 0,
    statistics: Statistics | None = None,
    **options: Any,
) -> Merged:
    """Merge adapters into one, on their deltas ``scaling * B A``.

    An adapter that misses a target counts as zero there. Arithmetic is in float32, or float64 where a factor is;
    results have the dtype of the first adapter's factors.

    Args:
        bank: A bank, or adapters over one base.
        method: A name of ``compose.merging.method.METHODS``.
        weights: Name -> number, or name -> {target pattern: number}; a number per adapter; an expression such as
            ``"0.6*math - 0.3*toxic"``; None: all at 1. What a weight means is the method's.
        space: ``"full"``, or the method's variant on KnOTS coordinates or in the core: ``("ties", "core")`` is
            ``core_ties``.
        rank: Recompress every target to at most this rank (Eckart-Young; the error is in the result). Methods that
            make their result at a rank (``ctm``, ``lego``) make it at this one.
        energy: Recompress to the fewest singular values that hold this share of the squared norm.
        device: Where to compute.
        seed: Of random methods.
        statistics: For methods that need data: target -> name -> tensor per adapter of the bank, all of them
            (`compose.engine.statistics.InputGrams`).
        **options: The method's own.

    Raises:
        UnknownNameError: No such method or adapter.
        IncompatibleError: Options, weights or adapters do not fit; factors, or a merged update, are not finite.
    """
    bank = bank if isinstance(bank, Bank) else Bank.from_adapters(bank)
    built = checked_method(method, space, options, rank, energy)
    given = parse_expression(weights) if isinstance(weights, str) else weights
    chosen, per_target = resolve_weights(given, bank.names, list(bank.targets))
    check_count(built, method, chosen)
    adapters = [bank[one] for one in chosen]
    if whole := [one.name for one in adapters if one.full_modules]:
        raise IncompatibleError(
            f"{', '.join(whole)}: carries whole modules (modules_to_save), which a merge of deltas would drop; "
            "merge adapters without them"
        )
    dtype = next(iter(adapters[0].targets.values())).a.dtype
    targets = {}
    for target in bank.targets:
        deltas = target_deltas(adapters, target, per_target[target], torch.device(device))
        if deltas is not None:
            context = Context(seed, _of_chosen(statistics, target, bank, chosen))
            targets[target] = _merge_target(target, built, deltas, context, rank, energy).on_cpu()
    lineage = [
        {"name": one.name, "sha256": one.sha256, "weight": _said(per_target, number)}
        for number, one in enumerate(adapters)
    ]
    recipe = {
        "method": method_in(method, space), "options": options_of(built), "rank": rank, "energy": energy,
        "seed": seed, "parents": lineage,
    }  # fmt: skip
    return Merged(bank.base, targets, recipe, dtype, bank)


def checked_method(
    method: str, space: Space, options: Mapping[str, Any], rank: int | None, energy: float | None
) -> Method:
    """Return a method with its options, after all checks that need no adapter; see `merge`."""
    name = method_in(method, space)
    if rank is not None and METHODS[name].contract.own_rank:
        options = {**options, "rank": rank}
    built = make_method(name, options)
    if rank is not None and rank < 1:
        raise IncompatibleError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise IncompatibleError(f"energy must lie in (0, 1], got {energy}")
    return built


def options_of(built: Method) -> dict[str, Any]:
    """Return a method's options as they can be given again; a rank of its own is the merge's."""
    options = asdict(built)  # type: ignore[call-overload]  # methods are dataclasses
    return {key: value for key, value in options.items() if not (built.contract.own_rank and key == "rank")}


def check_count(built: Method, method: str, names: Sequence[str]) -> None:
    """Raise where a method takes another number of adapters."""
    count = built.contract.exact_count
    if count is not None and len(names) != count:
        raise IncompatibleError(f"{method!r} merges exactly {count} adapters, got {len(names)}: {', '.join(names)}")


def method_in(method: str, space: Space) -> str:
    """Return the registered name of a method in a space.

    Raises:
        UnknownNameError: There is no such method.
        IncompatibleError: The method has no variant in this space.
    """
    if space == "full":
        METHODS[method]
        return method
    name = f"{space}_{method}"
    if name not in METHODS:
        known = ", ".join(one for one in METHODS if one.startswith(f"{space}_")) or "none"
        raise IncompatibleError(f"{method!r} has no variant in the {space} space; there: {known}")
    return name


def target_deltas(
    adapters: Sequence[Adapter], target: str, weights: Sequence[float], device: torch.device
) -> Deltas | None:
    """Return one target's updates with zero-rank ones for adapters that miss it; None where all weights are 0."""
    present = [adapter.targets[target] for adapter in adapters if target in adapter.targets]
    if not present or not any(weights):
        return None
    first = present[0]
    missing = LowRank(first.a[:0], first.b[:, :0], 1.0, first.kind)
    updates = [adapter.targets.get(target, missing) for adapter in adapters]
    double = any(torch.float64 in (update.a.dtype, update.b.dtype) for update in present)
    dtype = torch.float64 if double else torch.float32
    names = [adapter.name for adapter in adapters]
    return Deltas.of(updates, weights, names=names, target=target, dtype=dtype, device=device)


def _of_chosen(
    statistics: Statistics | None, target: str, bank: Bank, chosen: Sequence[str]
) -> dict[str, torch.Tensor] | None:
    """One target's statistics of the adapters that take part."""
    if statistics is None or target not in statistics:
        return None
    places = [bank.index(name) for name in chosen]
    return {key: values[places] for key, values in statistics[target].items()}


def _merge_target(
    target: str, method: Method, deltas: Deltas, context: Context, rank: int | None, energy: float | None
) -> MergedTarget:
    error = 0.0
    try:
        result: Factors | Streamed = method.merge(deltas, context)
        if rank is not None or energy is not None:
            if isinstance(result, Streamed):
                result, error = compact_dense(result.dense(), rank, energy)
            else:
                result, error = compact(result, rank, energy)
    except torch.linalg.LinAlgError:  # of values that are not finite
        result = Factors(torch.full((1, 1), math.inf), torch.full((1, 1), math.inf))
    if isinstance(result, Factors) and not _is_finite(result):
        raise IncompatibleError(
            f"target {target}: the merged update is not finite in {deltas.dtype}; choose smaller weights or options"
        )
    return MergedTarget(result, deltas.kind, error)


def _is_finite(result: Factors) -> bool:
    """Whether no entry of ``b @ a`` can be beyond the factors' dtype: by their largest entries, NaN included."""
    a, b = (float(torch.linalg.vector_norm(factor, math.inf)) if factor.numel() else 0.0 for factor in result)
    return result.a.shape[0] * a * b <= torch.finfo(result.a.dtype).max


def _said(per_target: Mapping[str, Sequence[float]], number: int) -> Weight:
    """One adapter's weight as the recipe tells it: a number, or one per target where they differ."""
    numbers = {target: float(weights[number]) for target, weights in per_target.items()}
    distinct = set(numbers.values())
    return distinct.pop() if len(distinct) == 1 else numbers
