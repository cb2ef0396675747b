"""Model cards: front matter, title and summary of a README.md, and the scores beside it; every field may be absent.

A card is prose from a stranger. What cannot be read is a note and never an error: the adapter itself may be sound.
Sources: the front matter of the Hugging Face Hub (``ModelCardData`` of huggingface_hub 2.4), its legacy
``model-index``, and ``.eval_results/*.yaml``, which replaced it.
"""

from __future__ import annotations

import datetime
import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from compose.errors import AdapterFormatError, ComposeError
from compose.hub_index.records import MAX_LINE, ScoreRecord, is_text
from compose.text.yaml_file import parse_yaml

MAX_CARD_BYTES = 2**20
MAX_FRONT_BYTES = 2**17
MAX_SUMMARY = 2000
MAX_SCORES = 1000
MAX_EVAL_FILES = 100
_FRONT = re.compile(r"\ufeff?---[ \t]*\r?\n(.*?\n)?---[ \t]*(\r?\n|$)", re.DOTALL)
_LINK = re.compile(r"!?\[([^\[\]]*)\]\([^()]*\)")  # linear: a bracket or parenthesis inside ends the attempt
_SETTING = re.compile(r"[-*] (?:\*\*)?([A-Za-z][A-Za-z0-9 _-]{0,60}?)(?:\*\*)?: ?(?:\*\*)?(.{1,200})$")
_BOILERPLATE = (
    "model card for model id",
    "[more information needed]",
    "this model was trained from scratch",
    "this modelcard aims to be a base template",
)


@dataclass(frozen=True, kw_only=True)
class Card:
    """What a card says, in the words of `AdapterRecord`.

    Attributes:
        title: First heading of level 1 that is not the template's.
        summary: First paragraph of prose after it, at most `MAX_SUMMARY` characters.
        base_models: As listed.
        base_relation: ``"adapter"``, ``"merge"`` ..., ``""`` when it does not say.
        license: Identifier, or the name of another licence.
        language: Codes.
        tags: With the library and the pipeline's name.
        datasets: Trained on.
        scores: Of ``model-index``, the card's own claim.
        hyper: Settings of the training listed in the text.
        train_seed: From the same list.
        notes: What could not be read.
    """

    title: str = ""
    summary: str = ""
    base_models: tuple[str, ...] = ()
    base_relation: str = ""
    license: str = ""
    language: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    datasets: tuple[str, ...] = ()
    scores: tuple[ScoreRecord, ...] = ()
    hyper: Mapping[str, Any] = field(default_factory=dict)
    train_seed: int | None = None
    notes: tuple[str, ...] = ()


def parse_card(data: bytes | str, where: object) -> Card:
    """Return what a README.md says.

    Args:
        data: Its bytes or text, at most `MAX_CARD_BYTES`; of a longer file nothing is taken.
        where: What the bytes are, for the notes.
    """
    if len(data) > MAX_CARD_BYTES:
        note = f"{where}: {len(data)} bytes, more than the limit of {MAX_CARD_BYTES}; the card is not read"
        return Card(notes=(note,))
    text = data if isinstance(data, str) else data.decode("utf-8", errors="replace")
    front = _FRONT.match(text)
    fields, notes = _front_matter(front[1] or "" if front else "", where)
    body = text[front.end() :] if front else text
    title, summary = _prose(body)
    hyper = _settings(body)
    scores, score_notes = _model_index(fields.get("model-index"), where)
    library, pipeline = (_line(fields.get(key)) for key in ("library_name", "pipeline_tag"))
    licence = _line(fields.get("license"))
    if licence in ("", "other"):
        licence = _line(fields.get("license_name")) or licence
    return Card(
        title=title,
        summary=summary,
        base_models=_lines(fields.get("base_model")),
        base_relation=_line(fields.get("base_model_relation")),
        license=licence,
        language=_lines(fields.get("language")),
        tags=tuple(dict.fromkeys((*_lines(fields.get("tags")), *filter(None, (library, pipeline))))),
        datasets=_lines(fields.get("datasets")),
        scores=scores,
        hyper=hyper,
        train_seed=_seed(hyper),
        notes=(*notes, *score_notes),
    )


