"""merge_with_data: adapters merged by what the model does on data, run through the attached model.

A batch is what the model's ``forward`` takes by keyword: ``input_ids (B, T)``, ``attention_mask (B, T)``, and
``labels`` where a method needs them. A decoder-only model's ``labels (B, T)`` stand at the positions of their tokens
(the model shifts them), an encoder-decoder model's are ``(B, T_out)``, a classifier's ``(B,)``; -100 is not counted.
Padding never counts. The model sees positions as it makes them itself: where absolute positions matter (GPT-2) pad on
the right, or give ``position_ids``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any, ClassVar, NamedTuple, Protocol, runtime_checkable

import torch
from torch import nn

from compose.bank import Bank
from compose.engine.attach import AttachedModel
from compose.engine.merge_weights import Weight, parse_expression, resolve_weights
from compose.engine.merged import Merged
from compose.engine.predictions import Batch, token_mask
from compose.errors import IncompatibleError, UnknownNameError
from compose.merging.options import build
from compose.registry import Registry

ProgressReport = Callable[[str, int, int], None]
"""Called with the stage's name, how much of it is done, and how much there is."""


_SEEDS = (1 << 63) - 1


@dataclass(frozen=True, kw_only=True)
class DataContract:
    """What a method that merges with data asks for, and what it returns.

    Attributes:
        summary: One line for lists of methods.
        paper: Where it is from.
        labels: Batches must hold ``labels``, under the method's default options.
        per_adapter: Needs data of every adapter that takes part, under its name; else any task names serve.
        low_rank: The result is an adapter without recompression, under the method's default options.
        weighted: Takes ``weights``; else it learns them.
    """

    summary: str
    paper: str
    labels: bool
    per_adapter: bool
    low_rank: bool
    weighted: bool = True


class Outcome(NamedTuple):
    """What a method found: the merge, and what the recipe shall say of it beside options, parents and data."""

    merged: Merged
    notes: Mapping[str, Any]


@dataclass(frozen=True, eq=False)
class DataJob:
    """One call of `merge_with_data`, checked, as a method gets it.

    Attributes:
        attached: The model, in evaluation mode and with no parameter that requires gradients.
        bank: The adapters that take part, in the bank's order, with the factors that the model runs with.
        data: Name -> batches, at least one each, on the model's device; of per-adapter methods, in the bank's order.
        weights: Adapter -> weight.
        rank: See `compose.merge`.
        energy: See `compose.merge`.
        seed: Of every random choice; any integer.
        progress: Reports progress.
    """

    attached: AttachedModel
    bank: Bank
    data: Mapping[str, tuple[Batch, ...]]
    weights: Mapping[str, Weight]
    rank: int | None
    energy: float | None
    seed: int
    progress: ProgressReport

    @property
    def dtype(self) -> torch.dtype:
        """Of the result's factors, as `compose.merge` chooses it."""
        return next(iter(self.bank[self.bank.names[0]].targets.values())).a.dtype

    def generator(self) -> torch.Generator:
        """Return a generator on the CPU, seeded."""
        return torch.Generator().manual_seed(self.seed & _SEEDS)

    def need_labels(self, method: str) -> None:
        """Raise where a batch holds no labels, or none that count."""
        for name, batches in self.data.items():
            for number, batch in enumerate(batches):
                if "labels" not in batch or not bool((batch["labels"] != -100).any()):
                    lack = "has no 'labels'" if "labels" not in batch else "has only labels of -100"
                    raise IncompatibleError(
                        f"{method} needs labels: batch {number} of {name!r} {lack}; give the token ids of "
                        "the responses, and -100 elsewhere"
                    )


@runtime_checkable
class DataMethod(Protocol):
    """A method that merges with data: a frozen, keyword-only dataclass of options.

    `run` may set coefficients and hooks on ``job.attached``; it takes its hooks away itself, the caller restores
    coefficients, training mode and ``requires_grad``.
    """

    contract: ClassVar[DataContract]

    def run(self, job: DataJob) -> Outcome:
        """Return the merge."""
        ...


