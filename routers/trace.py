"""RoutingTrace: what was measured of a router, as ``trace.json``: sums per site and task, strips of named examples.

Shape letters: ``E`` experts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, get_args

from compose.errors import IncompatibleError, UnknownNameError, unknown_name
from compose.routers.site_metrics import SiteMetrics, mean_metrics, metrics_of
from compose.routers.site_sums import Counted, SiteSums
from compose.routers.token_strip import TokenStrip

FORMAT = "compose-routing-trace"
VERSION = 1


@dataclass(frozen=True)
class GradientNorm:
    """Norms of a gate's gradient: their sum, and over how many backward passes."""

    total: float
    count: int

    @property
    def mean(self) -> float:
        """Mean norm."""
        return self.total / self.count


@dataclass(frozen=True, kw_only=True, eq=False)
class RoutingTrace:
    """Running sums, and what is derived from them on request.

    Attributes:
        experts: Names, in the bank's order.
        tasks: Names of the tasks; empty where all were counted together.
        over: Which decisions were counted.
        sites: Sums, in the order of the forward.
        gradients: Site -> gradient norms of its gate.
        cosines: Pairwise cosines of the experts over all routed targets, ``E`` lists; None inside stands for an expert
            that is zero. None: not measured.
        strips: Texts with their dominant experts.
        about: Anything else worth saying, as plain values: preset, base, data.
    """

    experts: tuple[str, ...]
    tasks: tuple[str, ...] = ()
    over: Counted = "real"
    sites: tuple[SiteSums, ...] = ()
    gradients: Mapping[str, GradientNorm] = field(default_factory=dict)
    cosines: tuple[tuple[float | None, ...], ...] | None = None
    strips: tuple[TokenStrip, ...] = ()
    about: Mapping[str, Any] = field(default_factory=dict)
    _found: dict[tuple[str, str | None], SiteMetrics | None] = field(default_factory=dict, init=False, repr=False)

    def metrics(self, site: str, task: str | None = None) -> SiteMetrics | None:
        """Measures of a site, of one task or of all together; None where nothing was counted.

        Raises:
            UnknownNameError: No such site or task.
        """
        if (site, task) not in self._found:
            sums = next((each for each in self.sites if each.site == site), None)
            if sums is None:
                raise UnknownNameError(unknown_name("site", site, [each.site for each in self.sites]))
            found = metrics_of(sums, self._line(task))
            measured = found.decisions or found.switch_rate is not None
            self._found[site, task] = found if measured else None
        return self._found[site, task]

    def overall(self, task: str | None = None) -> SiteMetrics | None:
        """Means over all sites at which something was counted; None where nothing was."""
        each = [self.metrics(sums.site, task) for sums in self.sites]
        return mean_metrics([one for one in each if one is not None and one.decisions])

    def seen_tasks(self) -> tuple[str, ...]:
        """Tasks with at least one counted decision."""
        counts = [sums.scalar("decisions")[1:] for sums in self.sites]
        return tuple(task for number, task in enumerate(self.tasks) if any(float(count[number]) for count in counts))

    def to_json(self) -> dict[str, Any]:
        """Plain values; see `from_json`."""
        return {
            "format": FORMAT,
            "version": VERSION,
            "experts": list(self.experts),
            "tasks": list(self.tasks),
            "over": self.over,
            "sites": [sums.to_json(self.tasks) for sums in self.sites],
            "gradients": {site: asdict(norm) for site, norm in self.gradients.items()},
            "cosines": None if self.cosines is None else [list(row) for row in self.cosines],
            "strips": [strip.to_json() for strip in self.strips],
            "about": dict(self.about),
        }

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> RoutingTrace:
        """The trace of `to_json`.

        Raises:
            IncompatibleError: It is no trace, one of another version, or damaged.
        """
        if not isinstance(plain, Mapping) or plain.get("format") != FORMAT:
            raise IncompatibleError(f'this is no routing trace: "format" must be {FORMAT!r}')
        if plain.get("version") != VERSION:
            raise IncompatibleError(f"routing trace of version {plain.get('version')!r}; this program reads {VERSION}")
        try:
            return cls._read(plain)
        except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
            raise IncompatibleError(f"a damaged routing trace: {type(error).__name__}: {error}") from error

    def save(self, path: str | Path) -> None:
        """Write ``trace.json``; a file that is there is replaced in one step."""
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        partial.write_text(json.dumps(self.to_json(), allow_nan=False) + "\n", encoding="utf-8")
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> RoutingTrace:
        """Read ``trace.json``.

        Raises:
            IncompatibleError: There is no such file, or it is no trace.
        """
        path = Path(path)
        if not path.is_file():
            raise IncompatibleError(f"{path}: no such file; give a trace.json written by RoutingTrace.save")
        try:
            plain = json.loads(path.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise IncompatibleError(f"{path}: no JSON ({error})") from None
        return cls.from_json(plain)

    def _line(self, task: str | None) -> int | None:
        if task is None:
            return None
        if task not in self.tasks:
            raise UnknownNameError(unknown_name("task", task, self.tasks))
        return 1 + self.tasks.index(task)

    @classmethod
    def _read(cls, plain: Mapping[str, Any]) -> RoutingTrace:
        tasks = tuple(map(str, plain["tasks"]))
        experts = tuple(map(str, plain["experts"]))
        sites = tuple(SiteSums.from_json(each, tasks) for each in plain["sites"])
        if plain["over"] not in get_args(Counted) or any(len(each.available_E) != len(experts) for each in sites):
            raise ValueError("its parts do not fit together")
        if not all(bool(each.sums_LC.isfinite().all()) for each in sites):
            raise ValueError("a sum is not finite")
        cosines = plain["cosines"]
        return cls(
            experts=experts,
            tasks=tasks,
            over=plain["over"],
            sites=sites,
            gradients={
                str(site): GradientNorm(float(norm["total"]), int(norm["count"]))
                for site, norm in plain["gradients"].items()
            },
            cosines=None if cosines is None else tuple(tuple(map(_cosine, row)) for row in cosines),
            strips=tuple(TokenStrip.from_json(each) for each in plain["strips"]),
            about=dict(plain["about"]),
        )


def _cosine(value: Any) -> float | None:
    if value is None or math.isfinite(float(value)):
        return None if value is None else float(value)
    raise ValueError("a cosine is not finite")
