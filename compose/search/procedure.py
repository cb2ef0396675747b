"""`search`: one call from an objective to coefficients, with budget, guard, journal and a full account of itself."""

from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from compose.errors import IncompatibleError
from compose.search.auto import Auto, Stage, Staged, run_auto
from compose.search.evaluator import Budget, Evaluator, Progress
from compose.search.guard import Candidate, Decision, Guard, GuardRow, Kind, choose
from compose.search.journal import Journal, JournalFile
from compose.search.objective import Objective, normalised_example_weights
from compose.search.strategy import STRATEGIES, Strategy

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    from compose.search.space import Space

logger = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class SearchResult:
    """What a search found and what it cost.

    Attributes:
        weights: ``(G, N)``; all 0 when the base was chosen.
        value: Penalised mean loss of ``weights`` on all examples.
        per_example: ``(S,)`` losses of ``weights``.
        base_per_example: ``(S,)`` losses of w = 0.
        choice: "base", "single", "scalar" or "layerwise".
        why: The choice in words.
        strategy: What really ran.
        stages: Every stage with scores and cost.
        guard: The guard's table; empty for an unguarded search.
        history: ``(cost, best penalised value on all examples)`` after every population.
        evaluations: Candidates evaluated.
        cost: Forward-equivalents spent.
        invalid: Candidates whose losses or gradients were not finite.
        replayed: Evaluations answered from the journal (0 for an uninterrupted run; all else is equal to the bit).
    """

    weights: np.ndarray
    value: float
    per_example: np.ndarray
    base_per_example: np.ndarray
    choice: Kind
    why: str
    strategy: str
    stages: tuple[Stage, ...]
    guard: tuple[GuardRow, ...]
    history: tuple[tuple[float, float], ...]
    evaluations: int
    cost: float
    invalid: int
    replayed: int = 0


def search(
    objective: Objective,
    space: Space,
    *,
    strategy: str | Strategy | Auto = "auto",
    budget: Budget | None = None,
    seed: int = 0,
    guard: Guard | None = None,
    starts: np.ndarray | None = None,
    journal: JournalFile | None = None,
    progress: Callable[[Progress], None] | None = None,
) -> SearchResult:
    """Search for coefficients of low penalised loss.

    ``"auto"`` runs the stages of `compose.search.auto` and always guards its choice. A named strategy searches all D
    coefficients; without a guard its best evaluated point is returned (which may be the base), with one it is also run
    on every fold and must clearly beat base and best single.

    Args:
        objective: The losses; see `Objective`.
        space: Adapters, groups, bounds, penalties.
        strategy: A name of `strategy_names`, or options (``Cma(sigma0=0.3)``, ``Auto(...)``).
        budget: Default ``Budget(cost=1000)``. The base is always evaluated first and counts; a candidate asked
            twice is answered from memory and counts once.
        seed: Decides every random choice.
        guard: Default: ``Guard()`` for "auto", none for a named strategy.
        starts: ``(M, D)`` start points for a named strategy.
        journal: Records every evaluation; a resumed search ends equal to the bit to an uninterrupted one.
        progress: Called after every population.

    Raises:
        UnknownNameError: No such strategy.
        IncompatibleError: The objective's arrays, the starts or the options do not fit.
        RunFolderError: The journal exists, is damaged, or is another run's.
    """
    options = resolve_strategy(strategy)
    budget = budget or Budget(cost=1000.0)
    if isinstance(options, Auto):
        guard = guard or Guard()
    starts = _checked_starts(starts, space, options)
    plan = _Plan(space, options, budget, seed, guard, starts)
    if journal is None:
        return plan.run(objective, progress)
    with Journal(journal.path, plan.identity(objective, journal.fingerprint), resume=journal.resume) as opened:
        result = plan.run(opened.record(objective), progress)
        return replace(result, replayed=opened.replayed)


def strategy_names() -> list[str]:
    """Return every name `search` accepts: "auto" and the registered strategies."""
    return ["auto", *STRATEGIES]


