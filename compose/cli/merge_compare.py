"""``compose merge --compare``: every method on a person's own bank and items, as a table and files."""

from __future__ import annotations

import hashlib
import json as json_text
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.cli.console import note, print_json, print_table, say
from compose.errors import ComposeError

if TYPE_CHECKING:
    from compose.bank import Bank
    from compose.cli.merge_recipe import MergeRequest
    from compose.fewshot.compare import ComparedRow, TaskItems
    from compose.fewshot.run_folder import RunFolder

NONE = "-"


def compare_methods(
    request: MergeRequest,
    eval_file: Path | None,
    methods: str | None,
    *,
    resume: bool,
    force: bool,
    dry_run: bool,
    json: bool,
) -> None:
    """Score references and methods, print the table and write ``compare.json`` and ``compare.jsonl``.

    Raises:
        ComposeError: Inputs are missing or do not fit, an option has no meaning here, or ``--out`` is there already.
    """
    if eval_file is None or request.base is None:
        raise ComposeError("--compare needs --base MODEL and --eval FILE (lines with input, output and task)")
    refused = {
        "--method (give --methods)": request.method != "sum",
        "weights (every adapter has 1; give the adapters as --bank)": request.weights is not None,
        "--space": request.space != "full",
        "--energy": request.energy is not None,
        "options (densities are tried)": bool(request.options),
        "--into-base": request.into_base is not None,
        "--data (methods with data get the items that choose)": request.data is not None,
    }
    if said := [name for name, given in refused.items() if given]:
        raise ComposeError(f"--compare takes no {', no '.join(said)}")
    from compose.cli.merge import open_bank
    from compose.fewshot.compare import REFERENCES, split_items
    from compose.fewshot.run_folder import RunFolder
    from compose.text.examples import read_labelled_examples

    names = [*REFERENCES, *chosen_methods(methods)]
    tasks = split_items(read_labelled_examples(eval_file, ("task",)))
    bank = open_bank(request)
    own = [task for task in tasks if task in bank]
    if dry_run:
        _show_plan(bank, names, tasks, own, json)
        return
    folder = RunFolder(request.out, resume=resume, force=force)  # type: ignore[arg-type]  # merge checked --out
    if not own:
        note("no task has the name of an adapter, so nothing is normalised; name tasks after adapters where you can")
    rows = _rows(request, bank, names, tasks, folder)
    report = _report(request, eval_file, bank, tasks, rows)
    text = json_text.dumps(report, indent=2).encode()
    lines = "".join(json_text.dumps(row) + "\n" for row in report["rows"]).encode()
    folder.publish({"compare.json": text, "compare.jsonl": lines})
    print_json(report) if json else show_comparison(report)


def chosen_methods(text: str | None) -> list[str]:
    """Return the methods of ``--methods``: names with commas, or all that need no data.

    Raises:
        UnknownNameError: There is no such method.
        ComposeError: None is named.
    """
    from compose.engine.data_merge import DATA_METHODS
    from compose.fewshot.compare import data_free_methods
    from compose.merging.method import METHODS

    if text is None:
        return data_free_methods()
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not names:
        raise ComposeError("--methods names none; give names with commas (compose merge --list)")
    for name in names:
        if name not in DATA_METHODS:
            METHODS[name]
    return names


def show_comparison(report: Mapping[str, Any]) -> None:
    """Print the table, methods by their score, and what could not merge this bank."""
    has_own = any(row["normalised"] is not None for row in report["rows"])
    shown = [row for row in report["rows"] if not row["skipped"]]
    order = sorted(shown, key=lambda row: (row["kind"] != "reference", -_score(row), row["name"]))
    columns = ["method", ">exact match", *([">of own"] if has_own else []), ">loss", ">factor", "options", ">lost"]
    cells = [_cells(row, has_own) for row in order]
    best = max(range(len(order)), key=lambda place: (order[place]["kind"] != "reference", _score(order[place])))
    print_table(columns, cells, title=f"{len(report['tasks'])} tasks, rank {report['rank']}", strong=best)
    say(
        f"exact match and loss: means over tasks on {report['test_items']} items; factor and density chosen on "
        f"{report['selection_items']} others. Every result has at most rank {report['rank']}; lost: what that took "
        "from it (share of the norm), dense results included."
    )
    for row in report["rows"]:
        if row["skipped"] and row["kind"] != "reference":
            note(f"{row['name']}: {row['skipped']}")


def _score(row: Mapping[str, Any]) -> float:
    return float(row["exact"] if row["normalised"] is None else row["normalised"])


