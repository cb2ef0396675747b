"""Audits: what is wrong with an adapter's files, and what is unusual about its weights among its own kind."""

from __future__ import annotations

from compose.hub_index.audit.base_model import BaseModel
from compose.hub_index.audit.reference import Member, Reference
from compose.hub_index.audit.report import AdapterAudit, AuditReport
from compose.hub_index.audit.rule import RULES, is_hard
from compose.hub_index.audit.run import audit, audit_composition, store_audit

__all__ = [
    "RULES",
    "AdapterAudit",
    "AuditReport",
    "BaseModel",
    "Member",
    "Reference",
    "audit",
    "audit_composition",
    "is_hard",
    "store_audit",
]
