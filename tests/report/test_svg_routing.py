"""Heat maps of fixed cells and ranges: every cell where it belongs, text escaped."""

import re
import xml.etree.ElementTree as ET

from compose.report import svg
from compose.report.svg_routing import CELL_HEIGHT, cell_width, heat_panel, range_row, row_labels


def test_every_cell_is_drawn_once_with_the_strength_of_its_value() -> None:
    drawing = ET.fromstring(str(heat_panel([[0.0, 0.5], None, [1.0, 0.5]], 1.0, ["1", "2"], "a & b")))
    assert drawing.attrib["aria-label"] == "a & b"
    assert drawing.attrib["width"] == "36"
    assert drawing.attrib["height"] == str(3 * CELL_HEIGHT + 18)
    found = {}
    for path in drawing.iter("path"):
        for x, y in re.findall(r"M(\d+) (\d+)", path.attrib["d"]):
            found[int(x) // 18, int(y) // CELL_HEIGHT] = path.attrib.get("fill-opacity", path.attrib["class"])
    assert found == {(0, 0): "none", (1, 0): "0.50", (0, 2): "1.00", (1, 2): "0.50"}
    assert [text.text for text in drawing.iter("text")] == ["1", "2"]


def test_a_map_of_nothing_has_no_cells() -> None:
    assert not re.search(r"M\d", heat_panel([None], 0.0, ["1"], "x"))
    assert "fill-opacity" not in heat_panel([[0.0]], 0.0, ["1"], "x")


def test_cells_shrink_and_labels_thin_out_where_there_are_many() -> None:
    assert [cell_width(count) for count in (4, 20, 60)] == [18, 14, 9]
    drawing = heat_panel([[0.1] * 60], 1.0, [str(index + 1) for index in range(60)], "x")
    assert drawing.count("<text") == 30


def test_labels_are_escaped() -> None:
    assert "&lt;b&gt;" in row_labels(["<b>"])
    assert "&lt;b&gt;" in heat_panel([[1.0]], 1.0, ["<b>"], "<i>")


def test_a_range_runs_from_the_filled_dot_to_the_hollow_one() -> None:
    drawing = range_row(svg.Scale(0.0, 2.0), 0.5, 1.5)
    assert 'x1="25.00%" x2="75.00%"' in drawing
    assert re.search(r'class="dot main" cx="25\.00%"', drawing)
    assert re.search(r'class="dot hollow" cx="75\.00%"', drawing)


def test_lines_cover_their_points_and_leave_out_what_is_not_finite() -> None:
    drawing = svg.line_plot([("e0", [(0, 0.0), (10, 1.0)]), ("e1", [(5, float("nan"))])], "<x>", height=100)
    assert drawing.count("<path") == 1
    assert 'd="M0.00 100.00L100.00 0.00"' in drawing
    assert 'aria-label="&lt;x&gt;"' in drawing
    assert svg.line_plot([("e0", [])], "x") == ""
