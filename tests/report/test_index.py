"""The index of several reports."""

from compose.report.index import render_index

ROW = {
    "task": "new_wording_sum",
    "group": "wording",
    "description": "<b>sums</b>",
    "shots": 5,
    "test": 60,
    "exact_match": {name: {"mean": 0.5, "low": 0.4, "high": 0.6} for name in ("base", "composed")},
    "choice": "single",
    "reason": "chose single",
    "reading": "It finds the adapter.",
    "cost": 58.0,
    "seconds": 3.0,
    "report": "new_wording_sum/report.html",
}


def test_the_index_links_every_report_and_escapes() -> None:
    text = render_index([ROW, {**ROW, "task": "other", "report": "other/report.html"}])
    assert text.count("<section>") == 2
    assert '<a href="new_wording_sum/report.html">' in text
    assert '<a href="other/report.html">' in text
    assert "<b>sums" not in text
    assert "&lt;b&gt;sums" in text
    assert text.count('class="dot main"') == 2
    assert "It finds the adapter." in text


def test_the_index_loads_nothing() -> None:
    text = render_index([ROW])
    assert "http://" not in text
    assert "https://" not in text
    assert "<script" not in text
