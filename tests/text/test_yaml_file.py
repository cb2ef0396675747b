"""YAML in bounded time and with values that every later step can use: the traps that recipes do not reach."""

import contextlib
import json
import time

import pytest

from compose.errors import ComposeError
from compose.text.yaml_file import MOST_BYTES, MOST_YAML_BYTES, parse_yaml


@pytest.mark.parametrize("tag", ["!!bool x", "!!int ''", "!!float ''", "!!map [1]", "!!set {a: 1}", "!own x", "! x"])
def test_tags_are_refused_whatever_they_are_put_on(tag):
    with pytest.raises(ComposeError, match=r"here: tags \(.*\) are not allowed"):
        parse_yaml(f"a: {tag}".encode(), "here")


@pytest.mark.parametrize(
    "number", ["18446744073709551616", "-9223372036854775809", "1" * 101, "0x" + "f" * 17, "1:" + "59:" * 30 + "1"]
)
def test_whole_numbers_have_64_bits(number):
    with pytest.raises(ComposeError, match="beyond 64 bits"):
        parse_yaml(f"a: {number}".encode(), "here")
    assert parse_yaml(b"a: 18446744073709551615\nb: -9223372036854775808", "here") == {"a": 2**64 - 1, "b": -(2**63)}


@pytest.mark.parametrize("number", [".inf", "-.inf", ".nan", "1e400", "1." + "0" * 100])
def test_other_numbers_are_finite_and_short(number):
    with pytest.raises(ComposeError, match="beyond float64"):
        parse_yaml(f"a: {number}".encode(), "here")


def test_json_has_the_same_numbers():
    with pytest.raises(ComposeError, match="a number of 65 bits"):
        parse_yaml(json.dumps({"a": [{"b": 2**64}]}).encode(), "here")
    assert parse_yaml(b'{"a": 18446744073709551615}', "here") == {"a": 2**64 - 1}
    with pytest.raises(ComposeError, match="beyond float64"):
        parse_yaml(b'{"a": 1e400}', "here")


def test_json_may_be_large_and_yaml_in_braces_may_not():
    record = {"parents": ["x" * 100] * 5000}
    text = json.dumps(record).encode()
    assert MOST_YAML_BYTES < len(text) < MOST_BYTES
    assert parse_yaml(text, "here") == record
    with pytest.raises(ComposeError, match="write it as JSON"):
        parse_yaml(b"{a: 1, " + text[1:], "here")
    assert parse_yaml(b"{a: 1, b: [x]}", "here") == {"a": 1, "b": ["x"]}


@pytest.mark.parametrize("piece", ["- \n", "[],", "1,"])
def test_the_slowest_text_of_the_largest_size_is_read_in_seconds(piece):
    opened = "" if piece.endswith("\n") else "["
    data = (opened + piece * (MOST_YAML_BYTES // len(piece) - 1)).encode()
    begun = time.process_time()
    with contextlib.suppress(ComposeError):
        parse_yaml(data, "here")
    assert time.process_time() - begun < 3.0
