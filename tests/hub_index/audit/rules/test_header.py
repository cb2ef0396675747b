"""Headers made by hand: every fault is named, several at once, and no weight byte is read after one."""

import json

import pytest

from compose.hub_index.audit.evidence import Evidence
from compose.hub_index.audit.rule import RULES, run_rules

A = "base_model.model.layers.0.q_proj.lora_A.weight"
B = "base_model.model.layers.0.q_proj.lora_B.weight"


def entry(shape: list, begin: int, end: int, dtype: str = "F32") -> dict:
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


GOOD = {A: entry([1, 2], 0, 8), B: entry([2, 1], 8, 16)}
DATA = bytes(16)


@pytest.mark.parametrize(
    ("header", "data", "expected"),
    [
        ({A: entry([1, 2], 0, 8), B: entry([2, 1], 4, 12)}, bytes(12), "header.overlap"),
        ({A: entry([1, 2], 0, 8), B: entry([2, 1], 0, 8)}, bytes(8), "header.overlap"),
        ({A: entry([1, 2], 8, 0), B: entry([2, 1], 8, 16)}, DATA, "header.overlap"),
        ({A: entry([1, 2], 0, 8), B: entry([2, 1], 12, 20)}, bytes(20), "header.extent"),
        (GOOD, bytes(24), "header.extent"),
        (GOOD, bytes(9), "header.extent"),
        ({A: entry([1 << 40, 1 << 40], 0, 8), B: entry([2, 1], 8, 16)}, DATA, "header.shape"),
        ({A: entry([0, 1 << 62], 0, 0), B: entry([2, 1], 0, 8)}, bytes(8), "header.shape"),
        ({A: entry([1] * 4096, 0, 4), B: entry([2, 1], 4, 12)}, bytes(12), "header.shape"),
        ({A: entry([], 0, 4), B: entry([2, 1], 4, 12)}, bytes(12), "header.shape"),
        ({A: entry([1, 2], 0, 2, "F8_E4M3"), B: entry([2, 1], 2, 10)}, bytes(10), "header.entry"),
        ({A: entry([1, -2], 0, 8), B: entry([2, 1], 8, 16)}, DATA, "header.entry"),
        ({A: entry([1, 2], -8, 0), B: entry([2, 1], 8, 16)}, DATA, "header.entry"),
        ({A: {"dtype": "F32", "shape": [1, 2]}, B: entry([2, 1], 0, 8)}, bytes(8), "header.entry"),
        ({**GOOD, "__metadata__": {"format": 1}}, DATA, "header.text"),
        ({"a\0b": entry([1, 2], 0, 8)}, bytes(8), "header.name"),
        ({"../../etc/passwd": entry([1, 2], 0, 8)}, bytes(8), "header.name"),
        ({"x" * 5000: entry([1, 2], 0, 8)}, bytes(8), "header.name"),
        ({}, b"", "header.count"),
        (b"[1, 2]", b"", "header.text"),
        (b"{not json", b"", "header.text"),
        (b'{"a": "\xff"}', b"", "header.text"),
        (b"[" * 100_000, b"", "header.text"),
        (b" " + json.dumps(GOOD).encode(), DATA, "header.text"),
        (f'{{"{A}": {json.dumps(GOOD[A])}, "{A}": {json.dumps(GOOD[A])}}}'.encode(), bytes(8), "header.duplicate"),
    ],
)
def test_each_fault_has_its_rule(make, weights, rules, header, data: bytes, expected: str) -> None:
    found = rules(weights(make(), header, data))
    assert expected in found
    assert RULES[expected].hard
    assert "tensors.rank" not in found
    assert "values.finite" not in found


@pytest.mark.parametrize("size", [0, 3, 7])
def test_files_too_short_for_a_length(make, findings, size: int) -> None:
    folder = make()
    (folder / "adapter_model.safetensors").write_bytes(bytes(size))
    assert f"{size} bytes" in findings(folder, "header.truncated")[0].detail


def test_a_header_longer_than_its_file_is_truncated_and_an_endless_one_a_bomb(make, weights, rules) -> None:
    assert "header.truncated" in rules(weights(make("one"), GOOD, DATA, length=10_000))
    assert "header.bomb" in rules(weights(make("two"), GOOD, DATA, length=2**63))
    assert "header.bomb" in rules(weights(make("three"), GOOD, DATA, length=100 * 2**20))


def test_large_metadata_is_told_and_is_no_reason_to_refuse(make, weights, rules) -> None:
    found = rules(weights(make(), {**GOOD, "__metadata__": {"x": "y" * 2**21}}, DATA))
    assert "header.metadata" in found
    assert not RULES["header.metadata"].hard
    assert "tensors.gaps" not in found


def test_all_faults_of_one_header_are_named(make, weights, rules) -> None:
    header = {
        "../x": entry([1, 2], 0, 8),
        A: entry([0, 1 << 62], 8, 8),
        B: entry([2, 1], 4, 12),
        "odd": entry([1], 12, 14, "I16"),
        "broken": 3,
    }
    found = rules(weights(make(), header, bytes(99)))
    assert {"header.name", "header.shape", "header.overlap", "header.entry"} <= found


def test_many_findings_of_one_rule_are_counted(make, weights, findings) -> None:
    header = {f"bad name {at}": entry([1], 4 * at, 4 * at + 4) for at in range(50)}
    found = findings(weights(make(), header, bytes(200)), "header.name")
    assert len(found) == 9
    assert "42 more" in found[-1].detail


def test_names_from_strangers_cannot_write_to_a_terminal(make, weights) -> None:
    folder = weights(make(), {"\x1b[31mred\u202e\ud800": entry([1], 0, 4)}, bytes(4))
    for one in run_rules(Evidence(folder, "one")):
        assert one.detail.isprintable()
        one.detail.encode()


def test_empty_tensors_are_allowed_where_ranks_are_pruned(make, edit, weights, findings) -> None:
    header = {A: entry([0, 2], 0, 0), B: entry([2, 0], 0, 0)}
    assert findings(edit(weights(make("one"), header), peft_type="ADALORA"), "header.shape") == []
    assert findings(weights(make("two"), header), "header.shape")


def test_nothing_is_allocated_for_what_a_header_claims(make, weights) -> None:
    folder = weights(make(), {A: entry([1 << 30, 1 << 30], 0, 8), B: entry([2, 1], 8, 16)}, DATA)
    evidence = Evidence(folder, "one")
    assert any(one.rule == "header.shape" for one in run_rules(evidence))
    assert evidence.blocked
    assert evidence.tensors == {}
