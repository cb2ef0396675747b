"""Merge methods compared on a person's own bank and items, at equal output rank.

Every method's result is recompressed to the same rank, dense ones too. A factor of the result, and the density where a
method has one, are chosen on a held-out split of the items; all scores are those of the other items.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np

from compose.adapter import Adapter
from compose.bank import Bank
from compose.engine.attach import attach
from compose.engine.data_merge import DATA_METHODS, make_data_method, merge_with_data
from compose.engine.merge import checked_method, merge
from compose.errors import ExamplesError, IncompatibleError
from compose.fewshot.compare_scores import RowScores, score_rows
from compose.fewshot.data_batches import data_batches
from compose.fewshot.loading import LoadedModel
from compose.fewshot.scoring import ROWS
from compose.merging.method import METHODS
from compose.text.examples import Example

SCALES = (0.35, 0.5, 0.7, 1.0, 1.4, 2.0)
"""Factors of a result that are tried; the search goes on by ``STEP`` beyond the end that is the best."""

STEP = 2**0.5
LARGEST_SCALE = 16.0
DENSITIES = (0.2, 0.5)
"""Densities tried beside a method's default."""

REFERENCES = ("base", "own adapter", "best single", "uniform sum")


class TaskItems(NamedTuple):
    """Items of one task: those that choose, and those that are scored."""

    selection: tuple[Example, ...]
    test: tuple[Example, ...]


class TaskScore(NamedTuple):
    """Means over a task's test items: share answered exactly, response loss."""

    exact: float
    loss: float


@dataclass(frozen=True)
class ComparedRow:
    """One line of the comparison; a plain value, so that ``asdict`` and JSON bring it back.

    Attributes:
        name: Of the method, or one of `REFERENCES`.
        kind: ``"reference"``, ``"method"``, or ``"data"`` for a method that was given the selection items.
        options: That were chosen.
        scale: Factor of the result that was chosen.
        selection: Macro means over tasks on the selection items: exact match and loss; empty where nothing was chosen.
        tasks: Task -> exact match and loss on its test items.
        lost: What recompression to the common rank lost, relative to the result's norm.
        seconds: That the row took.
        skipped: Why there are no scores; empty where there are.
    """

    name: str
    kind: str
    options: Mapping[str, Any] = field(default_factory=dict)
    scale: float = 1.0
    selection: Mapping[str, float] = field(default_factory=dict)
    tasks: Mapping[str, Mapping[str, float]] = field(default_factory=dict)
    lost: float = 0.0
    seconds: float = 0.0
    skipped: str = ""

    def macro(self, what: str) -> float:
        """Mean over tasks of ``"exact"`` or ``"loss"``."""
        return float(np.mean([scores[what] for scores in self.tasks.values()]))

    def normalised(self, own: ComparedRow | None) -> float | None:
        """Mean over tasks of exact match divided by the own adapter's; None where no task has one that scores."""
        shared = [] if own is None else [task for task in own.tasks if own.tasks[task]["exact"] > 0]
        if own is None or not shared or not self.tasks:
            return None
        return float(np.mean([self.tasks[task]["exact"] / own.tasks[task]["exact"] for task in shared]))


def split_items(items: Mapping[str, Sequence[Example]], share: float = 1 / 3) -> dict[str, TaskItems]:
    """Split every task's items by a hash of their contents, whatever their order; equal items stay together.

    Args:
        items: Task -> items.
        share: Of the distinct items of a task that choose, rounded, at least one; at least one is scored.

    Raises:
        ExamplesError: A task has fewer than two distinct items, or ``share`` is not in (0, 1).
    """
    if not 0 < share < 1:
        raise ExamplesError(f"the share of items that choose must lie in (0, 1), got {share}")
    found = {}
    for task, examples in items.items():
        keys = sorted({_content_hash(example) for example in examples})
        if len(keys) < 2:
            raise ExamplesError(
                f"task {task!r} has {len(keys)} distinct items; a comparison needs at least 2, to choose and to score"
            )
        chosen = set(keys[: min(max(1, round(share * len(keys))), len(keys) - 1)])
        sides = ([one for one in examples if (_content_hash(one) in chosen) == choosing] for choosing in (True, False))
        found[task] = TaskItems(*(tuple(side) for side in sides))
    return found


def _content_hash(example: Example) -> str:
    turns = [sorted(turn.items()) for turn in example.messages]
    return hashlib.sha256(repr((example.input, example.output, turns)).encode()).hexdigest()


def data_free_methods() -> list[str]:
    """Names of all methods that need no data."""
    return [name for name in METHODS if name not in DATA_METHODS]


