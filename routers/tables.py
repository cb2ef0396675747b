"""The tables of routers/README.md, made from the registries: presets, departures, components, files.

``python -m compose.routers.tables`` prints them; with ``--write routers/README.md`` they are put into the document.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import MISSING, Field, fields
from pathlib import Path
from typing import Any

from compose.errors import ComposeError
from compose.registry import Registry
from compose.routers.losses.registry import LOSSES, AbstractLoss
from compose.routers.presets.registry import PRESETS, Preset
from compose.routers.steps import GATES, NORMALISATIONS, SELECTORS

_OF_ALL_LOSSES = {each.name for each in fields(AbstractLoss)}


def preset_table() -> list[str]:
    """Every preset with its paper, what it is, where and how often its gates decide, on what, and what trains."""
    head = ["preset", "paper", "what", "gates", "read", "trains", "experts", "needs"]
    return _table(head, [_preset_row(name, PRESETS[name]) for name in PRESETS])


def departure_list() -> list[str]:
    """Every preset that differs from its paper or has limits, with all that its specification says of it."""
    lines = []
    for name in PRESETS:
        entry = PRESETS[name]
        said = [*entry.spec.departures, *([f"limits: {entry.limits}"] if entry.limits else [])]
        if said:
            lines.append(f"- `{name}`: {'; '.join(said)}.")
    return lines


def component_table(registry: Registry[Any]) -> list[str]:
    """Every entry of a registry of components: name, first line of its docstring, options with their defaults."""
    rows = [[f"`{name}`", _plain(_summary(registry[name])), ", ".join(_options(registry[name]))] for name in registry]
    return _table([registry.kind, "computes", "options"], rows)


def file_table() -> list[str]:
    """Every module of this folder with the first line of its docstring."""
    rows = []
    for path in sorted(Path(__file__).parent.glob("*.py")):
        doc = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        rows.append([f"`{path.name}`", _plain(doc.splitlines()[0])])
    return _table(["file", "what"], rows)


SECTIONS: dict[str, Callable[[], list[str]]] = {
    "presets": preset_table,
    "gates": lambda: component_table(GATES),
    "normalisations": lambda: component_table(NORMALISATIONS),
    "selectors": lambda: component_table(SELECTORS),
    "losses": lambda: component_table(LOSSES),
    "departures": departure_list,
    "files": file_table,
}


def filled(text: str) -> str:
    """Return a document with the lines between ``<!-- begin: NAME -->`` and ``<!-- end: NAME -->`` made anew.

    Raises:
        ComposeError: A section has no such place, or a place no section.
    """
    named = re.findall(r"<!-- begin: ([\w-]+) -->\n", text)
    if sorted(named) != sorted(SECTIONS):
        raise ComposeError(f"the document has places for {sorted(named)}, needed are {sorted(SECTIONS)}")
    for name, make in SECTIONS.items():
        begin, end = f"<!-- begin: {name} -->\n", f"<!-- end: {name} -->\n"
        before, _, rest = text.partition(begin)
        _, found, after = rest.partition(end)
        if not found:
            raise ComposeError(f"the document has no line {end.strip()!r}")
        text = before + begin + "".join(line + "\n" for line in make()) + end + after
    return text


def main(arguments: list[str]) -> None:
    """Print the tables, or write them into a document."""
    if len(arguments) == 2 and arguments[0] == "--write":
        path = Path(arguments[1])
        path.write_text(filled(path.read_text(encoding="utf-8")), encoding="utf-8")
        return
    if arguments:
        raise ComposeError(f"usage: python -m compose.routers.tables [--write FILE]; got {arguments}")
    for name, make in SECTIONS.items():
        sys.stdout.write("\n".join([f"## {name}", "", *make(), "", ""]))


def _preset_row(name: str, entry: Preset) -> list[str]:
    spec = entry.spec
    where = "constant" if spec.scope == "static" else f"{spec.scope} @ {spec.site}"
    made = "bank" if entry.experts is None else _made(entry)
    reads = "" if spec.gate_input == "none" else spec.gate_input
    return [f"`{name}`", _paper(entry.paper), _plain(entry.summary), where, reads, spec.train, made, _needs(entry)]


def _needs(entry: Preset) -> str:
    return ", ".join(need.replace("_", " ") for need in entry.needs)


def _made(entry: Preset) -> str:
    fresh = entry.experts
    assert fresh is not None  # noqa: S101 - the caller looked
    count = fresh.num_experts if isinstance(fresh.num_experts, int) else "/".join(map(str, fresh.num_experts))
    kind = {"ia3": "vectors", "shared_a": f"rank {fresh.rank}, one A"}.get(entry.spec.structure, f"rank {fresh.rank}")
    return f"{count} x {kind}" + "".join(f" + {name}" for name in fresh.always_on)


def _paper(paper: str) -> str:
    return f"[{paper}](https://arxiv.org/abs/{paper})" if re.fullmatch(r"\d{4}\.\d{5}", paper) else paper


def _summary(component: type) -> str:
    return (component.__doc__ or "").splitlines()[0]


def _options(component: type) -> Iterator[str]:
    own = fields(component)
    if issubclass(component, AbstractLoss):
        own = tuple(each for each in own if each.name not in _OF_ALL_LOSSES)
    for each in own:
        yield f"`{each.name}={_default(each)}`"


def _default(option: Field[Any]) -> str:
    if option.default is not MISSING:
        return repr(option.default)
    return "..." if option.default_factory is MISSING else repr(option.default_factory())


def _plain(text: str) -> str:
    """Docstring markup as Markdown inside a table."""
    return text.replace("``", "`").replace("|", "\\|")


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)]


if __name__ == "__main__":
    main(sys.argv[1:])
