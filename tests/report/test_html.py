"""The report page: everything is there, everything is escaped, nothing is loaded."""

import copy
import html.parser
import json
import re
from typing import Any

import pytest

from compose.report.html import duration, render, sentence, size

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>\x1b[31m\u202e"
VOID = {"meta", "br", "img", "link", "input", "hr"}


class Page(html.parser.HTMLParser):
    """Collects tags with attributes and text, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open, f"</{tag}> without an opening tag"
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "title"):
            self.text.append(data)

    def count(self, tag: str, kind: str = "") -> int:
        return sum(1 for name, attrs in self.tags if name == tag and kind in [*(attrs.get("class") or "").split(), ""])

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def section(text: str, name: str) -> str:
    found = re.search(rf'<section id="{name}".*?</section>', text, re.S)
    assert found, f"no section {name}"
    return found.group(0)


def poison(value: Any) -> Any:
    """Return a copy of a report in which every free text is hostile."""
    free = ("name", "label", "note", "input", "output", "text_base", "text_composed", "reason", "ran", "id")
    fixed = {"composed", "base", "constant"}
    if isinstance(value, dict):
        return {
            key: HOSTILE + item if key in free and isinstance(item, str) and item not in fixed else poison(item)
            for key, item in value.items()
        }
    return [poison(item) for item in value] if isinstance(value, list) else value


def test_the_page_is_well_formed_and_complete(report: dict[str, Any]) -> None:
    text = render(report)
    page = Page(text)
    assert page.open == []
    for name in ("result", "warnings", "controls", "weights", "search", "shots", "test", "bank", "provenance"):
        section(text, name)
    assert "One weight per adapter" in page.words
    assert report["search"]["reason"] in page.words
    assert report["warnings"][0] in page.words
    for control in report["controls"]:
        assert control["label"] in page.words
    for adapter in report["bank"]["adapters"]:
        assert adapter["name"] in page.words
        assert adapter["sha256"][:12] in page.words
    for example in (*report["examples"], *report["test_examples"]):
        assert example["input"] in page.words
        assert example["text_composed"] in page.words
    for name, version in report["versions"].items():
        assert f"{name} {version}" in page.words


def test_every_chart_is_drawn(report: dict[str, Any]) -> None:
    text = render(report)
    assert Page(section(text, "search")).count("path", "best") == 1
    assert Page(section(text, "search")).count("circle", "value") > 20
    controls = Page(section(text, "controls"))
    tested, losses, shots = 7, 6, 6
    assert controls.count("circle", "dot") == tested + losses + shots
    assert controls.count("line", "whisker") == tested + losses
    assert controls.count("circle", "main") == 3
    weights = Page(section(text, "weights"))
    assert weights.count("rect", "positive") == 3
    assert weights.count("rect", "negative") == 2
    shown = Page(section(text, "shots"))
    assert (shown.count("circle", "hollow"), shown.count("circle", "better"), shown.count("circle", "worse")) == (
        5,
        4,
        1,
    )


def test_layerwise_weights_are_a_heat_map_with_readable_values(make_report) -> None:
    report = make_report(groups=6)
    text = section(render(report), "weights")
    page = Page(text)
    assert page.count("rect", "cell") == 5 * 6
    drawn = re.findall(r'class="on-(?:strong|weak)"[^>]*>([^<]+)<', text)
    assert len(drawn) == 5 * 6
    assert ".93" in drawn
    assert "layer 0" in page.words
    assert "layer 5" in page.words


def test_hostile_texts_are_shown_as_text(report: dict[str, Any]) -> None:
    text = render(poison(report))
    page = Page(text)
    assert page.open == []
    assert {name for name, _ in page.tags} & {"script", "img", "iframe", "link", "object"} == set()
    assert not any(name.startswith("on") for _, attrs in page.tags for name in attrs)
    assert text.count("&lt;script&gt;alert(") > 40
    assert "\x1b" not in text
    assert "\u202e" not in text
    assert "\\x1b[31m\\u202e" in text


@pytest.mark.parametrize("groups", [1, 6])
def test_nothing_is_loaded_from_anywhere(make_report, groups: int) -> None:
    text = render(make_report(groups))
    page = Page(text)
    assert not re.search(r"https?://|//cdn|url\(|@import", text)
    assert not any(name in ("src", "href", "xlink:href", "action") for _, attrs in page.tags for name in attrs)
    policies = [attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; style-src 'unsafe-inline'"]


def test_both_colour_schemes_and_narrow_pages_are_served(report: dict[str, Any]) -> None:
    text = render(report)
    assert "prefers-color-scheme: dark" in text
    assert "max-width: 720px" in text
    assert 'name="viewport"' in text


def test_a_large_run_stays_below_300_kb(make_report) -> None:
    report = make_report(groups=48, shots=200, bank=1000, history=20_000)
    for example in report["examples"]:
        example["input"] *= 200
    text = render(report)
    assert len(text.encode()) < 300_000
    assert "880 more adapters stand in report.json" in text
    assert "more characters)" in text


def test_a_kept_base_model_and_missing_parts_are_said(report: dict[str, Any]) -> None:
    report["search"]["choice"] = "base"
    report["search"]["history"] = []
    report["weights"]["values"] = [[0.0] * 20]
    report |= {"output": None, "test_examples": [], "warnings": [], "command": None}
    report["data"]["test"] = None
    for control in report["controls"]:
        control["test"] = None
    words = Page(render(report)).words
    assert "The base model, unchanged" in words
    assert "All weights are zero" in words
    assert "None: the base model was chosen" in words
    assert "No test file was given" in words
    assert "No evaluations were recorded" in words
    assert "Test items" not in words


def test_no_controls_and_unknown_losses_leave_a_readable_page(report: dict[str, Any]) -> None:
    report["controls"] = []
    for example in report["examples"]:
        example |= {"loss_base": None, "text_base": None, "text_composed": None}
    text = render(report)
    assert 'id="controls"' not in text
    assert "Base</th>" not in section(text, "shots")


def test_a_difference_whose_interval_holds_zero_is_called_unclear(report: dict[str, Any]) -> None:
    single = next(control for control in report["controls"] if control["name"] == "best_single")
    assert section(render(report), "controls").count(", unclear") == 1
    single["test"]["minus_composed"] = {"mean": -0.09, "low": -0.12, "high": -0.02}
    assert section(render(report), "controls").count(", unclear") == 0


def test_the_report_is_not_changed_and_survives_json(report: dict[str, Any]) -> None:
    before = copy.deepcopy(report)
    text = render(report)
    assert report == before
    assert render(json.loads(json.dumps(report))) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.25, "4.25 s"), (59.0, "59 s"), (200.0, "3 min 20 s"), (3600.0, "60 min 0 s")]
)
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(0, "0 B"), (999, "999 B"), (13_767_000, "13.8 MB"), (2 * 10**9, "2 GB")])
def test_sizes(count: int, text: str) -> None:
    assert size(count) == text


def test_sentences() -> None:
    assert (sentence("chose base"), sentence("Done."), sentence("")) == ("Chose base.", "Done.", "")