DATA_METHODS: Registry[type[DataMethod]] = Registry("merge method with data", package="compose.engine.data_methods")


def merge_with_data(
    attached: AttachedModel,
    method: str,
    data: Mapping[str, Sequence[Batch]],
    *,
    weights: Mapping[str, Weight] | Sequence[float] | str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    progress: ProgressReport | None = None,
    **options: Any,
) -> Merged:
    """Merge the adapters of an attached bank by a method that runs the model on data.

    The model is left as it was, to the bit and after exceptions too: weights, coefficients, hooks, training mode,
    ``requires_grad``. It runs in evaluation mode. A trained handle's factors are taken as they are now. The same seed,
    data and machine give the same result.

    Args:
        attached: The model with the bank.
        method: A name of `DATA_METHODS`.
        data: Name -> batches. Per-adapter methods (`DataContract.per_adapter`) take adapters' names, the data of one
            that does not take part is left aside; other methods take any names of tasks, which count the same each.
        weights: As in `compose.merge`, for methods that take them (`DataContract.weighted`): who takes part, and what
            the weight of each is. None: all adapters at 1.
        rank: Recompress every target to at most this rank.
        energy: Recompress to the fewest singular values that hold this share of the squared norm.
        seed: Of every random choice.
        progress: Called with a stage's name, how much of it is done, and how much there is.
        **options: The method's own: the fields of ``DATA_METHODS[method]``.

    Returns:
        The merge. Its recipe names method, options, parents with their (learned) weights, seed, the examples and
        tokens of every name in ``data``, and what the method has to tell.

    Raises:
        UnknownNameError: No such method or adapter.
        IncompatibleError: Options, weights, data or adapters do not fit; what is missing is named.
    """
    built = make_data_method(method, options)
    _check_recompression(rank, energy)
    bank, chosen = _taking_part(attached, method, built.contract, weights)
    given = _checked_data(attached, method, built.contract, data, bank)
    job = DataJob(attached, bank, given, chosen, rank, energy, seed, progress or _silent)
    with _undisturbed(attached):
        merged, notes = built.run(job)
    counts = {name: {"examples": _examples(given[name]), "tokens": _tokens(given[name])} for name in given}
    recipe = {**merged.recipe, "method": method, "options": asdict(built), "seed": seed, "data": counts, **notes}  # type: ignore[call-overload]
    return replace(merged, recipe=recipe, bank=bank)


def make_data_method(name: str, options: Mapping[str, Any]) -> DataMethod:
    """Return a method with options.

    Raises:
        UnknownNameError: No such method.
        IncompatibleError: It has no such option, or a value of another type or out of range; the message lists them.
    """
    return build(name, DATA_METHODS[name], options)


def _silent(stage: str, done: int, total: int) -> None:
    """Report nothing."""


def _check_recompression(rank: int | None, energy: float | None) -> None:
    if rank is not None and rank < 1:
        raise IncompatibleError(f"rank must be at least 1, got {rank}")
    if energy is not None and not 0 < energy <= 1:
        raise IncompatibleError(f"energy must lie in (0, 1], got {energy}")


def _taking_part(
    attached: AttachedModel,
    method: str,
    contract: DataContract,
    weights: Mapping[str, Weight] | Sequence[float] | str | None,
) -> tuple[Bank, Mapping[str, Weight]]:
    """Return the adapters that take part, with the factors in force, and their weights."""
    if attached.model.get_submodule(next(iter(attached.layers))) is not attached.layers[next(iter(attached.layers))]:
        raise IncompatibleError("this handle is detached; attach the bank again")
    if weights is not None and not contract.weighted:
        raise IncompatibleError(f"{method!r} learns the weights; leave weights out, or attach fewer adapters")
    given = parse_expression(weights) if isinstance(weights, str) else weights
    names = attached.bank.names
    if given is not None and not isinstance(given, Mapping):
        resolve_weights(given, names, list(attached.bank.targets))  # the counts must agree
        given = dict(zip(names, given, strict=True))
    given = dict.fromkeys(names, 1.0) if given is None else given
    chosen, _ = resolve_weights(given, names, list(attached.bank.targets))
    trained = any(isinstance(layer.a_RD, nn.Parameter) for layer in attached.layers.values())
    adapters = attached.export() if trained else [attached.bank[name] for name in names]
    taking_part = [adapter for adapter in adapters if adapter.name in chosen]
    if whole := [one.name for one in taking_part if one.full_modules]:
        raise IncompatibleError(
            f"{', '.join(whole)}: carries whole modules (modules_to_save), which a merge of deltas would drop; "
            "merge adapters without them"
        )
    return Bank.from_adapters(taking_part, base=attached.bank.base), {name: given[name] for name in chosen}


