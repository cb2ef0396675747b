"""S5: no regular expression of a configuration is run, so none can take long."""

import re

import pytest

from compose.errors import AdapterFormatError
from tests.hostile.adapters import ALPHA, files_of, lora_tensors, write
from tests.hostile.loading import load
from tests.hostile.regexes import EXPRESSIONS, MOST_SECONDS, run


def test_48_expressions_take_no_time(tmpfs):
    figures = run(tmpfs)
    assert figures.other == []
    assert (figures.cases, figures.accepted) == (48, 48)
    assert figures.cpu_s < MOST_SECONDS


def test_none_of_them_is_compiled(tmpfs, monkeypatch):
    compiled, original = [], re._compile

    def compiling(pattern, flags):
        compiled.append(str(pattern))
        return original(pattern, flags)

    monkeypatch.setattr(re, "_compile", compiling)
    assert re.match("seen", "seen")
    assert compiled == ["seen"]
    assert run(tmpfs).cases == 48
    assert [one for one in compiled if any(expression in one for expression in EXPRESSIONS)] == []


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_one_that_decides_the_scaling_is_refused(expression, tmpfs):
    write(tmpfs, files_of(lora_tensors(), alpha_pattern={expression: 2 * ALPHA}))
    with pytest.raises(AdapterFormatError, match="is a regular expression, which is never run"):
        load(tmpfs)