class Comparison:
    """Methods and references, scored one row at a time.

    Args:
        loaded: The base model; the bank must not be attached.
        bank: The adapters to merge, all of them at weight 1.
        tasks: Task -> items. A task that has an adapter's name is normalised by that adapter.
        rank: Of every result, at most; None: the largest rank of the bank, which is also what methods with a rank of
            their own (``ctm``, ``lego``) give.
        data: Adapter -> examples for methods that need data of every adapter; None: the selection items of the tasks
            that have an adapter's name. Other methods with data get the selection items, task by task.
        options: Method -> options in place of its defaults; a density is then the only one tried.
        seed: Of random methods.
        device: Where merges are computed.
        rows: Scored in one batch.

    Raises:
        IncompatibleError: ``rank`` is below 1, or there is no task.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        bank: Bank,
        tasks: Mapping[str, TaskItems],
        *,
        rank: int | None = None,
        data: Mapping[str, Sequence[Example]] | None = None,
        options: Mapping[str, Mapping[str, Any]] | None = None,
        seed: int = 0,
        device: str = "cpu",
        rows: int = ROWS,
    ) -> None:
        if rank is not None and rank < 1:
            raise IncompatibleError(f"rank must be at least 1, got {rank}")
        if not tasks:
            raise IncompatibleError("there is no task to compare on; give at least one with items")
        largest = max(max(bank[name].ranks.values()) for name in bank.names)
        self.rank = largest if rank is None else rank
        self._loaded, self._bank, self._tasks = loaded, bank, dict(tasks)
        mine = {task: items.selection for task, items in tasks.items() if task in bank}
        self._data = mine if data is None else dict(data)
        self._options = dict(options or {})
        self._seed, self._device, self._rows = seed, device, rows

    def rows(self, names: Sequence[str], done: Sequence[str] = ()) -> Iterator[ComparedRow]:
        """Yield the rows of references and methods, those named in ``done`` left out."""
        for name in (name for name in names if name not in done):
            yield self.row(name)

    def row(self, name: str) -> ComparedRow:
        """Return one row: of a name of `REFERENCES`, of ``METHODS``, or of ``DATA_METHODS``.

        A method that cannot merge this bank gives a row that says why (``skipped``).

        Raises:
            UnknownNameError: There is no such method.
        """
        started = time.perf_counter()
        if name in REFERENCES:
            found = self._reference(name)
        else:
            METHODS[name] if name not in DATA_METHODS else DATA_METHODS[name]
            found = self._method(name)
        return replace(found, seconds=round(time.perf_counter() - started, 3))

    def _reference(self, name: str) -> ComparedRow:
        if name == "uniform sum":
            adapter, lost = self._merged("sum", {})
            return replace(self._scored(name, adapter, {}, 1.0, {}), kind="reference", lost=lost)
        own = [task for task in self._tasks if task in self._bank]
        if name == "own adapter" and not own:
            return ComparedRow(name, "reference", skipped="no task has the name of an adapter")
        with attach(self._loaded.model, self._bank) as attached:
            if name == "own adapter":
                gates = {task: _one_hot(self._bank.index(task), len(self._bank)) for task in own}
                return ComparedRow(name, "reference", tasks=self._test(attached, gates))
            if name == "base":
                gates = {task: np.zeros(len(self._bank)) for task in self._tasks}
                return ComparedRow(name, "reference", tasks=self._test(attached, gates))
            singles = np.eye(len(self._bank))
            exact, losses = self._select(attached, singles)
            best = _best(exact, losses)
            chosen = {"adapter": self._bank.names[best]}
            tasks = self._test(attached, dict.fromkeys(self._tasks, singles[best]))
            return ComparedRow(name, "reference", chosen, 1.0, _macro(exact[best], losses[best]), tasks)

    def _method(self, name: str) -> ComparedRow:
        kind = "data" if name in DATA_METHODS else "method"
        try:
            variants = [(options, *self._merged(name, options)) for options in self._grid(name)]
        except IncompatibleError as error:
            return ComparedRow(name, kind, skipped=str(error))
        bank = Bank.from_adapters([replace(one, name=f"v{n}") for n, (_, one, _) in enumerate(variants)])
        with attach(self._loaded.model, bank) as attached:
            number, scale, selection = self._search(attached, len(variants))
        options, adapter, lost = variants[number]
        return replace(self._scored(name, adapter, options, scale, selection), kind=kind, lost=lost)

    def _grid(self, name: str) -> list[dict[str, Any]]:
        """The options that are tried."""
        given = dict(self._options.get(name, {}))
        if name in DATA_METHODS:
            make_data_method(name, given)
            return [given]
        density = getattr(checked_method(name, "full", given, None, None), "density", None)
        if density is None or "density" in given:
            return [given]
        return [{**given, "density": one} for one in sorted({density, *DENSITIES})]

    def _merged(self, name: str, options: Mapping[str, Any]) -> tuple[Adapter, float]:
        """The adapter of a method at the common rank, and what recompression lost."""
        if name not in DATA_METHODS:
            merged = merge(self._bank, name, rank=self.rank, device=self._device, seed=self._seed, **options)
            return merged.adapter, merged.relative_error
        per_adapter = DATA_METHODS[name].contract.per_adapter
        examples = self._data if per_adapter else {task: items.selection for task, items in self._tasks.items()}
        data = {label: data_batches(self._loaded, found) for label, found in examples.items()}
        with attach(self._loaded.model, self._bank) as attached:
            merged = merge_with_data(attached, name, data, rank=self.rank, seed=self._seed, **options)
        return merged.adapter, merged.relative_error

    def _search(self, attached: Any, variants: int) -> tuple[int, float, dict[str, float]]:
        """The best variant and scale on the selection items: exact match first, then loss."""
        tried = [(number, scale) for number in range(variants) for scale in SCALES]
        exact, losses = self._select(attached, _gates(tried, variants))
        while True:
            best = _best(exact, losses)
            number, scale = tried[best]
            mine = [one for which, one in tried if which == number]
            beyond = scale * STEP if scale == max(mine) else scale / STEP if scale == min(mine) else None
            if beyond is None or not 1 / LARGEST_SCALE < beyond < LARGEST_SCALE:
                return number, scale, _macro(exact[best], losses[best])
            tried.append((number, beyond))
            more = self._select(attached, _gates(tried[-1:], variants))
            exact, losses = np.append(exact, more[0], axis=0), np.append(losses, more[1], axis=0)

    def _select(self, attached: Any, gates_PE: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means per candidate and task on the selection items: exact match and loss, ``(P, tasks)`` each."""
        items = [item for one in self._tasks.values() for item in one.selection]
        which = np.tile(np.arange(len(items)), len(gates_PE))
        found = self._score(attached, items, which, np.repeat(gates_PE, len(items), axis=0))
        ends = np.cumsum([len(one.selection) for one in self._tasks.values()])[:-1]
        return tuple(  # type: ignore[return-value]  # two of them
            np.stack([part.mean(1) for part in np.split(values.reshape(len(gates_PE), -1), ends, axis=1)], axis=1)
            for values in (found.exact.astype(float), found.losses)
        )

    def _scored(
        self, name: str, adapter: Adapter, options: Mapping[str, Any], scale: float, selection: Mapping[str, float]
    ) -> ComparedRow:
        with attach(self._loaded.model, Bank.from_adapters([replace(adapter, name="merged")])) as attached:
            tasks = self._test(attached, dict.fromkeys(self._tasks, np.array([scale])))
        return ComparedRow(name, "method", dict(options), scale, dict(selection), tasks)

    def _test(self, attached: Any, gates: Mapping[str, np.ndarray]) -> dict[str, dict[str, float]]:
        """Scores on the test items of the tasks that ``gates`` names, each under its own coefficients ``(E,)``."""
        items = [item for task in gates for item in self._tasks[task].test]
        per_row = np.stack([gates[task] for task in gates for _ in self._tasks[task].test])
        found = self._score(attached, items, np.arange(len(items)), per_row)
        ends = np.cumsum([len(self._tasks[task].test) for task in gates])[:-1]
        parts = zip(np.split(found.exact, ends), np.split(found.losses, ends), strict=True)
        scores = (TaskScore(float(exact.mean()), float(losses.mean())) for exact, losses in parts)
        return {task: one._asdict() for task, one in zip(gates, scores, strict=True)}

    def _score(self, attached: Any, items: list[Example], which: np.ndarray, gates: np.ndarray) -> RowScores:
        return score_rows(self._loaded, attached, items, which, gates, rows=self._rows)


def _one_hot(index: int, length: int) -> np.ndarray:
    return np.eye(length)[index]


def _gates(tried: Sequence[tuple[int, float]], variants: int) -> np.ndarray:
    return np.stack([scale * _one_hot(number, variants) for number, scale in tried])


def _best(exact_PT: np.ndarray, losses_PT: np.ndarray) -> int:
    """The candidate with the highest macro exact match; of equals the lowest loss, then the first."""
    exact, losses = exact_PT.mean(1), np.nan_to_num(losses_PT.mean(1), nan=np.inf)
    return min(range(len(exact)), key=lambda one: (-exact[one], losses[one], one))


def _macro(exact_T: np.ndarray, losses_T: np.ndarray) -> dict[str, float]:
    return {"exact": float(exact_T.mean()), "loss": float(losses_T.mean())}


def row_of(record: Mapping[str, Any]) -> ComparedRow:
    """Return the row of a JSON object that ``asdict`` made."""
    return ComparedRow(**record)


def record_of(row: ComparedRow) -> dict[str, Any]:
    """Return a row as a JSON object."""
    return asdict(row)
