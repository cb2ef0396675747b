"""Rules: small functions that look at the evidence and say what is wrong, entered in one registry.

A rule's name is ``stage.word``. The stages run in the order of `STAGES`; after a hard finding about the files or the
header nothing more is read from the weight file, and the stages that need its values are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING, NamedTuple

import compose
from compose.hub_index.records import AuditFinding, Severity
from compose.registry import Registry

if TYPE_CHECKING:
    from compose.hub_index.audit.evidence import Evidence

STAGES = ("files", "header", "config", "tensors", "values", "base", "card")
SHOWN = 8
"""Findings of one rule that are listed; the rest are counted."""


class Remark(NamedTuple):
    """What a rule found: a sentence, and the target it is about."""

    detail: str
    module: str = ""


Check = Callable[["Evidence"], Iterable[Remark]]


@dataclass(frozen=True)
class Rule:
    """One rule.

    Attributes:
        name: ``stage.word``.
        severity: Of its findings.
        hard: Whether a finding means that the adapter is not to be loaded.
        check: The function.
        summary: First line of the function's docstring.
    """

    name: str
    severity: Severity
    hard: bool
    check: Check
    summary: str


RULES: Registry[Rule] = Registry("audit rule", package="compose.hub_index.audit.rules")


def rule(name: str, severity: Severity, *, hard: bool = False) -> Callable[[Check], Check]:
    """Return a decorator that enters a function as a rule; the first line of its docstring says what it looks for."""

    def enter(check: Check) -> Check:
        RULES.register(name)(Rule(name, severity, hard, check, (check.__doc__ or "").strip().splitlines()[0]))
        return check

    return enter


def finding(name: str, severity: Severity, detail: str, module: str = "") -> AuditFinding:
    """Return a finding of this version of the auditor; text from strangers is made safe to store and to show."""
    return AuditFinding(
        rule=name,
        severity=severity,
        detail=plain(detail),
        module=plain(module),
        tool_version=compose.__version__,
    )


def run_rules(evidence: Evidence) -> list[AuditFinding]:
    """Return the findings of all rules, stage by stage."""
    found: list[AuditFinding] = []
    for stage in STAGES:
        if stage not in evidence.stages:
            continue
        hard = False
        for name in RULES:
            one = RULES[name]
            if name.partition(".")[0] == stage:
                findings = list(_findings(one, evidence))
                hard |= one.hard and bool(findings)
                found += findings
        if hard and stage in ("files", "header"):
            evidence.block()
    return found


def is_hard(found: AuditFinding) -> bool:
    """Return whether a finding means that the adapter is not to be loaded."""
    return found.rule in RULES and RULES[found.rule].hard


def plain(text: str, most: int = 1000) -> str:
    """Return ``text`` on one line, invisible characters spelled out, at most ``most`` characters."""
    safe = "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text[: 2 * most])
    return safe if len(safe) <= most else safe[: most - 1] + "…"


def _findings(one: Rule, evidence: Evidence) -> Iterator[AuditFinding]:
    remarks = iter(one.check(evidence))
    for remark in islice(remarks, SHOWN):
        yield finding(one.name, one.severity, remark.detail, remark.module)
    if more := sum(1 for _ in remarks):
        yield finding(one.name, one.severity, f"and {more:,} more findings of this rule")
