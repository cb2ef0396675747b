"""Elementwise merging: pruning, sign election and disjoint merge (arXiv:2306.01708), streamed by lines.

Letters: ``N`` updates, ``K, L`` sizes of a stack of matrices (the core, or lines of the deltas), ``O, I`` of a target,
``C`` lines of a block.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import ClassVar, Literal, Protocol, get_args, runtime_checkable

import torch

from compose.kernels.delta_lines.op import (
    AtRandom,
    ByThreshold,
    Vote,
    count_and_collect,
    merge_lines,
    reason_unavailable,
)
from compose.merging.deltas import Deltas, Streamed
from compose.merging.thresholds import Threshold, largest, trim_into

Elect = Literal["weighted", "raw", "count", "none"]
Denominator = Literal["weight", "count", "none"]
Rescale = Literal["probability", "l1", "none"]
Prune = Callable[[int, torch.Tensor, int], torch.Tensor]
"""``prune(number of the delta, its lines (C, I), first line)`` returns pruned lines; it may overwrite those given."""
_SAMPLES = 1 << 13  # entries that guess where a threshold lies; the guess decides speed, never the result
_BLOCK_ENTRIES = {"cpu": 1 << 15}  # of each delta at a time: eight of them fit the cache; twice as many cost 1.5x
_BLOCK_ENTRIES_ELSEWHERE = 1 << 22
_ALL_PLACES = 1 << 62
_NO_TOTAL = 1e-8  # a sum of weights below this divides nothing


def check_choice(name: str, given: str, allowed: Sequence[str]) -> None:
    """Raise ValueError unless ``given`` is allowed."""
    if given not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {given!r}")


@dataclass(frozen=True)
class Election:
    """Who decides the sign of an entry, and what the sum of those that agree is divided by.

    Attributes:
        elect: ``weighted``: the sign of ``sum_n w_n x_n``, and ``w_n x_n`` must agree with it; ``raw``: the sign of
            ``sum_n x_n``; ``count``: the sign that more ``x_n`` have; ``none``: all take part. Sign 0 counts as +.
        denominator: ``weight``: the sum of the weights of those that take part; ``count``: their number; ``none``: 1.
            A denominator of 0 counts as 1.
    """

    elect: Elect = "weighted"
    denominator: Denominator = "count"
    presets: ClassVar[dict[str, Election]] = {}

    def __post_init__(self) -> None:
        """Refuse what is not in the lists."""
        check_choice("elect", self.elect, get_args(Elect))
        check_choice("denominator", self.denominator, get_args(Denominator))

    @staticmethod
    def chosen(
        presets: Mapping[str, Election], semantics: str, elect: Elect | None, denominator: Denominator | None
    ) -> Election:
        """Return the preset of a method, with what was given in its place.

        Raises:
            ValueError: A name is in none of the lists.
        """
        check_choice("semantics", semantics, tuple(presets))
        preset = presets[semantics]
        return Election(
            preset.elect if elect is None else elect, preset.denominator if denominator is None else denominator
        )


Election.presets.update(
    paper=Election("weighted", "count"), peft=Election("raw", "count"), mergekit=Election("weighted", "weight")
)
"""TIES by name: the paper's rule on the weighted updates, PEFT's ``ties``, mergekit's ``ties`` with ``normalize``."""


def elect(stack: torch.Tensor, weights: torch.Tensor, election: Election) -> torch.Tensor:
    """Return the weighted sum of the entries that agree with the elected sign, over the denominator: ``(K, L)``.

    Args:
        stack: ``(N, K, L)``, trimmed as wanted; an entry of 0 never agrees. Not changed.
        weights: ``(N,)``, any sign.
        election: The rule.
    """
    numbers = weights.to(stack)
    if election.elect == "none":
        merged = torch.tensordot(numbers, stack, dims=1)
        total = float(weights.sum()) if election.denominator == "weight" else float(len(stack))
        return merged if election.denominator == "none" or abs(total) < _NO_TOTAL else merged / total
    votes = stack * numbers[:, None, None] if election.elect == "weighted" else stack
    poll = (votes.sign() if election.elect == "count" else votes).sum(dim=0)
    sign = torch.copysign(torch.ones_like(poll), poll + 0.0)
    agreeing = (votes * sign).clamp_(min=0)
    merged = agreeing.sum(dim=0) if election.elect == "weighted" else torch.tensordot(numbers, agreeing, dims=1)
    merged = merged.mul_(sign)
    if election.denominator == "none":
        return merged
    present = agreeing.sign_()
    if election.denominator == "count":
        return merged.div_(present.sum(dim=0).clamp_(min=1))
    divisor = torch.tensordot(numbers, present, dims=1)
    return merged.div_(divisor.masked_fill_(divisor == 0, 1))


