"""The page of a router: complete, well-formed, escaped, self-contained."""

import html.parser
import re

import torch

from compose.report.routing_data import Course, course_of
from compose.report.routing_html import colours, render_routing
from compose.routers.metrics import RoutingMeter
from compose.routers.routing import Decisions
from compose.routers.token_strip import strip_of
from compose.routers.trace import RoutingTrace

HOSTILE = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>\x1b[31m\u202e"


class Page(html.parser.HTMLParser):
    """Collects tags and text, and checks that tags nest."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag) -> None:
        assert self.open
        assert self.open.pop() == tag

    def handle_data(self, data) -> None:
        self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join(" ".join(self.text).split())


def measured(
    experts: int = 4, layers: int = 3, tasks: tuple[str, ...] = ("sums", "poems"), *, selected: int = 0, seed: int = 0
) -> RoutingTrace:
    generator = torch.Generator().manual_seed(seed)
    meter = RoutingMeter([f"expert {index}" for index in range(experts)], tasks)
    for task in range(len(tasks)):
        each = [site(layer, task, experts, selected, generator) for layer in range(layers)]
        meter.update(each)
        strip = strip_of(
            each, ["the", " cat", "\n", "<b>", " sat", "."], name=f"text {task}", task=tasks[task], prompt_length=4
        )
        meter.keep(strip)
    return meter.trace({"preset": "molora", "base": "tiny"})


def site(layer: int, task: int, experts: int, selected: int, generator: torch.Generator) -> Decisions:
    logits = torch.randn(6, experts, generator=generator) * 2
    logits[:, task % experts] += 2
    probs = logits.softmax(-1)
    gates = probs if not selected else probs * (probs >= probs.topk(selected).values[:, -1:])
    ones, tasks = torch.ones(6, dtype=torch.bool), torch.full((6,), task)
    return Decisions(
        f"model.layers.{layer}.q", layer, logits, probs, gates, ones, ones, tasks, tasks % experts,
        torch.ones(experts, dtype=torch.bool), rows_N=torch.zeros(6, dtype=torch.int64),
    )  # fmt: skip


def test_the_page_holds_the_numbers() -> None:
    trace = measured()
    course = course_of(
        [{"step": step, "loss": 2.0 - step, "entropy": 1.0, "load": [0.25] * 4} for step in (0, 1)], trace.experts
    )
    page = Page(render_routing(trace, course, {"router": 0.71234, "none_r64": 0.6}))
    overall, task = trace.overall(), trace.overall("poems")
    for value in (overall.entropy, overall.information, overall.max_load, task.entropy, task.accuracy, *overall.load):
        assert f"{value:.3f}"[:4] in page.words
    for word in ("sums", "poems", "molora", "expert 3", "text 1", "none_r64", "0.712", "Load over steps", "layer"):
        assert word in page.words
    assert sum(1 for tag, _ in page.tags if tag == "figure") == 2 + 3  # two texts; all tasks and two tasks
    ids = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert ids == ["short", "scores", "texts", "where", "tasks", "depth", "course", "measures", "experts", "about"]


def test_parts_without_data_are_left_out() -> None:
    page = Page(render_routing(RoutingTrace(experts=("a",))))
    ids = [attributes["id"] for tag, attributes in page.tags if tag == "section"]
    assert ids == ["warnings", "experts"]
    assert "nothing was counted" in page.words.lower()


def test_tokens_have_the_colour_of_their_expert() -> None:
    trace = measured()
    page = Page(render_routing(trace))
    spans = [attributes for tag, attributes in page.tags if tag == "span" and "title" in attributes]
    marks, titles = colours(trace), list(trace.experts)
    majority = [expert for strip in trace.strips for expert in strip.majority()]
    assert [attributes["class"].split()[0] for attributes in spans] == [marks[expert] for expert in majority]
    assert [attributes["title"] for attributes in spans] == [titles[expert] for expert in majority]
    assert ["response" in attributes["class"] for attributes in spans] == [False] * 4 + [True] * 2 + [False] * 4 + [
        True
    ] * 2
    assert "<b>" in page.words


def test_nothing_is_loaded_and_nothing_escapes() -> None:
    meter = RoutingMeter([HOSTILE, "b", "c", "d"], [HOSTILE, "poems"])
    trace = measured()
    each = [site(layer, 0, 4, 0, torch.Generator().manual_seed(layer)) for layer in range(2)]
    meter.update([one._replace(site=HOSTILE + one.site) for one in each])
    meter.keep(strip_of(each, [HOSTILE] * 6, name=HOSTILE, task=HOSTILE))
    hostile = meter.trace({"preset": HOSTILE, HOSTILE: [HOSTILE]})
    for given in (trace, hostile):
        text = render_routing(given, Course(load={HOSTILE: ((0, 1), (1, 1))}), {"router": 0.1, HOSTILE: 0.2})
        page = Page(text)
        assert {tag for tag, _ in page.tags} & {"script", "img", "link", "iframe", "object", "a"} == set()
        assert not [
            name
            for _, attributes in page.tags
            for name in attributes
            if name.startswith("on") or name in ("src", "href")
        ]
        assert "http" not in re.sub(r"http-equiv", "", text)
        assert "url(" not in text
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f\u202a-\u202e]", text)
    policy = next(attributes["content"] for tag, attributes in page.tags if attributes.get("http-equiv"))
    assert policy == "default-src 'none'; style-src 'unsafe-inline'"


def test_active_experts_are_drawn_where_their_number_varies() -> None:
    assert "Active experts by depth" not in Page(render_routing(measured(selected=2))).words
    trace = measured()
    sums = trace.sites[0]
    sums.scalar("active")[1] -= 1
    assert "Active experts by depth" in Page(render_routing(trace)).words


def test_many_experts_tasks_and_texts_are_cut_and_the_page_says_so() -> None:
    trace = measured(60, 5, tuple(f"task {index}" for index in range(20)))
    text = render_routing(trace)
    words = Page(text).words
    assert len(text) < 700_000
    assert "The 12 experts with the smallest load are left out." in words
    assert "4 more tasks stand in trace.json." in words
    assert "12 more texts stand in trace.json." in words
    assert "others" in words


def test_the_most_used_experts_have_their_own_colour() -> None:
    trace = measured(20)
    marks = colours(trace)
    load = trace.overall().load
    assert marks.count("ex") == 8
    assert min(load[index] for index in range(20) if marks[index] != "ex") >= max(
        load[index] for index in range(20) if marks[index] == "ex"
    )
    assert colours(measured(4)) == ["e0", "e1", "e2", "e3"]
