"""The whole audit: folders, banks, names of an index, compositions; what is written and what is said."""

import json
import shutil
from pathlib import Path

import pytest

from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.errors import ComposeError, IncompatibleError, UnknownNameError
from compose.formats.peft import read_adapter, write_adapter
from compose.hub_index.audit import RULES, Reference, audit, audit_composition, store_audit
from compose.hub_index.records import AdapterRecord, ModuleRecord
from compose.hub_index.store import Index


def loud(one: Adapter, name: str, size: float = 20.0) -> Adapter:
    targets = {path: LowRank(u.a, u.b * size, u.scaling) for path, u in one.targets.items()}
    return Adapter(name, one.base, targets)


@pytest.fixture(scope="module")
def bank(siblings, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folders of 24 siblings, a copy of one, and one twenty times as large."""
    root = tmp_path_factory.mktemp("bank")
    for one in siblings[:24]:
        write_adapter(one, root / one.name)
    shutil.copytree(root / "sibling-0", root / "twin")
    write_adapter(loud(siblings[25], "loud"), root / "loud")
    return root


@pytest.fixture
def index(bank: Path, tmp_path: Path):
    """An index of the bank's adapters, not yet audited."""
    with Index.open(tmp_path / "adapters.db", create=True) as opened:
        for folder in sorted(bank.iterdir()):
            one = read_adapter(folder)
            modules = tuple(
                ModuleRecord(name=path, in_features=u.in_features, out_features=u.out_features, rank=u.rank)
                for path, u in one.targets.items()
            )
            if folder.name != "twin":  # the same content under another name is the same adapter there
                about = {"path": str(folder), "base_id": one.base, "modules": modules}
                opened.add(AdapterRecord(name=folder.name, sha256_weights=one.sha256, **about))
        yield opened


def by_rule(found) -> dict[str, list[str]]:
    rules: dict[str, list[str]] = {}
    for one in found:
        rules.setdefault(one.rule, []).append(one.detail)
    return rules


def test_one_folder_has_no_reference_and_is_not_called_clean(make) -> None:
    report = audit(make())
    (one,) = report.adapters
    assert (one.state, one.siblings, one.score, one.refused) == ("no reference", 0, None, False)
    assert set(by_rule(one.findings)) == {"stats.no-reference"}
    assert len(one.statistics) == 4
    assert "clean" not in json.dumps(report.to_json())


def test_a_bank_is_its_own_reference(bank: Path) -> None:
    report = audit(bank)
    found = {one.name: one for one in report.adapters}
    assert len(found) == 26
    assert found["loud"].state == "compared"
    assert "stats.fro" in by_rule(found["loud"].findings)
    assert by_rule(found["twin"].findings)["copies.exact"] == ["the same weights as sibling-0"]
    assert by_rule(found["sibling-0"].findings)["copies.exact"] == ["the same weights as twin"]
    assert found["twin"].siblings == 24  # all but its copy
    severe = [name for name, one in found.items() if one.score is not None and one.score > 4]
    rare = [name for name, one in found.items() if "stats.rare" in by_rule(one.findings)]
    assert "loud" in severe
    assert len(severe) <= 3
    assert "loud" not in rare
    assert {one.severity for name in rare for one in found[name].findings if one.rule == "stats.rare"} <= {"low"}
    assert found["loud"].p == pytest.approx(1 / 25)
    assert not report.refused


def test_a_bank_in_memory_is_audited_alike(bank: Path) -> None:
    report = audit(Bank.open(bank))
    found = {one.name: one for one in report.adapters}
    assert "stats.fro" in by_rule(found["loud"].findings)
    assert not any(rule.startswith(("files.", "header.", "config.")) for rule in by_rule(found["loud"].findings))


def test_one_adapter_against_a_reference_and_its_near_copy(siblings, sibling) -> None:
    near = loud(siblings[3], "near", size=1.3)
    report = audit(near, reference=Reference.of(siblings))
    found = by_rule(report.adapters[0].findings)
    assert found["copies.near"] == ["cosine 1.0000 with sibling-3"]
    assert "copies.near" not in by_rule(audit(sibling("x", 99), reference=Reference.of(siblings)).adapters[0].findings)


def test_what_is_not_safe_to_read_is_refused_and_still_described(make, weights) -> None:
    folder = weights(make(), b"{broken")
    (one,) = audit(folder).adapters
    assert (one.refused, one.state, one.statistics) == (True, "not read", {})
    assert one.base == "owner/base"
    assert one.findings[0].severity in ("critical", "high")


def test_an_index_remembers_statistics_and_serves_as_reference(index: Index, bank: Path) -> None:
    first = audit("loud", index=index)
    assert first.adapters[0].state == "no reference"
    detail = by_rule(first.adapters[0].findings)["stats.no-reference"][0]
    assert "25 adapters of this base in the index have no statistics yet" in detail
    for one in audit(bank).adapters:
        if one.name != "twin":
            store_audit(index, one)
    again = audit("loud", index=index)
    (one,) = again.adapters
    assert (one.state, one.siblings) == ("compared", 24)
    assert "stats.fro" in by_rule(one.findings)
    stored = index.get("loud")
    assert {found.rule for found in stored.findings} >= {"stats.fro"}
    assert [stat.module for stat in stored.stats] == list(one.statistics)
    assert stored.status == "active"
    twin = audit(bank / "twin", index=index).adapters[0]
    assert by_rule(twin.findings)["copies.exact"] == ["the same weights as sibling-0"]


def test_several_names_of_an_index_are_audited_at_once(index: Index, bank: Path) -> None:
    names = [one.name for one in index.ls()]
    report = audit(names, index=index)
    assert [one.name for one in report.adapters] == names
    found = {one.name: one for one in report.adapters}
    assert (found["loud"].state, found["loud"].siblings) == ("compared", 24)
    assert not any(rule.startswith("copies.") for one in report.adapters for rule in by_rule(one.findings))


def test_a_refused_adapter_is_quarantined_with_its_reasons(index: Index, tmp_path: Path, siblings) -> None:
    folder = write_adapter(siblings[28], tmp_path / "bad")
    sha256 = read_adapter(folder).sha256
    index.add(AdapterRecord(name="bad", sha256_weights=sha256, path=str(folder), base_id="owner/base"))
    data = bytearray((folder / "adapter_model.safetensors").read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"  # NaN
    (folder / "adapter_model.safetensors").write_bytes(data)
    (one,) = audit("bad", index=index).adapters
    assert one.refused
    store_audit(index, one)
    stored = index.get("bad")
    assert stored.status == "quarantined"
    assert stored.reasons[0].startswith("values.finite")


def test_compositions_are_audited_with_their_members(bank: Path) -> None:
    report = audit_composition(Bank.open(bank), {"sibling-1": 0.6, "sibling-2": 0.4})
    assert report.composition is not None
    assert report.composition.draws == 64
    assert [one.name for one in report.adapters] == ["sibling-1", "sibling-2"]
    assert all(one.state == "compared" for one in report.adapters)
    found = report.to_json()["composition"]
    assert found["coefficients"] == {"sibling-1": 0.6, "sibling-2": 0.4}
    assert found["state"] == "compared"
    assert {"gain", "ratio", "fro"} <= found["statistics"]["model.layers.0.self_attn.q_proj"].keys()
    with pytest.raises(UnknownNameError, match="sibling-1"):
        audit_composition(Bank.open(bank), {"sibling-l": 1.0})


def test_a_loud_composition_is_seen_against_compositions_of_siblings(bank: Path) -> None:
    report = audit_composition(Bank.open(bank), {"sibling-1": 1.0, "loud": 1.0})
    rules = {one.rule for one in report.composed_findings}
    assert "composed.fro" in rules
    few = audit_composition([read_adapter(bank / "sibling-1"), read_adapter(bank / "loud")], {"loud": 1.0})
    assert {one.rule for one in few.composed_findings} == {"composed.no-reference"}


def test_findings_from_a_severity_on(make, edit) -> None:
    report = audit(edit(make(), revision="main", lora_alpha=-4))
    assert {one.rule for _, one in report.at_least("low")} == {"config.revision", "config.negative"}
    assert {one.rule for _, one in report.at_least("medium")} == {"config.negative"}
    assert report.at_least("high") == []
    assert report.to_json()["counts"] == {"critical": 0, "high": 0, "medium": 1, "low": 1, "info": 1}
    with pytest.raises(IncompatibleError, match="severity"):
        report.at_least("hihg")


def test_targets_that_are_not_there(tmp_path: Path, index: Index) -> None:
    with pytest.raises(ComposeError, match="no such folder"):
        audit(tmp_path / "nothing")
    with pytest.raises(ComposeError, match="no name in the index"):
        audit("nothing", index=index)
    with pytest.raises(ComposeError, match="neither an adapter"):
        audit(tmp_path)


def test_every_rule_says_what_it_looks_for() -> None:
    for name in RULES:
        rule = RULES[name]
        assert rule.name == name
        assert rule.summary.endswith(".")
        assert name.partition(".")[0] in ("files", "header", "config", "card", "tensors", "values", "base")
