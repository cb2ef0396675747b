"""Search for block sizes: every candidate of one group of numbers is timed, the best kept, then the next group.

Knows nothing of GPUs: what it is given runs a configuration and says how long it took.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

logger = logging.getLogger(__name__)

Group = Mapping[str, tuple[Any, ...]]
Measure = Callable[[Any], "list[float] | str"]
_BETTER = 0.99  # of the time so far: smaller gains are noise


@dataclass(frozen=True)
class Space:
    """Candidates for one kind of configuration.

    Attributes:
        groups: Numbers that are searched together, with their values; one group after the other.
        linked: Names from earlier groups that later kernels are compiled for too.
        allowed: Whether a configuration is worth a try.
    """

    groups: tuple[Group, ...]
    linked: tuple[str, ...] = ()
    allowed: Callable[[Any], bool] = lambda config: True

    def group(self, number: int, best: Any) -> Iterator[Any]:
        """Configurations that differ from ``best`` in the numbers of one group only; ``best`` is the first."""
        names = self.groups[number]
        yield best
        for values in itertools.product(*names.values()):
            config = best._replace(**dict(zip(names, values, strict=True)))
            if config != best and self.allowed(config):
                yield config

    def all(self, start: Any) -> list[Any]:
        """Everything a search from ``start`` may compile: the groups, each for every value of the linked numbers."""
        links = {name: values for group in self.groups for name, values in group.items() if name in self.linked}
        found = {}
        for chosen in itertools.product(*links.values()):
            linked = start._replace(**dict(zip(links, chosen, strict=True)))
            for number in range(len(self.groups)):
                found.update(dict.fromkeys(self.group(number, linked)))
        return list(found)


@dataclass(frozen=True)
class Found:
    """The result of a search.

    Attributes:
        config: The best configuration.
        us: Its times, one per number of tokens, in µs.
        candidates: Everything that was tried: ``config`` and ``us``, or ``config`` and ``refused`` with the reason.
    """

    config: Any
    us: list[float]
    candidates: list[dict[str, Any]]


def search(space: Space, start: Any, measure: Measure) -> Found:
    """Return the configuration with the least time, relative to that of ``start`` and summed over what is timed.

    Args:
        space: Candidates.
        start: Where to begin; must run.
        measure: Seconds per call of a configuration for every number of tokens, or why it cannot be used.

    Raises:
        RuntimeError: ``start`` itself cannot be used.
    """
    tried: dict[Any, list[float] | str] = {}

    def time(config: Any) -> list[float] | str:
        if config not in tried:
            tried[config] = measure(config)
        return tried[config]

    first = time(start)
    if isinstance(first, str):
        raise RuntimeError(f"the blocks to begin with cannot be used: {first}; {start}")

    def cost(config: Any) -> float:
        times = time(config)
        if isinstance(times, str):
            return float("inf")
        return sum(own / reference for own, reference in zip(times, first, strict=True))

    best = start
    for number in range(len(space.groups)):
        least = cost(best)
        for config in list(space.group(number, best)):
            if cost(config) < least * (_BETTER if best == start else 1.0):
                best, least = config, cost(config)
    times = tried[best]
    assert not isinstance(times, str)  # noqa: S101 - what was refused costs infinitely much
    candidates = [
        {"config": config._asdict(), "refused": one}
        if isinstance(one, str)
        else {"config": config._asdict(), "us": _microseconds(one)}
        for config, one in tried.items()
    ]
    return Found(best, _microseconds(times), candidates)


def _microseconds(times: list[float]) -> list[float]:
    return [round(one * 1e6, 2) for one in times]
