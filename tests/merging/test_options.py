"""Options of merge methods are of the types declared; every method's own defaults are."""

from dataclasses import fields

import pytest

from compose.engine.data_merge import DATA_METHODS, make_data_method
from compose.errors import IncompatibleError
from compose.merging.method import METHODS, make_method


@pytest.mark.parametrize(
    ("method", "option", "value", "message"),
    [
        ("ties", "scale", "sum", "scale must be a finite number, got 'sum'"),
        ("ties", "scale", True, "scale must be a finite number, got True"),
        ("ties", "scale", float("inf"), "scale must be a finite number, got inf"),
        ("ties", "scale", 10**400, "scale must be a finite number, got 1000"),
        ("ties", "elect", "loudest", "elect must be 'weighted', 'raw', 'count', 'none' or left out, got 'loudest'"),
        ("tsvm", "task_rank", 1e300, r"task_rank must be a whole number or left out, got 1e\+300"),
        ("nuslerp", "flatten", 1, "flatten must be true or false, got 1"),
        ("subtract_general", "general", 3, "general must be text or left out, got 3"),
        ("ties", "densty", 0.2, "has no option 'densty'; its options: density=0.2"),
        ("ties", "density", 2.0, "merge method 'ties': .*density"),
    ],
)
def test_a_wrong_option_is_refused_by_name(method, option, value, message):
    with pytest.raises(IncompatibleError, match=message):
        make_method(method, {option: value})


def test_methods_with_data_are_checked_too():
    with pytest.raises(IncompatibleError, match=r"steps must be a whole number or left out, got 1\.5"):
        make_data_method("cat", {"steps": 1.5})


@pytest.mark.parametrize("method", sorted(METHODS))
def test_defaults_are_allowed(method):
    options = {field.name: field.default for field in fields(METHODS[method])}
    assert make_method(method, options) == make_method(method, {})


@pytest.mark.parametrize("method", sorted(DATA_METHODS))
def test_defaults_of_methods_with_data_are_allowed(method):
    options = {field.name: field.default for field in fields(DATA_METHODS[method])}
    assert make_data_method(method, options) == make_data_method(method, {})
