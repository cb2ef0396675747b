"""RoutingMeter: measures a router while it runs: sums over batches, examples and processes.

Shape letters: ``B`` rows, ``E`` experts.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch

from compose.errors import DuplicateNameError, IncompatibleError
from compose.routers.expert_cosine import expert_cosines
from compose.routers.router import Router
from compose.routers.routing import Decisions
from compose.routers.site_sums import Counted, SiteSums, empty, sums_of
from compose.routers.switching import generation_switches
from compose.routers.token_strip import TokenStrip
from compose.routers.trace import GradientNorm, RoutingTrace


class RoutingMeter:
    """Adds up what routers decide.

    ```python
    meter = RoutingMeter(routed.router.experts, tasks=("sums", "sorting"), over="response")
    with routed.recording() as decisions:
        routed(**batch)
    meter.update(decisions)
    meter.trace().save("trace.json")
    ```

    Sums do not depend on how data was cut into batches or processes, up to float64 rounding. Padding never counts.

    Attributes:
        experts: Names, in the bank's order.
        tasks: Names in the order of task numbers; empty: all tasks are counted together.
        over: ``"real"``: all but padding; ``"response"``: tokens of the response only.
    """

    def __init__(self, experts: Sequence[str], tasks: Sequence[str] = (), *, over: Counted = "real") -> None:
        if over not in ("real", "response"):
            raise IncompatibleError(f"over must be real or response, got {over!r}")
        if len(set(tasks)) != len(tasks):
            raise DuplicateNameError(f"the tasks have a name twice: {', '.join(tasks)}")
        self.experts = tuple(experts)
        self.tasks = tuple(tasks)
        self.over: Counted = over
        self._sites: dict[str, SiteSums] = {}
        self._gradients: dict[str, GradientNorm] = {}
        self._cosines: tuple[tuple[float | None, ...], ...] | None = None
        self._strips: dict[str, TokenStrip] = {}

    def update(self, decisions: Sequence[Decisions]) -> None:
        """Add the decisions of one forward.

        Raises:
            IncompatibleError: Another number of experts, or a task number without a name.
        """
        for each in decisions:
            self._check(each)
            self._add(sums_of(each, num_tasks=len(self.tasks), over=self.over))

    def update_generation(
        self,
        decisions: Sequence[Decisions],
        *,
        rows: int,
        lengths: Sequence[int] | None = None,
        sites: Collection[str] | None = None,
    ) -> None:
        """Add the switches between generated tokens; nothing else of a generation is counted.

        Args:
            decisions: Recorded around one ``generate``; see `compose.routers.switching.generation_switches`.
            rows: ``B``.
            lengths: New tokens of every row.
            sites: Names of the sites to look at; None: all.
        """
        found = generation_switches(decisions, rows=rows, lengths=lengths, sites=sites)
        for site, switches in found.items():
            first = switches.first
            self._check(first)
            sums = empty(len(self.tasks), len(self.experts))
            added = SiteSums(site, first.layer, first.available_E.cpu(), sums)
            tasks_B = first.tasks_N.reshape(rows, -1)[:, 0].cpu()
            lines_B = tasks_B + 1 if self.tasks else torch.zeros_like(tasks_B)
            added.scalar("pairs").index_add_(0, lines_B, switches.pairs_B.double())
            added.scalar("switches").index_add_(0, lines_B, switches.switches_B.double())
            self._add(added)

    def update_gradients(self, router: Router) -> None:
        """Add the gradient norm of every gate; call it after ``backward`` and before the gradients are cleared."""
        for site in router.layout:
            gradients = [p.grad for p in router.site(site).parameters() if p.grad is not None]
            if gradients:
                norm = math.sqrt(sum(float(gradient.double().square().sum()) for gradient in gradients))
                self._add_gradient(site, GradientNorm(norm, 1))

    def measure_experts(self, routed: Any) -> None:
        """Take the pairwise cosines of the experts as they are now, over all routed targets.

        Raises:
            IncompatibleError: The experts are no low-rank factors of their own (shared A, output vectors).
        """
        if routed.spec.structure != "lora":
            raise IncompatibleError(
                f"experts of structure {routed.spec.structure!r} have no factors of their own; export them first"
            )
        targets = [target for site in routed.router.layout.values() for target in site.targets]
        cosines_EE = expert_cosines(routed.attached.layers[target].stack for target in targets)
        self._cosines = tuple(
            tuple(None if math.isnan(value) else value for value in row) for row in cosines_EE.tolist()
        )

    def keep(self, strip: TokenStrip) -> None:
        """Keep the strip of a named example.

        Raises:
            DuplicateNameError: There is one of this name.
        """
        if strip.name in self._strips:
            raise DuplicateNameError(f"there is a strip named {strip.name!r} already")
        self._strips[strip.name] = strip

    def merge(self, other: RoutingMeter | RoutingTrace) -> None:
        """Add everything another meter, or a saved trace, holds.

        Cosines are taken over where this meter has none. A strip that both have must be the same.

        Raises:
            IncompatibleError: It is of other experts or tasks, or counted other decisions.
            DuplicateNameError: Both have a strip of one name, and they differ.
        """
        trace = other.trace() if isinstance(other, RoutingMeter) else other
        if (trace.experts, trace.tasks, trace.over) != (self.experts, self.tasks, self.over):
            raise IncompatibleError("measurements of other experts, other tasks or other decisions cannot be added")
        for sums in trace.sites:
            self._add(sums)
        for site, norm in trace.gradients.items():
            self._add_gradient(site, norm)
        self._cosines = self._cosines or trace.cosines
        for strip in trace.strips:
            if self._strips.get(strip.name) != strip:
                self.keep(strip)

    def gather(self) -> RoutingMeter:
        """Return a meter with the sums of all processes of the default group; a copy where there is one process."""
        parts: list[Any] = [self.trace().to_json()]
        if torch.distributed.is_available() and torch.distributed.is_initialized():
            parts = [None] * torch.distributed.get_world_size()
            torch.distributed.all_gather_object(parts, self.trace().to_json())
        made = RoutingMeter(self.experts, self.tasks, over=self.over)
        for part in parts:
            made.merge(RoutingTrace.from_json(part))
        return made

    def trace(self, about: Mapping[str, Any] | None = None) -> RoutingTrace:
        """Return what was measured so far.

        Args:
            about: What else to write down: preset, base, data. Plain values.
        """
        return RoutingTrace(
            experts=self.experts,
            tasks=self.tasks,
            over=self.over,
            sites=tuple(self._sites.values()),
            gradients=dict(self._gradients),
            cosines=self._cosines,
            strips=tuple(self._strips.values()),
            about=dict(about or {}),
        )

    def _check(self, decisions: Decisions) -> None:
        experts = decisions.gates_NE.shape[-1]
        if experts != len(self.experts):
            raise IncompatibleError(
                f"{decisions.site}: gates of {experts} experts, the meter has {len(self.experts)} names; "
                "a mixture with splits has one name per split and expert"
            )

    def _add(self, sums: SiteSums) -> None:
        before = self._sites.get(sums.site)
        self._sites[sums.site] = sums if before is None else before.added(sums)

    def _add_gradient(self, site: str, norm: GradientNorm) -> None:
        before = self._gradients.get(site, GradientNorm(0.0, 0))
        self._gradients[site] = GradientNorm(before.total + norm.total, before.count + norm.count)