def parse_eval_results(data: bytes, where: object) -> tuple[list[ScoreRecord], list[str]]:
    """Return the scores of one ``.eval_results/*.yaml``, and what could not be read.

    An entry has ``dataset`` (``id``, ``task_id``) and ``value``, and may have ``date``, ``source`` and ``notes``. Its
    metric is the benchmark's own and has no name in the file; it is recorded as ``"value"``.
    """
    try:
        entries = parse_yaml(data, f"{where}: not read")
    except ComposeError as error:
        return [], [str(error)]
    if not isinstance(entries, list):
        return [], [f"{where}: not read: a list of results is expected, got {type(entries).__name__}"]
    scores, notes = [], []
    for number, entry in enumerate(entries[:MAX_SCORES], start=1):
        dataset = entry.get("dataset") if isinstance(entry, dict) else None
        source = entry.get("source") if isinstance(entry, dict) else None
        names = [_line(dataset.get(key)) for key in ("id", "task_id")] if isinstance(dataset, dict) else []
        value = _number(entry.get("value")) if names else None
        if value is None or not all(names):
            notes.append(f"{where}: entry {number} has no dataset id, task_id and numeric value; it is left out")
            continue
        harness = _line(source.get("name") or source.get("url")) if isinstance(source, dict) else ""
        scores.append(
            ScoreRecord(
                task="/".join(names) if names[1] != "default" else names[0],
                metric="value",
                value=value,
                harness=harness or "eval-results",
                at=_line(entry.get("date")),
            )
        )
    return scores, notes


def unique_scores(scores: Iterable[ScoreRecord], where: object) -> tuple[tuple[ScoreRecord, ...], tuple[str, ...]]:
    """Return the first score of every key of `ScoreRecord`, and a note for every other value of the same key."""
    kept: dict[tuple[Any, ...], ScoreRecord] = {}
    notes = []
    for score in scores:
        key = (score.task, score.split, score.metric, score.harness, score.harness_version, score.seed)
        if key not in kept:
            kept[key] = score
        elif kept[key].value != score.value:
            notes.append(
                f"{where}: {score.task} {score.metric} is given as {kept[key].value:g} and {score.value:g}; "
                "the first is kept"
            )
    return tuple(kept.values()), tuple(notes)


def with_scores(card: Card, scores: Iterable[ScoreRecord], notes: Iterable[str], where: object) -> Card:
    """Return the card with the scores of ``.eval_results`` before its own."""
    kept, more = unique_scores([*scores, *card.scores], where)
    return replace(card, scores=kept[:MAX_SCORES], notes=(*card.notes, *notes, *more))


def read_card(folder: Path, read: Any) -> Card:
    """Return what ``README.md`` and ``.eval_results/*.yaml`` of a folder say; an empty card where there is neither.

    Args:
        folder: The adapter's folder.
        read: Path -> bytes; it refuses what may not be read (links out of the folder, pipes) with an
            AdapterFormatError, which becomes a note.
    """
    path = folder / "README.md"
    card = Card()
    if path.exists() or path.is_symlink():
        try:
            card = parse_card(read(path), path)
        except AdapterFormatError as error:
            card = Card(notes=(str(error),))
    results = folder / ".eval_results"
    if not results.is_dir():
        return card
    scores: list[ScoreRecord] = []
    notes: list[str] = []
    for one in sorted(results.glob("*.yaml"))[:MAX_EVAL_FILES]:
        try:
            found, remarks = parse_eval_results(read(one), one)
        except AdapterFormatError as error:
            found, remarks = [], [str(error)]
        scores += found
        notes += remarks
    return with_scores(card, scores, notes, results)


def _front_matter(text: str, where: object) -> tuple[Mapping[str, Any], tuple[str, ...]]:
    data = text.encode()
    if len(data) > MAX_FRONT_BYTES:
        return {}, (f"{where}: front matter of {len(data)} bytes, more than {MAX_FRONT_BYTES}; it is not read",)
    try:
        found = parse_yaml(data, f"{where}: front matter not read")
    except ComposeError as error:
        return {}, (str(error),)
    if found is None:
        return {}, ()
    if not isinstance(found, dict):
        return {}, (f"{where}: front matter not read: keys and values are expected, got {type(found).__name__}",)
    return found, ()


def _line(value: Any) -> str:
    """Return a scalar as one line of text; ``""`` for everything else. YAML reads the language ``no`` as false."""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float | datetime.date):
        value = value.isoformat() if isinstance(value, datetime.date) else str(value)
    if not isinstance(value, str):
        return ""
    text = " ".join(value.split())[:MAX_LINE]
    return text if is_text(text, MAX_LINE) else text.encode("utf-8", errors="replace").decode()


def _lines(value: Any) -> tuple[str, ...]:
    listed = value if isinstance(value, list) else [value]
    return tuple(dict.fromkeys(text for text in map(_line, listed[:MAX_SCORES]) if text))