def block_lines(deltas: Deltas) -> int:
    """Return how many lines are computed together: a property of the updates, so that rounding never varies.

    More than sixteen updates share the room of sixteen, so that what is held grows little with their number; at
    fewer, small blocks cost twice the time.
    """
    entries = _BLOCK_ENTRIES.get(deltas.device.type, _BLOCK_ENTRIES_ELSEWHERE)
    return max(1, entries * 16 // max(16, len(deltas)) // deltas.shape[1])


def line_blocks(deltas: Deltas) -> Iterator[tuple[int, torch.Tensor]]:
    """Yield ``(first line, lines of every delta (N, C, I))``; they may be overwritten."""
    for low in range(0, deltas.shape[0], block_lines(deltas)):
        yield low, _block(deltas, low)


def _block(deltas: Deltas, low: int) -> torch.Tensor:
    """Return the block ``(N, C, I)`` that starts at line ``low``."""
    high = min(low + block_lines(deltas), deltas.shape[0])
    lines = deltas.a[0].new_empty(len(deltas), high - low, deltas.shape[1])
    for number, out in enumerate(lines):
        _compute_lines(deltas, number, low, high, out)
    return lines


def blocks_of(deltas: Deltas, number: int) -> Iterator[torch.Tensor]:
    """Yield the lines of one delta, a block ``(C, I)`` at a time, each overwritten by the next."""
    step, (out, width) = block_lines(deltas), deltas.shape
    buffer = deltas.a[0].new_empty(min(step, out), width)
    for low in range(0, out, step):
        high = min(low + step, out)
        yield _compute_lines(deltas, number, low, high, buffer[: high - low])


def _compute_lines(deltas: Deltas, number: int, low: int, high: int, out: torch.Tensor) -> torch.Tensor:
    """Fill ``out`` with lines of one delta: by the kernel where it merges, so that thresholds are exact there."""
    if not runs_fused(deltas):
        return deltas.lines(number, low, high, out)
    a, b = (factor[number : number + 1] for factor in deltas.packed)
    return out.copy_(merge_lines(a, b, a.new_ones(1), (low, high), pruning=None, vote=Vote("none", "none")))


def delta_thresholds(deltas: Deltas, count: int) -> list[Threshold]:
    """Return for every delta the threshold that keeps its ``count`` largest entries; no dense delta is formed."""
    out, width = deltas.shape
    found = []
    for number in range(len(deltas)):
        sample = sampled(deltas, [number])
        sample = None if sample is None else sample[0].abs_()
        between = partial(count_and_collect, *deltas.packed, number) if runs_fused(deltas) else None
        found.append(largest(partial(_magnitudes, deltas, number), sample, out * width, count, between))
    return found


def runs_fused(deltas: Deltas) -> bool:
    """Whether entries are computed and merged by one kernel: on CUDA devices, where Triton is."""
    return deltas.device.type == "cuda" and not reason_unavailable(deltas.device, deltas.dtype, max(deltas.ranks))


def sampled(deltas: Deltas, numbers: Iterable[int] | None = None) -> torch.Tensor | None:
    """Return the same few thousand entries of deltas (all by default): ``(N, S)``; None where there are too few."""
    out, width = deltas.shape
    if out * width <= 4 * _SAMPLES:
        return None
    lines, columns = (places.to(deltas.device) for places in _sampled_places(out, width))
    chosen = range(len(deltas)) if numbers is None else numbers
    scalings = deltas.scalings or (1.0,) * len(deltas)
    return torch.stack(
        [(deltas.unscaled_b[n][lines] * deltas.a[n].T[columns]).sum(dim=1) * scalings[n] for n in chosen]
    )


def _magnitudes(deltas: Deltas, number: int) -> Iterator[torch.Tensor]:
    return map(torch.abs_, blocks_of(deltas, number))


@lru_cache(maxsize=32)
def _sampled_places(out: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return lines and columns of a low-discrepancy sample (the golden pair of two dimensions)."""
    steps = torch.arange(1, _SAMPLES + 1, dtype=torch.float64)
    lines, columns = (steps * 0.7548776662466927).frac(), (steps * 0.5698402909980532).frac()
    return (lines * out).long(), (columns * width).long()


@runtime_checkable
class FusedPrune(Protocol):
    """A pruning that a kernel can do as well."""

    def __call__(self, number: int, lines: torch.Tensor, low: int) -> torch.Tensor:
        """Prune lines; see `Prune`."""
        ...

    def for_kernel(self, device: torch.device) -> ByThreshold | AtRandom:
        """Return what the kernel needs to know."""
        ...


@dataclass(frozen=True)
class AboveThreshold:
    """The pruning by thresholds, one per delta, of lines ``I`` wide."""

    thresholds: Sequence[Threshold]
    width: int

    def __call__(self, number: int, lines: torch.Tensor, low: int) -> torch.Tensor:
        """Trim the lines given."""
        trim_into(lines, self.thresholds[number], low * self.width, lines)
        return lines

    def for_kernel(self, device: torch.device) -> ByThreshold:
        """Return values and places as tensors."""
        last = [_ALL_PLACES if one.last is None else one.last for one in self.thresholds]
        values = torch.tensor([one.value for one in self.thresholds], dtype=torch.float32, device=device)
        return ByThreshold(values, torch.tensor(last, device=device))


def keep_largest(deltas: Deltas, density: float) -> AboveThreshold:
    """Return the pruning that keeps the ``int(density * O * I)`` largest entries of every delta, exactly."""
    out, width = deltas.shape
    return AboveThreshold(delta_thresholds(deltas, int(density * out * width)), width)


def match_l1(deltas: Deltas, prune: Prune) -> Prune:
    """Return ``prune`` followed by one factor per delta that restores its sum of magnitudes (what mergekit does).

    The factors need a pass over the lines; a delta that is 0, or of which nothing is left, keeps the factor 1.
    """
    factors = []
    for number in range(len(deltas)):
        before = after = 0.0
        for low, lines in zip(range(0, deltas.shape[0], block_lines(deltas)), blocks_of(deltas, number), strict=True):
            before += float(lines.abs().sum(dtype=torch.float64))
            after += float(prune(number, lines, low).abs().sum(dtype=torch.float64))
        factors.append(before / after if before and after else 1.0)

    def rescaled(number: int, lines: torch.Tensor, low: int) -> torch.Tensor:
        return prune(number, lines, low).mul_(factors[number])

    return rescaled


def merge_pruned(deltas: Deltas, prune: Prune, election: Election, scale: float = 1.0) -> Streamed:
    """Return the merge that prunes every delta, elects signs, sums what agrees and multiplies by ``scale``.

    On a GPU one kernel does all of it, where the pruning allows; the entries are the same up to rounding.
    """
    if runs_fused(deltas) and isinstance(prune, FusedPrune):
        return _fused_merge(deltas, prune, election, scale)

    def rule(lines: torch.Tensor, low: int) -> torch.Tensor:
        for number, given in enumerate(lines):
            pruned = prune(number, given, low)
            if pruned is not given:
                given.copy_(pruned)
        merged = elect(lines, deltas.weights, election)
        return merged if scale == 1 else merged.mul_(scale)

    return stream(deltas, rule)


def _fused_merge(deltas: Deltas, prune: FusedPrune, election: Election, scale: float) -> Streamed:
    """The merge by the kernel; of the deltas only the packed factors are held."""
    (a, b), numbers = deltas.packed, deltas.weights.to(deltas.a[0])
    vote, pruning = Vote(election.elect, election.denominator), prune.for_kernel(deltas.device)
    if election.elect == "none" and election.denominator != "none":
        total = float(deltas.weights.sum()) if election.denominator == "weight" else float(len(deltas))
        scale = scale if abs(total) < _NO_TOTAL else scale / total

    def rows(low: int, high: int) -> torch.Tensor:
        return merge_lines(a, b, numbers, (low, high), pruning=pruning, vote=vote, scale=scale)

    return Streamed(rows, deltas.shape)


def stream(deltas: Deltas, rule: Callable[[torch.Tensor, int], torch.Tensor]) -> Streamed:
    """Return the merge whose lines are ``rule(lines (N, C, I), first line) -> (C, I)``.

    Lines are always computed in the same blocks, so the result is the same to the bit however it is read. The rule
    may change the lines it is given.
    """
    step, width = block_lines(deltas), deltas.shape[1]

    def rows(low: int, high: int) -> torch.Tensor:
        merged = deltas.a[0].new_empty(high - low, width)
        for start in range(low - low % step, high, step):
            begin, end = max(low, start), min(high, start + step)
            merged[begin - low : end - low] = rule(_block(deltas, start), start)[begin - start : end - start]
        return merged

    return Streamed(rows, deltas.shape)
