"""What an audit says: findings per adapter, how they compare with their siblings, and the composed delta."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import compose
from compose.errors import IncompatibleError, unknown_name
from compose.hub_index.audit.composed import Composition
from compose.hub_index.audit.reference import Outlier
from compose.hub_index.audit.rule import is_hard
from compose.hub_index.audit.statistics import ModuleStatistics
from compose.hub_index.records import SEVERITIES, AuditFinding

SCHEMA = 1
State = Literal["compared", "no reference", "not read"]


@dataclass(frozen=True, eq=False)
class AdapterAudit:
    """One adapter under audit. It is never called clean: an audit knows what it looked for and nothing else.

    Attributes:
        name: Of the adapter.
        folder: Where it lies, ``""`` in memory.
        sha256: Of its weight file, ``""`` where it could not be read.
        base: Identifier of its base model.
        findings: All of them, most severe first.
        statistics: Target -> its statistics; empty where the values could not be read.
        state: ``"compared"`` with siblings, ``"no reference"`` (too few), or ``"not read"``.
        siblings: How many others of its base, targets and ranks there are.
        outliers: Its summaries among them, largest score first.
        p: Share of adapters of its kind, itself counted in, with a score as high; None without a reference.
    """

    name: str
    folder: str = ""
    sha256: str = ""
    base: str = ""
    findings: tuple[AuditFinding, ...] = ()
    statistics: Mapping[str, ModuleStatistics] = field(default_factory=dict)
    state: State = "not read"
    siblings: int = 0
    outliers: tuple[Outlier, ...] = ()
    p: float | None = None

    @property
    def refused(self) -> bool:
        """Whether a hard rule says that it is not to be loaded."""
        return any(is_hard(one) for one in self.findings)

    @property
    def score(self) -> float | None:
        """Its largest z-score among its siblings; None without a reference."""
        return self.outliers[0].score if self.outliers else None

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "name": self.name,
            "folder": self.folder or None,
            "sha256": self.sha256 or None,
            "base": self.base or None,
            "refused": self.refused,
            "state": self.state,
            "siblings": self.siblings,
            "score": self.score,
            "p": self.p,
            "findings": [_finding(one) for one in self.findings],
            "outliers": [one._asdict() for one in self.outliers],
            "statistics": {module: {**asdict(one), "sigma1": one.sigma1} for module, one in self.statistics.items()},
        }


@dataclass(frozen=True, eq=False)
class AuditReport:
    """An audit of one adapter, of a bank, or of a composition of a bank's adapters.

    Attributes:
        target: What was audited, as it was given.
        adapters: One audit each.
        composition: Of the composed delta, when one was asked for.
        composed_findings: About it.
    """

    target: str
    adapters: tuple[AdapterAudit, ...]
    composition: Composition | None = None
    composed_findings: tuple[AuditFinding, ...] = ()

    @property
    def findings(self) -> Iterator[tuple[str, AuditFinding]]:
        """All findings with the name of the adapter, ``""`` for the composed delta."""
        for adapter in self.adapters:
            for one in adapter.findings:
                yield adapter.name, one
        for one in self.composed_findings:
            yield "", one

    @property
    def refused(self) -> bool:
        """Whether any adapter is not to be loaded."""
        return any(adapter.refused for adapter in self.adapters)

    def at_least(self, severity: str) -> list[tuple[str, AuditFinding]]:
        """Return the findings of this severity or above.

        Raises:
            IncompatibleError: No such severity.
        """
        if severity not in SEVERITIES:
            raise IncompatibleError(unknown_name("severity", severity, SEVERITIES))
        least = SEVERITIES.index(severity)
        return [(name, one) for name, one in self.findings if SEVERITIES.index(one.severity) >= least]

    def to_json(self) -> dict[str, Any]:
        """Return it as JSON values, with the version of this form."""
        counts = dict.fromkeys(reversed(SEVERITIES), 0)
        for _, one in self.findings:
            counts[one.severity] += 1
        return {
            "schema_version": SCHEMA,
            "tool_version": compose.__version__,
            "target": self.target,
            "refused": self.refused,
            "counts": counts,
            "adapters": [adapter.to_json() for adapter in self.adapters],
            "composition": self._composition(),
        }

    def _composition(self) -> dict[str, Any] | None:
        found = self.composition
        if found is None:
            return None
        return {
            "coefficients": dict(found.coefficients),
            "state": "compared" if found.draws else "no reference",
            "draws": found.draws,
            "p": found.p,
            "findings": [_finding(one) for one in self.composed_findings],
            "layers": [{**one._asdict(), "ratio": one.ratio} for one in found.layers],
            "outliers": [one._asdict() for one in found.outliers],
            "statistics": {
                module: {**asdict(one.whole), "sigma1": one.whole.sigma1, "gain": one.gain, "ratio": one.ratio}
                for module, one in found.statistics.items()
            },
        }


def by_severity(findings: list[AuditFinding]) -> tuple[AuditFinding, ...]:
    """Return the findings, most severe first, otherwise in their order."""
    return tuple(sorted(findings, key=lambda one: -SEVERITIES.index(one.severity)))


def _finding(one: AuditFinding) -> dict[str, Any]:
    return {
        "rule": one.rule,
        "severity": one.severity,
        "hard": is_hard(one),
        "module": one.module or None,
        "detail": one.detail,
    }
