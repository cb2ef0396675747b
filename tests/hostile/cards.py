"""Mutated model cards, files of results and descriptions: what a stranger says about an adapter, in text."""

from __future__ import annotations

import json
import random
from pathlib import Path

from compose.errors import ComposeError
from compose.hub_index.cards import MAX_CARD_BYTES, read_card
from compose.hub_index.descriptions import add_descriptions
from compose.hub_index.ingest import Options
from compose.hub_index.records import AdapterRecord
from compose.hub_index.search import Filters
from compose.hub_index.sources import reader
from compose.hub_index.store import Index
from tests.hostile.figures import Figures

CARD = """---
base_model: org/base
base_model_relation: adapter
license: other
license_name: mine
language: [en, de]
tags: [lora, "news"]
datasets:
  - org/news
library_name: peft
model-index:
- name: x
  results:
  - task: {type: text-generation}
    dataset: {name: News, type: org/news, split: test}
    metrics:
    - {type: rouge, value: 0.5, name: Rouge}
---

# News in brief

Summarises [news](https://example.org) in **one** sentence.

- learning_rate: 1e-4
- seed: 7
"""
RESULTS = """- dataset: {id: org/news, task_id: default}
  value: 0.5
  date: "2026-01-01"
  source: {name: harness, url: https://example.org}
"""
LINES = (
    {"name": "a", "title": "A", "summary": "s", "base": "org/base", "tags": ["x"], "examples": ["i", {"input": "i"}]},
    {"name": "b", "license": "mit", "scores": [{"task": "t", "metric": "m", "value": 0.5}], "hyper": {"lr": 1e-3}},
)
_PIECES = (
    b"---\n", b"\n", b": ", b"- ", b"[", b"]", b"{", b"}", b'"', b"'", b"|", b"&a ", b"*a", b"!!bool ", b"<<: ", b"? ",
    b"!!python/name:os.system ", b"\xff", b"\x00", b"\xed\xa0\x80", b"\\ud800", b"\x1b[31m", b"1e999", b".nan", b"=",
    b"9" * 400, b"2001-99-99", b"../../etc/passwd", b"[](", b"`" * 50, b"#" * 80, b"a" * 3000, b"\xe2\x80\xae",
)  # fmt: skip


def run(volume: int, seed: int, folder: Path) -> Figures:
    """Read ``volume`` mutated texts of three kinds in turn; cards say what is wrong in notes, and refuse nothing."""
    figures = Figures("S3 cards")
    (folder / ".eval_results").mkdir()
    read = reader(folder, MAX_CARD_BYTES)
    with figures.whole(), Index.open(folder / "hub.db", create=True) as index:
        for number in range(volume):
            draw = random.Random(f"{seed}/{number}")
            if number % 3 == 2:
                text = "\n".join(json.dumps(line) for line in LINES).encode()
                (folder / "lines.jsonl").write_bytes(_mutated(text, draw))
                figures.case(f"descriptions {seed}/{number}", lambda: _describe(index, folder / "lines.jsonl"))
                continue
            (folder / "README.md").write_bytes(_mutated(CARD.encode(), draw) if number % 3 == 0 else CARD.encode())
            results = _mutated(RESULTS.encode(), draw) if number % 3 == 1 else RESULTS.encode()
            (folder / ".eval_results" / "x.yaml").write_bytes(results)
            figures.case(f"card {seed}/{number}", lambda: _card(folder, read))
    return figures


def _card(folder: Path, read: object) -> None:
    """Read a card, and make the record that its fields go into."""
    card = read_card(folder, read)  # type: ignore[arg-type]
    AdapterRecord(
        name="x",
        source="description",
        title=card.title,
        summary=card.summary,
        base_id=card.base_models[0] if card.base_models else "",
        license=card.license,
        language=card.language,
        tags=card.tags,
        datasets=card.datasets,
        scores=card.scores,
        hyper=card.hyper,
        train_seed=card.train_seed,
    )


def _describe(index: Index, path: Path) -> None:
    """Take in descriptions: all of them, or none."""
    before = {one.name for one in index.ls(Filters(status="any"))}
    try:
        outcomes = add_descriptions(index, path, Options())
    except ComposeError:
        assert {one.name for one in index.ls(Filters(status="any"))} == before
        raise
    known = {one.name for one in index.ls(Filters(status="any"))}
    assert {one.name for one in outcomes} <= known
    index.query("news")


def _mutated(text: bytes, draw: random.Random) -> bytes:
    changed = bytearray(text)
    for _ in range(draw.randint(1, 4)):
        at = draw.randrange(len(changed))
        if draw.random() < 0.4:
            changed[at] = changed[at] ^ 1 << draw.randrange(8)
        else:
            changed[at : at + draw.choice((0, 0, 1, 5, 40))] = draw.choice(_PIECES) * draw.choice((1, 1, 1, 2, 30))
    return bytes(changed)


def slow_cards() -> dict[str, bytes]:
    """Return cards of the largest size that read slowly where a parser looks back."""
    most = MAX_CARD_BYTES - 10
    return {
        "brackets": b"[" * most,
        "half links": b"[a](" * (most // 4),
        "links in links": b"[![" * (most // 3),
        "front matter without an end": b"---\n" + b"a: 1\n" * (most // 5),
        "many ends": b"---\n" * (most // 4),
        "settings": b"- a: " * (most // 5),
        "spaces": b"# " + b" " * most,
        "settings of spaces": b"- " + b"a " * (most // 2),
        "backticks": b"`" * most,
        "quotes": b"> " * (most // 2),
        "tags": b"<a " * (most // 3),
    }
