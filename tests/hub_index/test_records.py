"""Records: what can be in one, what identity means, and that names follow the rule of the formats."""

from __future__ import annotations

import math
from dataclasses import FrozenInstanceError

import pytest
import torch

from compose.errors import AdapterFormatError, HubIndexError
from compose.formats.header import check_name
from compose.hub_index.records import (
    MAX_TEXT,
    AdapterRecord,
    AuditFinding,
    EmbeddingRecord,
    ExampleRecord,
    LineageRecord,
    ModuleRecord,
    ScoreRecord,
    StatRecord,
    check_adapter_name,
)

HASH = "0" * 64


def test_a_record_is_frozen_and_equal_by_value(make_record) -> None:
    assert make_record(3) == make_record(3) != make_record(4)
    with pytest.raises(FrozenInstanceError):
        make_record(3).name = "other"


def test_identity_is_content_not_name_or_card() -> None:
    one = AdapterRecord(name="a", sha256_weights=HASH, title="x")
    assert one.sha256 == AdapterRecord(name="b", sha256_weights=HASH).sha256
    assert one.sha256 != AdapterRecord(name="a", sha256_weights="1" * 64).sha256
    assert one.sha256 != AdapterRecord(name="a", sha256_weights=HASH, sha256_config="1" * 64).sha256


def test_a_description_is_known_by_its_name() -> None:
    one = AdapterRecord(name="a", source="description")
    assert one.sha256 == AdapterRecord(name="a", source="description", summary="x").sha256
    assert one.sha256 != AdapterRecord(name="b", source="description").sha256


@pytest.mark.parametrize(
    "name",
    ["a", "a.b-c_d", "9", "x" * 96, "", ".a", "-a", "a..b", "a/b", "a\\b", "a b", "a\n", "ä", "x" * 97, "~a", "a\0"],
)
def test_names_follow_the_rule_of_the_formats(name: str) -> None:
    try:
        check_name(name, "here")
        fine = True
    except AdapterFormatError:
        fine = False
    if fine:
        assert check_adapter_name(name) == name
    else:
        with pytest.raises(HubIndexError, match="adapter name must be"):
            check_adapter_name(name)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"sha256_weights": ""}, "sha256_weights must be 64 hexadecimal digits"),
        ({"sha256_weights": HASH.upper().replace("0", "A")}, "sha256_weights"),
        ({"base_fingerprint": "abc"}, "base_fingerprint"),
        ({"status": "gone"}, "status must be one of active, quarantined, removed"),
        ({"source": "ftp"}, "source must be one of"),
        ({"summary": "\ud800"}, "summary must be text .* valid Unicode"),
        ({"summary": "x" * (MAX_TEXT + 1)}, "summary"),
        ({"summary": None}, "summary"),
        ({"tags": ["a"]}, "tags must be a tuple"),
        ({"tags": (1,)}, "tags must be a tuple"),
        ({"num_bytes": True}, "num_bytes must be a whole number"),
        ({"num_bytes": 2**63}, "num_bytes"),
        ({"rank_min": 9, "rank_max": 8}, "rank_min must be at most rank_max 8"),
        ({"scaling": {"a": math.nan}}, "scaling must be a mapping"),
        ({"scaling": {"a": "x"}}, "scaling must be a mapping of texts to finite numbers"),
        ({"scaling": {"a": 10**400}}, "scaling must be a mapping of texts to finite numbers"),
        ({"hyper": {"a": {1, 2}}}, "hyper must be a mapping of JSON values"),
        ({"hyper": {1: 2}}, "hyper must be a mapping"),
        ({"hyper": ()}, "hyper must be a mapping"),
        ({"modules": ("x",)}, "modules must be a tuple of ModuleRecord"),
        ({"modules": (ModuleRecord(name="m"), ModuleRecord(name="m"))}, "module 'm' is given twice"),
        ({"parents": (LineageRecord(parent_sha256=HASH), LineageRecord(parent_sha256=HASH))}, "given twice"),
        (
            {"scores": (ScoreRecord(task="t", metric="m", value=1), ScoreRecord(task="t", metric="m", value=2))},
            "twice",
        ),
    ],
)
def test_a_bad_field_is_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(HubIndexError, match=rf"adapter 'a': .*{message}"):
        AdapterRecord(**{"name": "a", "sha256_weights": HASH} | fields)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModuleRecord(name=""), "module name"),
        (lambda: ModuleRecord(name="m", scaling=math.inf), "scaling must be a finite number"),
        (lambda: ModuleRecord(name="m", rank="8"), "rank must be a whole number"),
        (lambda: ModuleRecord(name="m", has_dora=1), "has_dora must be bool"),
        (lambda: ScoreRecord(task="", metric="m", value=1), "a task and a metric"),
        (lambda: ScoreRecord(task="t", metric="m", value=math.nan), "value must be a finite number"),
        (lambda: AuditFinding(rule="r", severity="bad", detail=""), "severity must be one of info, low"),
        (lambda: StatRecord(module="m", sigma1=math.nan, fro=1, energy1=1, spec_entropy=1, kurtosis=1), "sigma1"),
        (lambda: ExampleRecord(input=3), "input must be text"),
        (lambda: LineageRecord(parent_sha256="x"), "parent_sha256"),
    ],
)
def test_a_bad_part_is_refused(make, message: str) -> None:
    with pytest.raises(HubIndexError, match=message):
        make()


def test_a_statistic_that_is_not_defined_is_none() -> None:
    one = StatRecord(module="m", sigma1=0.0, fro=0.0, energy1=None, spec_entropy=None, kurtosis=None, b_zero=True)
    assert one.energy1 is None


def test_a_vector_survives_its_bytes() -> None:
    values = torch.randn(5)
    one = EmbeddingRecord.from_array(values.numpy(), encoder_id="e", encoder_sha256=HASH, kind="card")
    assert one.dim == 5
    torch.testing.assert_close(torch.from_numpy(one.array()), values, rtol=0, atol=0)


@pytest.mark.parametrize("values", [[0.0, 0.0], [math.nan, 1.0], [math.inf, -math.inf], [], [[1.0, 2.0]]])
def test_a_vector_without_a_direction_is_refused(values: list) -> None:
    with pytest.raises(HubIndexError, match="vector"):
        EmbeddingRecord.from_array(values, encoder_id="e", encoder_sha256=HASH, kind="card")


@pytest.mark.parametrize("kind", ["", "Card", "a b", "x" * 65, "../a"])
def test_a_kind_of_vector_is_a_word(kind: str) -> None:
    with pytest.raises(HubIndexError, match="kind of an embedding"):
        EmbeddingRecord.from_array([1.0], encoder_id="e", encoder_sha256=HASH, kind=kind)
