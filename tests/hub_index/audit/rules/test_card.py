"""Licence and base model of the card."""

import pytest

from compose.hub_index.records import AdapterRecord


def test_a_licence_is_asked_for(make, rules) -> None:
    folder = make()
    assert "card.licence" not in rules(folder)
    (folder / "README.md").write_text("# No front matter\n")
    assert "card.licence" in rules(folder)
    (folder / "README.md").unlink()
    assert "card.licence" in rules(folder)
    assert "card.licence" not in rules(folder, record=AdapterRecord(name="x", sha256_weights="0" * 64, license="mit"))


@pytest.mark.parametrize(("base", "expected"), [("owner/base", False), ("owner/other", True)])
def test_card_and_configuration_name_one_base(make, rules, base: str, expected: bool) -> None:
    folder = make()
    (folder / "README.md").write_text(f"---\nlicense: mit\nbase_model: {base}\n---\n")
    assert ("card.base" in rules(folder)) is expected
