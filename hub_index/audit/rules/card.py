"""The card: what people need to know before they use an adapter."""

from __future__ import annotations

from collections.abc import Iterator

from compose.hub_index.audit.evidence import Evidence
from compose.hub_index.audit.rule import Remark, rule
from compose.hub_index.cards import parse_card


@rule("card.licence", "low")
def licence_is_told(evidence: Evidence) -> Iterator[Remark]:
    """No licence is told: nobody may use the adapter."""
    if evidence.record is not None and evidence.record.license:
        return
    if evidence.card is None:
        yield Remark("no licence: there is no README.md to read")
    elif not parse_card(evidence.card, "README.md").license:
        yield Remark("no licence: the front matter of README.md names none")


@rule("card.base", "low")
def card_and_configuration_agree(evidence: Evidence) -> Iterator[Remark]:
    """The card names another base model than the configuration."""
    base = (evidence.config or {}).get("base_model_name_or_path")
    listed = parse_card(evidence.card, "README.md").base_models if evidence.card is not None else ()
    if isinstance(base, str) and base and listed and base not in listed:
        yield Remark(f"the configuration says {base!r:.120}, the card {', '.join(listed)[:200]!r}")
