"""Charts: scales, number formats, and drawings that stay inside their frame."""

import math
import re

import pytest

from compose.report import svg


@pytest.mark.parametrize(
    ("values", "include", "expected"),
    [
        ([0.1, 3.4], [0.0], (0.0, 4.0)),
        ([-0.4, 0.9], [0.0], (-0.5, 1.0)),
        ([5.0, 5.0], [], (4.0, 6.0)),
        ([], [], (0.0, 1.0)),
        ([math.nan, math.inf, 2.0], [0.0], (0.0, 2.0)),
        ([3.3685, 3.3901], [], (3.36, 3.4)),
    ],
    ids=["from-zero", "signed", "one-value", "nothing", "not-finite", "narrow"],
)
def test_a_scale_covers_its_values_and_ends_on_ticks(values, include, expected) -> None:
    scale = svg.Scale.covering(values, include=include)
    finite = [value for value in (*values, *include) if math.isfinite(value)]
    assert all(scale.low <= value <= scale.high for value in finite)
    ticks = scale.ticks()
    assert 3 <= len(ticks) <= 8
    assert ticks[0] == pytest.approx(scale.low)
    assert ticks[-1] == pytest.approx(scale.high)
    assert (scale.low, scale.high) == pytest.approx(expected)


def test_positions_are_percentages_held_inside_the_axis() -> None:
    scale = svg.Scale(-1.0, 3.0)
    assert [scale.at(value) for value in (-1.0, 0.0, 3.0, 9.0, -9.0, math.nan)] == [0, 25, 100, 100, 0, 100]


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.123456, "0.123"), (12.345, "12.3"), (1234.5, "1,234"), (-2.5, "-2.50"), (7.0, "7"), (0.00001, "1.0e-05")],
)
def test_numbers_have_three_significant_digits(value: float, text: str) -> None:
    assert svg.number(value) == text.replace("-", svg.MINUS)


def test_missing_and_infinite_numbers_are_words() -> None:
    assert svg.number(None) == svg.NONE
    assert svg.number(math.nan) == "not finite"
    assert svg.percent(None) == svg.NONE
    assert svg.percent(0.684) == "68 %"


@pytest.mark.parametrize(
    ("value", "text"), [(0.42, ".42"), (-0.42, "-.42"), (0.001, "0"), (1.25, "1.2"), (-0.996, "-1.0"), (1.0, "1.0")]
)
def test_cells_write_weights_shortly(value: float, text: str) -> None:
    assert svg.short(value) == text.replace("-", svg.MINUS)


def test_a_bar_starts_at_zero_and_shows_its_sign() -> None:
    scale = svg.Scale(-1.0, 1.0)
    assert 'class="positive" x="50.00%" width="25.00%"' in svg.bar_row(scale, 0.5)
    assert 'class="negative" x="25.00%" width="25.00%"' in svg.bar_row(scale, -0.5)


def test_a_dumbbell_says_whether_the_loss_fell() -> None:
    scale = svg.Scale(0.0, 4.0)
    assert "better" in svg.dumbbell_row(scale, 3.0, 1.0)
    assert "worse" in svg.dumbbell_row(scale, 1.0, 3.0)


def test_the_strength_of_a_cell_is_its_share_of_the_largest() -> None:
    row = svg.heat_row([1.0, -0.5, 0.0], 1.0, show_values=True)
    assert re.findall(r'class="cell (\w+)"[^>]*fill-opacity="([\d.]+)"', row) == [
        ("positive", "1.00"),
        ("negative", "0.50"),
        ("positive", "0.00"),
    ]
    assert "on-strong" not in svg.heat_row([0.2], 1.0, show_values=True)
    assert "<text" not in svg.heat_row([0.2], 1.0, show_values=False)
    assert 'fill-opacity="0.00"' in svg.heat_row([0.0], 0.0, show_values=True)


def test_texts_in_a_drawing_are_escaped() -> None:
    assert "<b>" not in svg.heat_header(["<b>x"])
    assert "&lt;b&gt;x" in svg.heat_header(["<b>x"])


def test_convergence_draws_every_value_and_one_outlier_does_not_flatten_it() -> None:
    history = [(float(i), 3.0 - 0.1 * i + 0.05, 3.0 - 0.1 * i) for i in range(20)]
    calm = svg.convergence(history)
    assert calm.count("<circle") == 20
    wild = svg.convergence([*history[:5], (5.0, 1e9, history[4][2]), *history[6:]])
    assert wild.count("<circle") == 20
    assert "1e" not in re.sub(r"<path[^>]*>", "", wild)
    heights = [float(found) for found in re.findall(r'cy="([\d.]+)"', wild)]
    assert max(heights) - sorted(heights)[1] > 60


def test_long_histories_are_thinned_and_bad_points_left_out() -> None:
    history = [(float(i), 2.0, 1.0) for i in range(5000)]
    assert svg.convergence(history).count("<circle") == 400
    assert svg.convergence([(0.0, math.nan, math.nan)]) == ""
    assert "NaN" not in svg.convergence([(0.0, math.inf, 1.0), (1.0, 1.0, 1.0)])