def _number(value: Any) -> float | None:
    """Return a finite number, also one written as text (``"0.71"``); None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        number = float(value)
    except OverflowError:
        return None
    return number if math.isfinite(number) and abs(number) < 1e300 else None


def _model_index(entries: Any, where: object) -> tuple[tuple[ScoreRecord, ...], tuple[str, ...]]:
    """Return the scores of the legacy ``model-index``: models, their results, their metrics."""
    if entries is None:
        return (), ()
    found: list[ScoreRecord] = []
    dropped = 0
    for result in _dicts(_dicts_in(entries, "results")):
        task, dataset = _part(result, "task"), _part(result, "dataset")
        name = _line(dataset.get("type")) or _line(dataset.get("name")) or _line(task.get("type"))
        config = _line(dataset.get("config"))
        for metric in _dicts(result.get("metrics")):
            value = _number(metric.get("value"))
            kind = _line(metric.get("type")) or _line(metric.get("name"))
            if value is None or not name or not kind or len(found) == MAX_SCORES:
                dropped += 1
                continue
            found.append(
                ScoreRecord(
                    task=f"{name}/{config}" if config and config != "default" else name,
                    split=_line(dataset.get("split")),
                    metric=kind,
                    value=value,
                    harness="model-index",
                )
            )
    notes = (f"{where}: model-index: {dropped} results without data set, metric and numeric value left out",)
    scores, more = unique_scores(found, where)
    return scores, (*(notes if dropped else ()), *more)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _dicts_in(entries: Any, key: str) -> list[Any]:
    return [item for entry in _dicts(entries) for item in _dicts(entry.get(key))]


def _part(entry: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = entry.get(key)
    return value if isinstance(value, dict) else {}


def _prose(body: str) -> tuple[str, str]:
    """Return the first heading of level 1 and the first paragraph of prose that are not the template's."""
    title = ""
    paragraph: list[str] = []
    for line in _visible(body):
        heading = _heading(line)
        if heading or not line:
            if paragraph:
                break
            if not line.startswith("##"):
                title = title or _plain(heading)
        elif (text := _plain(line)) and not line.startswith(("|", "- ", "* ", "+ ", "<", "1. ", "---", "===")):
            paragraph.append(text)
            if sum(map(len, paragraph)) > MAX_SUMMARY:
                break
    return title[:300], " ".join(paragraph)[:MAX_SUMMARY]


def _heading(line: str) -> str:
    """Return the text of a Markdown heading, ``""`` for any other line."""
    bare = line.lstrip("#")
    return bare.rstrip("#").strip() if 0 < len(line) - len(bare) <= 6 and bare[:1].isspace() else ""


def _visible(body: str) -> list[str]:
    """Return the lines outside comments and fenced code, stripped."""
    lines, fenced = [], False
    for line in _without_comments(body).splitlines():
        text = line.strip()
        if text.startswith(("```", "~~~")):
            fenced = not fenced
            text = ""
        lines.append("" if fenced else text)
    return lines


def _without_comments(text: str) -> str:
    """Remove ``<!-- ... -->`` in linear time; an unclosed one hides the rest."""
    kept, at = [], 0
    while (start := text.find("<!--", at)) >= 0:
        kept.append(text[at:start])
        end = text.find("-->", start + 4)
        if end < 0:
            return "".join(kept)
        at = end + 3
    return "".join([*kept, text[at:]])


def _plain(text: str) -> str:
    """Return a line without links, images and emphasis; ``""`` for the template's own words."""
    bare = text[:MAX_LINE]
    for _ in range(2):  # an image inside a link
        bare = _LINK.sub(lambda found: "" if found[0].startswith("!") else found[1], bare)
    bare = _line(bare.replace("**", "").replace("__", "").replace("`", "").lstrip("> "))
    return "" if bare.lower().startswith(_BOILERPLATE) else bare


def _settings(body: str) -> dict[str, Any]:
    """Return the list under a heading that speaks of hyperparameters, as transformers' Trainer writes it."""
    found: dict[str, Any] = {}
    inside = False
    for line in _visible(body):
        if heading := _heading(line):
            inside = "hyperparameter" in heading.lower()
        elif inside and (setting := _SETTING.match(line)) and len(found) < 100:
            value = _line(setting[2])
            number = _number(value)
            whole = number is not None and number.is_integer() and value.lstrip("-").isdecimal()
            found[_line(setting[1])] = int(value) if whole else value if number is None else number
    return found


def _seed(hyper: Mapping[str, Any]) -> int | None:
    seed = hyper.get("seed")
    return seed if type(seed) is int and abs(seed) < 2**63 else None
