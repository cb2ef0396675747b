"""Text from strangers."""

import pytest

from compose.report.plain import printable


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("näive 日本 🙂", "näive 日本 🙂"),
        ("two\nlines\tand", "two\nlines\tand"),
        ("\x1b[31m\x07\r", "\\x1b[31m\\x07\\x0d"),
        ("a\u202eb\u2066c\u200b", "a\\u202eb\\u2066c\\u200b"),
        ("\U000e0041", "\\U000e0041"),
        ("", ""),
    ],
)
def test_invisible_characters_are_spelled_out(text: str, shown: str) -> None:
    assert printable(text) == shown