def _cells(row: Mapping[str, Any], has_own: bool) -> list[str]:
    reference = row["kind"] == "reference"
    options = ", ".join(f"{key}={value}" for key, value in row["options"].items())
    of_own = [NONE if row["normalised"] is None else f"{row['normalised']:.3f}"] if has_own else []
    ends = [NONE, options, NONE] if reference else [f"{row['scale']:.2g}", options, f"{row['lost']:.2f}"]
    return [row["name"], f"{row['exact']:.3f}", *of_own, f"{row['loss']:.3f}", *ends]


def _rows(
    request: MergeRequest, bank: Bank, names: Sequence[str], tasks: Mapping[str, TaskItems], folder: RunFolder
) -> list[ComparedRow]:
    """Every row, those of an interrupted run read and not measured again; each is kept as soon as it is there."""
    from compose.cli.loading import load_base
    from compose.fewshot.compare import Comparison, record_of

    head = {"comparison": _fingerprint(request, bank, tasks)}
    loaded = load_base(str(request.base), device=request.device)
    comparison = Comparison(loaded, bank, tasks, rank=request.rank, seed=request.seed)
    folder.begin()
    rows = {row.name: row for row in _kept(folder.events, head)}
    with folder.events.open("a", encoding="utf-8") as stream:
        for number, name in enumerate(names, start=1):
            if name not in rows:
                rows[name] = comparison.row(name)
                stream.write(json_text.dumps(record_of(rows[name])) + "\n")
                stream.flush()
                said = (rows[name].skipped and "does not apply") or f"exact match {rows[name].macro('exact'):.3f}"
                note(f"{number}/{len(names)} {name}: {said}, {rows[name].seconds:.1f} s")
    return [rows[name] for name in names]


def _kept(events: Path, head: Mapping[str, Any]) -> list[ComparedRow]:
    """The rows of an interrupted run, whose journal starts with ``head``; a line that was cut short is taken away."""
    from compose.fewshot.compare import row_of

    whole, _, _ = events.read_text(encoding="utf-8").rpartition("\n") if events.is_file() else ("", "", "")
    lines = whole.splitlines() or [json_text.dumps(head)]
    if json_text.loads(lines[0]) != head:
        raise ComposeError(
            f"{events.parent} holds a comparison of another bank, model, rank or other items; give another --out, "
            "or --force to start again"
        )
    events.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return [row_of(json_text.loads(line)) for line in lines[1:]]


def _fingerprint(request: MergeRequest, bank: Bank, tasks: Mapping[str, TaskItems]) -> str:
    from compose.text.examples import examples_hash

    items = {task: [examples_hash(one.selection), examples_hash(one.test)] for task, one in tasks.items()}
    about = [dict(bank.hashes), str(request.base), request.rank, request.seed, items]
    return hashlib.sha256(json_text.dumps(about).encode()).hexdigest()


def _report(
    request: MergeRequest,
    eval_file: Path,
    bank: Bank,
    tasks: Mapping[str, TaskItems],
    rows: Sequence[ComparedRow],
) -> dict[str, Any]:
    from compose.fewshot.compare import record_of

    own = next((row for row in rows if row.name == "own adapter" and not row.skipped), None)
    largest = max(max(bank[name].ranks.values()) for name in bank.names)
    return {
        "base": request.base,
        "eval": str(eval_file),
        "adapters": dict(bank.hashes),
        "rank": largest if request.rank is None else request.rank,
        "seed": request.seed,
        "tasks": list(tasks),
        "selection_items": sum(len(one.selection) for one in tasks.values()),
        "test_items": sum(len(one.test) for one in tasks.values()),
        "rows": [
            {
                **record_of(row),
                "exact": None if row.skipped else row.macro("exact"),
                "loss": None if row.skipped else row.macro("loss"),
                "normalised": None if row.skipped else row.normalised(own),
            }
            for row in rows
        ],
    }


def _show_plan(
    bank: Bank, names: Sequence[str], tasks: Mapping[str, TaskItems], own: Sequence[str], json: bool
) -> None:
    facts = {
        "adapters": ", ".join(bank.names),
        "rows": ", ".join(names),
        "tasks": ", ".join(tasks),
        "normalised": ", ".join(own) or "none (no task has the name of an adapter)",
        "items that choose": sum(len(one.selection) for one in tasks.values()),
        "items that are scored": sum(len(one.test) for one in tasks.values()),
    }
    if json:
        print_json(facts)
        return
    from compose.cli.console import print_facts

    print_facts(facts)
