"""What an evaluation found: plain values that survive JSON."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from statistics import mean, stdev
from typing import Any, NamedTuple

ORACLE = "oracle adapters"
ONE_LORA = "one LoRA"
"""Followed by its rank."""
TOLD = "mean gates, told the task"
"""Behind a router's name: the oracle task gate."""


class TaskScore(NamedTuple):
    """Means over a task's items: share answered exactly, response loss."""

    exact: float
    loss: float


@dataclass(frozen=True)
class Row:
    """One contender with one seed.

    Attributes:
        name: Contender.
        kind: ``"reference"``, ``"router"``, ``"ablation"`` (of a router) or ``"baseline"`` (trained beside it).
        seed: Of training or of the ablation; None where there is no chance.
        trained: Parameters that were trained.
        tasks: Task -> score.
        about: What was chosen on other items, in words.
        skipped: Why there are no scores; empty where there are.
    """

    name: str
    kind: str
    seed: int | None = None
    trained: int = 0
    tasks: Mapping[str, TaskScore] = field(default_factory=dict)
    about: str = ""
    skipped: str = ""

    @property
    def exact(self) -> float:
        """Macro mean over tasks."""
        return mean(score.exact for score in self.tasks.values())

    @property
    def loss(self) -> float:
        """Macro mean over tasks."""
        return mean(score.loss for score in self.tasks.values())

    def to_json(self) -> dict[str, Any]:
        """Plain values; see `row_from_json`."""
        return {**asdict(self), "tasks": {task: score._asdict() for task, score in self.tasks.items()}}


def row_from_json(plain: Mapping[str, Any]) -> Row:
    """Return the row of `Row.to_json`."""
    return Row(**{**plain, "tasks": {task: TaskScore(**score) for task, score in plain["tasks"].items()}})


class Summary(NamedTuple):
    """One contender over its seeds.

    Attributes:
        name: Contender.
        kind: See `Row`.
        trained: Parameters that were trained, of the first seed.
        exact: Mean over seeds of the macro exact match.
        spread: Standard deviation over seeds; 0.0 with one.
        loss: Mean over seeds of the macro loss.
        ratio: ``exact`` relative to the oracle adapters', over the tasks that have one; None without them.
        seeds: How many.
        about: Of the first seed.
    """

    name: str
    kind: str
    trained: int
    exact: float
    spread: float
    loss: float
    ratio: float | None
    seeds: int
    about: str


def summarise(rows: Sequence[Row]) -> list[Summary]:
    """One line per contender, in the order of first appearance; skipped rows are left out."""
    scored = [row for row in rows if not row.skipped]
    by_name: dict[str, list[Row]] = {}
    for row in scored:
        by_name.setdefault(row.name, []).append(row)
    oracle = by_name.get(ORACLE, [])
    owned = oracle[0].tasks if oracle else {}
    best = mean(row.exact for row in oracle) if oracle else 0.0
    summaries = []
    for name, group in by_name.items():
        exact = [row.exact for row in group]
        spread = stdev(exact) if len(exact) > 1 else 0.0
        first = group[0]
        ratio = mean(_over(row, owned) for row in group) / best if best else None
        loss = mean(row.loss for row in group)
        summaries.append(
            Summary(name, first.kind, first.trained, mean(exact), spread, loss, ratio, len(group), first.about)
        )
    return summaries


def task_means(rows: Sequence[Row], name: str) -> list[tuple[str, TaskScore]]:
    """Scores of a contender by task: means over its seeds."""
    group = [row for row in rows if row.name == name and not row.skipped]
    return [
        (task, TaskScore(mean(row.tasks[task].exact for row in group), mean(row.tasks[task].loss for row in group)))
        for task in (group[0].tasks if group else {})
    ]


def page_scores(rows: Sequence[Row], router: str) -> dict[str, float]:
    """Macro exact match by contender as a router's page takes it: the router is ``"router"``.

    Its ablations go by their own names, those of other routers are left out; what is told the task starts with
    ``"oracle"``.
    """
    found = {}
    for summary in summarise(rows):
        name = "router" if summary.name == router else summary.name
        if summary.kind == "ablation":
            if not summary.name.startswith(f"{router}: "):
                continue
            name = summary.name.removeprefix(f"{router}: ")
            name = f"oracle task gate ({TOLD})" if name == TOLD else name
        found[name] = summary.exact
    return found


def _over(row: Row, tasks: Iterable[str]) -> float:
    """Macro mean of the exact match over some tasks."""
    return mean(row.tasks[task].exact for task in tasks)


def verdicts(rows: Sequence[Row]) -> list[str]:
    """What a reader must not miss: a router that does not beat what knows nothing, or one LoRA, or is not varied.

    What is told the task (the oracle adapters, mean gates per task) is no rival. A router beats a contender where its
    mean exact match is higher by more than the larger of the two spreads over seeds; with equal exact match the lower
    loss decides.
    """
    summaries = {summary.name: summary for summary in summarise(rows)}
    lines = []
    for router in [summary for summary in summaries.values() if summary.kind == "router"]:
        rivals = ["uniform average", "best merge", *_lora_of_size(router.trained, summaries)]
        rivals += [name for name in summaries if name.startswith(f"{router.name}: ") and not name.endswith(TOLD)]
        known = [summaries[name] for name in rivals if name in summaries]
        lines += [
            f"{router.name} does not beat {rival.name}: exact match {router.exact:.3f} against {rival.exact:.3f}, "
            f"loss {router.loss:.3f} against {rival.loss:.3f}"
            for rival in known
            if not beats(router, rival)
        ]
        if router.seeds < 3:
            lines.append(f"{router.name} was scored with {router.seeds} seed(s); fewer than 3 say little")
    return lines


def _lora_of_size(parameters: int, summaries: Mapping[str, Summary]) -> list[str]:
    """The smallest single LoRA with at least as many trained parameters, or the largest there is."""
    loras = sorted((one for one in summaries.values() if one.name.startswith(ONE_LORA)), key=lambda one: one.trained)
    enough = [one.name for one in loras if one.trained >= parameters]
    return enough[:1] or [one.name for one in loras[-1:]]


def beats(one: Summary, other: Summary) -> bool:
    """Whether ``one`` is better by more than the spread over seeds; see `verdicts`."""
    if one.exact == other.exact:
        return one.loss < other.loss
    return one.exact - other.exact > max(one.spread, other.spread)