def _checked_data(
    attached: AttachedModel, method: str, contract: DataContract, data: Mapping[str, Sequence[Batch]], bank: Bank
) -> dict[str, tuple[Batch, ...]]:
    """Return the batches a method shall see, on the model's device; raise where some are missing or misshapen."""
    if contract.per_adapter:
        if unknown := [name for name in data if name not in attached.bank]:
            known = ", ".join(attached.bank.names)
            raise UnknownNameError(
                f"there is data for {unknown[0]!r}, which is no adapter of the bank (known: {known})"
            )
        if missing := [name for name in bank.names if name not in data]:
            raise IncompatibleError(f"{method!r} needs data of every adapter; there is none for {', '.join(missing)}")
    names = list(bank.names) if contract.per_adapter else list(data)
    if not names:
        raise IncompatibleError(f"{method!r} needs data, got none")
    if empty := [name for name in names if not len(data[name])]:
        raise IncompatibleError(f"there are no batches for {', '.join(empty)}; give at least one")
    return {name: tuple(_placed(batch, name, attached.device) for batch in data[name]) for name in names}


def _placed(batch: Batch, name: str, device: torch.device) -> Batch:
    if not isinstance(batch, Mapping):
        raise IncompatibleError(
            f"a batch of {name!r} must map the model's arguments to tensors, got a {type(batch).__name__}; "
            "give a list of batches for every name"
        )
    wrong = [key for key, value in batch.items() if not isinstance(value, torch.Tensor) or value.dim() == 0]
    rows = {key: len(value) for key, value in batch.items() if key not in wrong}
    if wrong or not rows or len(set(rows.values())) > 1 or 0 in rows.values():
        said = f"{wrong[0]!r} is no tensor with rows" if wrong else f"rows: {rows}"
        raise IncompatibleError(
            f"a batch of {name!r} must map the model's arguments to tensors with the same rows, at least 1; {said}"
        )
    return {key: value.to(device) for key, value in batch.items()}


def rows_of(batch: Batch) -> int:
    """Return the number of examples of a batch."""
    return len(next(iter(batch.values())))


def _examples(batches: Sequence[Batch]) -> int:
    return sum(rows_of(batch) for batch in batches)


def _tokens(batches: Sequence[Batch]) -> int:
    """Tokens of the inputs, padding left out."""
    total = 0
    for batch in batches:
        if (mask := token_mask(batch)) is not None:
            total += int(mask.sum())
        elif "input_ids" in batch:
            total += batch["input_ids"].numel()
    return total


@contextmanager
def _undisturbed(attached: AttachedModel) -> Iterator[None]:
    """Run in evaluation mode without gradients of parameters, and restore all that a method may change."""
    active = attached.active
    modes = [(module, module.training) for module in attached.model.modules()]
    wanted = [parameter for parameter in attached.model.parameters() if parameter.requires_grad]
    try:
        attached.model.eval()
        for parameter in wanted:
            parameter.requires_grad_(False)
        with torch.inference_mode(False):  # in it there are no gradients, even where they are enabled
            yield
    finally:
        for parameter in wanted:
            parameter.requires_grad_(True)
        for module, training in modes:
            module.training = training
        attached.set(active)
