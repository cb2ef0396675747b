"""One call audits a folder, a bank or a name of an index; another audits a composition of a bank's adapters."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from compose.adapter import Adapter
from compose.errors import UnknownNameError, unknown_name
from compose.hub_index.audit.base_model import BaseModel
from compose.hub_index.audit.composed import DRAWS, Composition, describe_composition
from compose.hub_index.audit.duplicates import Copies, copies_of, find_copies
from compose.hub_index.audit.evidence import Evidence
from compose.hub_index.audit.reference import FEWEST, LIMIT, RARE, Member, Outlier, Reference
from compose.hub_index.audit.report import AdapterAudit, AuditReport, by_severity
from compose.hub_index.audit.rule import finding, is_hard, run_rules
from compose.hub_index.audit.statistics import ModuleStatistics, adapter_statistics
from compose.hub_index.audit.subjects import (
    FromIndex,
    NamedAdapters,
    Target,
    evidence_of,
    member_of,
    members_from_index,
)
from compose.hub_index.records import AuditFinding, Severity
from compose.hub_index.store import Index

_FAR = 2 * LIMIT
_SHOWN_COPIES = 8
_FINGERPRINT = re.compile(r"[0-9a-f]{64}")


class _Looked(NamedTuple):
    """One adapter after the rules: what they found, its statistics, and itself as a member of a group."""

    evidence: Evidence
    findings: list[AuditFinding]
    statistics: Mapping[str, ModuleStatistics]
    member: Member | None


@dataclass(frozen=True, eq=False)
class _Company:
    """Whom the audited adapters are compared with."""

    reference: Reference
    others: tuple[Member, ...]
    without: int


def audit(
    target: Target,
    *,
    index: Index | None = None,
    base_model: str | Path | BaseModel | None = None,
    reference: Reference | None = None,
    full_modules: bool = False,
) -> AuditReport:
    """Audit one adapter or every adapter of a bank: files, header, configuration, values, base, siblings, copies.

    Every rule says what it can; nothing is loaded that an earlier finding makes unsafe. Siblings and copies are looked
    for among the adapters audited, those of the index with the same base, and ``reference``.

    Args:
        target: A folder (an adapter, or a folder of adapters), a name in ``index`` or a list of names, an adapter, or
            a bank. Of what is in memory there are no files to look at.
        index: An open index.
        base_model: A folder or a cached Hugging Face id of the base model; or a fingerprint (64 hexadecimal digits).
        reference: More adapters to compare with.
        full_modules: Whether weights that replace whole modules (modules_to_save) are allowed.

    Returns:
        Findings; an adapter without any is not proven harmless.

    Raises:
        ComposeError: There is no such target or base model.
    """
    base, fingerprint = _base(base_model)
    looked = [_look(one) for one in evidence_of(target, index, base, fingerprint, full_modules)]
    members = [one.member for one in looked if one.member is not None]
    company = _company(members, index, reference)
    among = find_copies(members)
    audits = [_finish(one, company, among) for one in looked]
    return AuditReport(str(target) if isinstance(target, str | Path) else _label(looked), tuple(audits))


def audit_composition(
    bank: NamedAdapters | Sequence[Adapter],
    coefficients: Mapping[str, float],
    *,
    index: Index | None = None,
    base_model: str | Path | BaseModel | None = None,
    reference: Reference | None = None,
    draws: int = DRAWS,
    seed: int = 0,
) -> AuditReport:
    """Audit the delta ``sum_i w_i s_i B_i A_i`` and each of its members: colluding adapters pass one by one.

    Siblings are looked for in the bank, the index and ``reference``.

    Args:
        bank: Adapters by name, or a list of them.
        coefficients: Name -> weight.
        index: An open index.
        base_model: A folder or a cached id of the base model; norms are then compared with those of its weights.
        reference: More adapters to compare with.
        draws: Compositions of siblings it is compared with.
        seed: Of the draws.

    Raises:
        UnknownNameError: A name is not in the bank.
        IncompatibleError: No weight but 0, a weight that is not finite, or shapes that differ.
    """
    base, fingerprint = _base(base_model)
    everyone = list(bank) if isinstance(bank, Sequence) else [bank[name] for name in bank]
    known = {one.name: one for one in everyone}
    if unknown := [name for name in coefficients if name not in known]:
        raise UnknownNameError(unknown_name("adapter", unknown[0], known))
    looked = {name: _look(_in_memory(known[name], base, fingerprint)) for name in coefficients}
    members = [Member.of(one) for one in everyone if one.name not in coefficients]
    members += [one.member for one in looked.values() if one.member is not None]
    company = _company(members, index, reference)
    found = describe_composition(
        [known[name] for name in coefficients],
        list(coefficients.values()),
        reference=company.reference,
        draws=draws,
        seed=seed,
    )
    among = find_copies([one.member for name in coefficients if (one := looked[name]).member is not None])
    audits = [_finish(looked[name], company, among) for name in coefficients]
    text = " + ".join(f"{weight:g}*{name}" for name, weight in coefficients.items())
    return AuditReport(text, tuple(audits), found, by_severity(_composed_findings(found, base)))


def _base(given: str | Path | BaseModel | None) -> tuple[BaseModel | None, str]:
    """Return the base model and its fingerprint, whichever was given."""
    if given is None or isinstance(given, BaseModel):
        return given, ""
    if isinstance(given, str) and _FINGERPRINT.fullmatch(given):
        return None, given
    return BaseModel.open(given), ""


def _in_memory(adapter: Adapter, base: BaseModel | None, fingerprint: str) -> Evidence:
    found = Evidence.of_adapter(adapter, base)
    found.fingerprint = fingerprint
    return found


def _label(looked: list[_Looked]) -> str:
    return looked[0].evidence.name if len(looked) == 1 else f"{len(looked)} adapters"


def _look(evidence: Evidence) -> _Looked:
    findings = run_rules(evidence)
    if evidence.blocked or isinstance(evidence.adapter, str):
        return _Looked(evidence, findings, {}, None)
    statistics = adapter_statistics(evidence.adapter)
    bad = any(one.num_nonfinite for one in statistics.values())
    looked = _Looked(evidence, findings, statistics, None if bad else member_of(evidence, statistics))
    evidence.release()
    return looked


def _company(members: Sequence[Member], index: Index | None, reference: Reference | None) -> _Company:
    stored: FromIndex = members_from_index(index, {one.key.base for one in members})
    own = {one.identity for one in members}
    given = (*stored.members, *(reference.members if reference else ()))
    others = tuple(one for one in given if one.identity not in own or _elsewhere(one, members))
    return _Company(Reference([*members, *others]), others, stored.without)


def _elsewhere(one: Member, members: Sequence[Member]) -> bool:
    """Whether an adapter has the hash of an audited one under another name: a copy, not itself."""
    return all(one.name != other.name for other in members if other.identity == one.identity)


def _finish(looked: _Looked, company: _Company, among: Copies) -> AdapterAudit:
    """Compare one adapter with its siblings and its copies."""
    evidence, findings = looked.evidence, list(looked.findings)
    folder = "" if evidence.folder is None else str(evidence.folder)
    if looked.member is None:
        named = (evidence.config or {}).get("base_model_name_or_path")
        base = named if isinstance(named, str) else ""
        return AdapterAudit(evidence.name, folder, base=base, findings=by_severity(findings))
    member = looked.member
    siblings = company.reference.siblings(member)
    outliers = company.reference.compare(member)
    p = company.reference.p_value(member)
    findings += _outlier_findings(outliers, p, len(siblings), company.without)
    findings += _copy_findings(member.name, among, copies_of(member, company.others))
    return AdapterAudit(
        evidence.name,
        folder,
        member.sha256,
        member.key.base,
        by_severity(findings),
        looked.statistics,
        "compared" if outliers else "no reference",
        len(siblings),
        tuple(outliers),
        p,
    )


def _outlier_findings(outliers: Sequence[Outlier], p: float | None, siblings: int, without: int) -> list[AuditFinding]:
    if p is None:
        more = f"; {without} adapters of this base in the index have no statistics yet" if without else ""
        text = f"{siblings} siblings of the same base, targets and ranks; {FEWEST} are needed to compare with{more}"
        return [finding("stats.no-reference", "info", text)]
    return _unusual("stats", outliers, p, f"{siblings} siblings")


def _unusual(stage: str, outliers: Sequence[Outlier], p: float, company: str) -> list[AuditFinding]:
    """Return a finding per summary beyond `LIMIT`; where there is none, a remark on a score that is `RARE`."""
    found = [
        finding(f"{stage}.{one.feature}", _grade(one.score), _outlier_text(one, company), one.module)
        for one in outliers
        if one.score > LIMIT
    ]
    if not found and p <= RARE:
        text = f"{_outlier_text(outliers[0], company)}; p = {p:.3f}, as of 1 in 20 ordinary ones"
        found.append(finding(f"{stage}.rare", "low", text, outliers[0].module))
    return found


def _grade(score: float) -> Severity:
    return "high" if score > _FAR else "medium"


def _outlier_text(one: Outlier, company: str) -> str:
    if one.kind == "shift":
        where = "above" if one.z > 0 else "below"
        return f"the median target is {abs(one.z):.1f} robust deviations {where} {company} (score {one.score:.1f})"
    return (
        f"{one.module} is {one.z:+.1f} robust deviations from {company}; their own peaks give it score {one.score:.1f}"
    )


def _copy_findings(name: str, among: Copies, beyond: Copies) -> list[AuditFinding]:
    pairs = [pair for pair in (*among.pairs, *beyond.pairs) if name in (pair.first, pair.second)]
    found = []
    for pair in pairs[:_SHOWN_COPIES]:
        other = pair.second if pair.first == name else pair.first
        if pair.exact:
            found.append(finding("copies.exact", "medium", f"the same weights as {other}"))
        else:
            found.append(finding("copies.near", "medium", f"cosine {pair.cosine:.4f} with {other}"))
    if len(pairs) > _SHOWN_COPIES:
        found.append(finding("copies.near", "medium", f"and {len(pairs) - _SHOWN_COPIES} more copies"))
    unread = {**among.unread, **beyond.unread}
    if beyond.unread:
        first = next(iter(beyond.unread))
        text = f"{len(beyond.unread)} possible copies could not be read, first {first}: {unread[first]}"
        found.append(finding("copies.unread", "info", text))
    return found


def _composed_findings(found: Composition, base: BaseModel | None) -> list[AuditFinding]:
    findings = []
    if found.p is None:
        text = f"a member has fewer than {FEWEST} siblings that could stand for it; the sum is described, not compared"
        findings.append(finding("composed.no-reference", "info", text))
    else:
        findings += _unusual("composed", found.outliers, found.p, f"{found.draws} compositions of siblings")
    for module, target in found.statistics.items():
        weight = base.norm(module) if base is not None else None
        if weight is not None and target.whole.fro > weight:
            text = f"{module}: |sum| {target.whole.fro:.3g} is more than |weight| {weight:.3g}"
            findings.append(finding("composed.base-norm", "medium", text, module))
        if target.whole.num_nonfinite:
            findings.append(finding("composed.overflow", "critical", f"{module}: the sum is beyond float64", module))
    return findings


def store_audit(index: Index, found: AdapterAudit) -> None:
    """Write an audit of an adapter of the index into it; one that hard rules refuse is quarantined with the reasons.

    Raises:
        UnknownNameError: It is not in the index.
    """
    reasons = [f"{one.rule}: {one.detail}"[:4000] for one in found.findings if is_hard(one)]
    more = {"status": "quarantined", "reasons": reasons} if reasons else {}
    stats = [one.to_record() for one in found.statistics.values()]
    index.update(found.name, stats=stats, findings=found.findings, **more)  # type: ignore[arg-type]