def resolve_strategy(strategy: str | Strategy | Auto) -> Strategy | Auto:
    """Return options as they are, and a name's options with their defaults.

    Raises:
        UnknownNameError: No such strategy; the message lists the known ones.
    """
    if not isinstance(strategy, str):
        return strategy
    if strategy == "auto":
        return Auto()
    return STRATEGIES[strategy]()


@dataclass(frozen=True)
class _Plan:
    space: Space
    options: Strategy | Auto
    budget: Budget
    seed: int
    guard: Guard | None
    starts: np.ndarray | None

    def identity(self, objective: Objective, given: Mapping[str, Any]) -> dict[str, Any]:
        """Return everything that decides the result, for the journal's header."""
        options: Any = self.options
        return {
            "given": dict(given),
            "strategy": {"name": type(options).__name__, **asdict(options)},
            "space": asdict(self.space),
            "budget": asdict(self.budget),
            "guard": None if self.guard is None else asdict(self.guard),
            "seed": self.seed,
            "starts": None if self.starts is None else self.starts.tolist(),
            "example_weights": normalised_example_weights(objective).tolist(),
        }

    def run(self, objective: Objective, progress: Callable[[Progress], None] | None) -> SearchResult:
        evaluator = Evaluator(objective, self.space, self.budget, progress)
        if isinstance(self.options, Auto):
            staged = run_auto(evaluator, self.space, self.options, self.guard or Guard(), self.seed)
        else:
            staged = self._run_named(evaluator, self.options)
        decision = self._decide(evaluator, staged)
        ran = "; ".join(f"{stage.name}: {stage.note}" for stage in staged.stages)
        logger.info("search ended: %s", decision.why)
        return SearchResult(
            weights=decision.chosen.weights.reshape(self.space.num_groups, self.space.num_adapters),
            value=decision.chosen.value,
            per_example=decision.chosen.losses,
            base_per_example=staged.candidates[0].losses,
            choice=decision.chosen.kind,
            why=decision.why,
            strategy=f"auto ({ran})" if isinstance(self.options, Auto) else ran,
            stages=tuple(staged.stages),
            guard=decision.table,
            history=tuple(evaluator.history),
            evaluations=evaluator.evaluations,
            cost=evaluator.cost,
            invalid=evaluator.invalid,
        )

    def _run_named(self, evaluator: Evaluator, strategy: Strategy) -> Staged:
        guard = self.guard or Guard(max_folds=0)
        staged = Staged(evaluator, self.space, guard, guard.max_folds, self.seed)
        staged.base()
        if self.guard is not None:
            staged.singles()
        kind = self._kind()
        # The base is in memory already, so a strategy that begins there can ask for one candidate more.
        evaluations = evaluator.affordable(gradient=False) // staged.num_lanes + 1
        starts = None if self.starts is None else [self.starts] * staged.num_lanes
        points = staged.fit(kind, strategy, starts, evaluations=evaluations)
        if points is not None:
            staged.enter(kind, points)
        return staged

    def _decide(self, evaluator: Evaluator, staged: Staged) -> Decision:
        if self.guard is not None:
            return choose(staged.candidates, evaluator.example_weights, self.guard)
        best = evaluator.best
        kind: Kind = self._kind() if best.weights.any() else "base"
        chosen = Candidate(kind, best.weights, best.losses, best.value, None)
        return Decision(chosen, (), f"chose {kind}: lowest penalised value of all candidates, not validated")

    def _kind(self) -> Kind:
        return "scalar" if self.space.num_groups == 1 else "layerwise"


def _checked_starts(starts: np.ndarray | None, space: Space, options: Strategy | Auto) -> np.ndarray | None:
    if starts is None:
        return None
    if isinstance(options, Auto):
        raise IncompatibleError("strategy 'auto' finds its own starts; leave starts out or name a strategy")
    starts = np.array(starts, dtype=np.float64)
    if starts.ndim != 2 or starts.shape[1] != space.dimension or len(starts) == 0:
        raise IncompatibleError(f"starts must have shape (M, {space.dimension}) with M >= 1, got {starts.shape}")
    if not np.isfinite(starts).all():
        raise IncompatibleError("starts must be finite")
    return space.clip(starts)
