"""The guard against overfit: folds over the shots, and the choice among base, single, scalar and layer-wise weights.

Five shots identify little. Every candidate is judged by its cross-validated losses: each example by a fit that did not
see it. Going from simple to complex, a candidate replaces the current one only if its mean gain exceeds

    max(q * SE, min_gain * |current mean|, floor)
    SE = sqrt(sum_s w_s (d_s - mean d)^2 / (n_eff - 1)),   n_eff = 1 / sum w^2

over the paired differences d_s of the S examples; q is ``standard_errors``, widened to Student's t with n_eff - 1
degrees of freedom (1.14 for 5 examples, 1.03 for 20). This is the one-standard-error rule (Breiman et al., 1984) on
paired differences.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np
from scipy.special import ndtr, stdtrit

from compose.errors import IncompatibleError

Kind = Literal["base", "single", "scalar", "layerwise"]


@dataclass(frozen=True, kw_only=True)
class Guard:
    """How candidates are validated.

    Attributes:
        max_folds: K; with at most so many examples every example is its own fold (leave-one-out). 0 switches
            validation off: candidates are compared on the examples they were fitted to.
        standard_errors: Gain demanded, in standard errors of the paired differences.
        min_gain: Gain demanded, as a share of the current candidate's mean loss.
        floor: Gain demanded in any case, in nats: near a loss of 0 a share of it means nothing.
        patience: A fit ends when its validated loss has not improved for so many steps.
        shrink: Positions tried between the simpler candidate (0) and the fitted one (1); 1 is always tried.
    """

    max_folds: int = 5
    standard_errors: float = 1.0
    min_gain: float = 0.02
    floor: float = 1e-3
    patience: int = 8
    shrink: tuple[float, ...] = (0.25, 0.5, 0.75)

    def __post_init__(self) -> None:
        if self.max_folds < 0 or self.max_folds == 1:
            raise IncompatibleError(f"max_folds must be 0 (off) or at least 2, got {self.max_folds}")
        if min(self.standard_errors, self.min_gain, self.floor) < 0 or self.patience < 1:
            raise IncompatibleError(
                "guard: standard_errors, min_gain and floor must not be negative and patience at least 1, "
                f"got {self.standard_errors}, {self.min_gain}, {self.floor}, {self.patience}"
            )
        if any(not 0 < position < 1 for position in self.shrink):
            raise IncompatibleError(f"guard: shrink positions lie strictly between 0 and 1, got {self.shrink}")


class Candidate(NamedTuple):
    """A set of weights that may be chosen.

    Attributes:
        kind: How complex it is.
        weights: ``(D,)``, fitted to all examples.
        losses: ``(S,)`` of these weights.
        value: Penalised mean of ``losses``.
        validated: ``(S,)``, each example's loss under the weights fitted without it; None without folds.
    """

    kind: Kind
    weights: np.ndarray
    losses: np.ndarray
    value: float
    validated: np.ndarray | None


class GuardRow(NamedTuple):
    """One line of the guard's table.

    Attributes:
        kind: The candidate.
        value: Its penalised value on the examples it was fitted to.
        validated: Its cross-validated mean loss, None without folds.
        against: The candidate it had to beat, None for the base.
        gain: Mean loss of ``against`` minus its own (validated if there are folds); None for the base.
        standard_error: Of the gain; None for the base and without folds.
        margin: The gain it needed.
        accepted: Whether it replaced ``against``.
    """

    kind: Kind
    value: float
    validated: float | None
    against: Kind | None
    gain: float | None
    standard_error: float | None
    margin: float | None
    accepted: bool


class Decision(NamedTuple):
    """The chosen candidate, the table of all, and the reason in words."""

    chosen: Candidate
    table: tuple[GuardRow, ...]
    why: str


def make_folds(example_weights: np.ndarray, num_folds: int, seed: int) -> list[np.ndarray]:
    """Split the examples of positive weight into folds of held-out indices; sizes differ by at most one.

    Returns:
        ``min(num_folds, count)`` arrays, or none at all when fewer than two examples count or ``num_folds`` is 0.
        Each array is sorted. Leave-one-out does not depend on the seed.
    """
    counted = np.flatnonzero(example_weights > 0)
    if num_folds < 2 or len(counted) < 2:
        return []
    if len(counted) <= num_folds:
        return [np.array([index]) for index in counted]
    shuffled = np.random.default_rng([seed, len(counted)]).permutation(counted)
    return [np.sort(part) for part in np.array_split(shuffled, num_folds)]


def choose(candidates: list[Candidate], example_weights: np.ndarray, guard: Guard) -> Decision:
    """Take the simplest candidate that no more complex one clearly beats.

    Args:
        candidates: The base first, then in order of complexity; either all validated or none.
        example_weights: ``(S,)``, normalised.
        guard: Margins.
    """
    current = candidates[0]
    table = [_row(current, example_weights, None, None)]
    reasons = []
    for candidate in candidates[1:]:
        row = _compare(candidate, current, example_weights, guard)
        table.append(row)
        reasons.append(_reason(row))
        if row.accepted:
            current = candidate
    if not reasons:
        reasons.append("there was nothing to compare the base with")
    return Decision(current, tuple(table), f"chose {current.kind}: " + "; ".join(reasons))


def _compare(candidate: Candidate, current: Candidate, example_weights: np.ndarray, guard: Guard) -> GuardRow:
    if candidate.validated is None or current.validated is None:
        gain = current.value - candidate.value
        margin = max(guard.min_gain * abs(current.value), guard.floor)
        row = _row(candidate, example_weights, current.kind, margin)
        return row._replace(gain=gain, accepted=gain > margin)
    differences = current.validated - candidate.validated
    gain = float(example_weights @ differences)
    effective = 1.0 / float(np.square(example_weights).sum())
    spread = float(example_weights @ np.square(differences - gain))
    error = float(np.sqrt(spread / (effective - 1)))
    quantile = float(stdtrit(effective - 1, ndtr(guard.standard_errors)))
    share = guard.min_gain * abs(float(example_weights @ current.validated))
    margin = max(quantile * error, share, guard.floor)
    row = _row(candidate, example_weights, current.kind, margin)
    return row._replace(gain=gain, standard_error=error, accepted=gain > margin)


def _row(candidate: Candidate, example_weights: np.ndarray, against: Kind | None, margin: float | None) -> GuardRow:
    validated = None if candidate.validated is None else float(example_weights @ candidate.validated)
    return GuardRow(
        candidate.kind, candidate.value, validated, against,
        gain=None, standard_error=None, margin=margin, accepted=against is None,
    )  # fmt: skip


def _reason(row: GuardRow) -> str:
    judged = "on the examples themselves (not validated)" if row.validated is None else "on held-out folds"
    verb = "gains" if row.accepted else "does not clearly gain"
    return f"{row.kind} {verb} over {row.against} {judged} ({row.gain:+.4g}, needed more than {row.margin:.4g})"
