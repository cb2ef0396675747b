from __future__ import annotations

from compose.kernels import measure


def test_every_line_names_all_strategies_and_the_choice(monkeypatch):
    monkeypatch.setattr(measure, "_grouped", lambda *_: 1.0)
    monkeypatch.setattr(measure, "_mixture", lambda *_: 1.0)
    grouped, mixture = list(measure.grouped_lines()), list(measure.mixture_lines())
    assert len(grouped) == 40
    assert len(mixture) == 9
    assert grouped[0].startswith("grouped D=256 32x1 U=2: rows 1, stacked 1, segments 1; chosen ")
    assert mixture[2].startswith("mixture E=8 8x64 gates (8, 64, 2): gather 1, scatter 1, pairs 1; chosen ")


def test_a_call_takes_time():
    assert measure.microseconds(lambda: sum(range(2000))) > 1.0
