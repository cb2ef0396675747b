"""JSON without its traps."""

import pytest

from compose.errors import AdapterFormatError
from compose.files.strict_json import parse_object

BAD = {
    "NaN": (b'{"a": NaN}', "NaN is not a JSON number"),
    "Infinity": (b'{"a": [-Infinity]}', "-Infinity is not a JSON number"),
    "overflow": (b'{"a": 1e999}', "beyond float64"),
    "digits": (b'{"a": 1' + b"0" * 5000 + b"}", "not valid JSON"),
    "duplicate": (b'{"a": 1, "b": {"c": 1, "c": 2}}', "duplicate key 'c'"),
    "array": (b"[]", "must be a JSON object, got list"),
    "number": (b"1", "must be a JSON object, got int"),
    "empty": (b"", "not valid JSON"),
    "trailing": (b"{} {}", "not valid JSON"),
    "deep": (b'{"a":' + b"[" * 100_000, "nested too deeply|not valid JSON"),
    "65 levels": (b'{"a":' + b"[" * 64 + b"]" * 64 + b"}", "at most 64 levels"),
    "65 levels of both": (b'{"a":[' * 33 + b"]}" * 33, "at most 64 levels"),
    "latin-1": (b'{"a": "\xe9"}', "not UTF-8 text"),
    "surrogate": (b'{"a": "\xed\xa0\x80"}', "not UTF-8 text"),
}


@pytest.mark.parametrize("case", sorted(BAD))
def test_traps_are_refused_with_place_and_reason(case):
    data, message = BAD[case]
    with pytest.raises(AdapterFormatError, match=f"here: .*({message})"):
        parse_object(data, "here")


def test_plain_json_is_parsed():
    assert parse_object(b'{"a": [1, 2.5, null, true], "b": {"c": "d"}}', "x") == {
        "a": [1, 2.5, None, True],
        "b": {"c": "d"},
    }


def test_64_levels_are_read():
    value = parse_object(b'{"a":' + b"[" * 63 + b"]" * 63 + b"}", "here")
    for _ in range(63):
        value = value["a"] if isinstance(value, dict) else value[0]
    assert value == []
