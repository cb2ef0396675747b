"""What ``compose eval`` prints: a plan, or the table, the tasks and the verdicts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compose.cli.console import note, print_facts, print_table, say

NONE = "-"
MOST_COLUMNS = 8
"""Contenders in the table of tasks; ``result.json`` has all."""


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print what would be compared."""
    records, one = plan["records"], plan["one_lora"]
    stages = [] if one is None else [_stage(stage) for stage in one["stages"]]
    print_facts(
        {
            "routers": ", ".join(f"{router['name']} (seed {router['seed']})" for router in plan["routers"]),
            "adapters": f"{len(plan['adapters'])}: {', '.join(plan['adapters'])}" if plan["adapters"] else None,
            "tasks": ", ".join(plan["tasks"]),
            "records": f"{records['scored']:,} scored, {records['choosing']:,} that choose, {records['training']:,} "
            "that one LoRA is trained on",
            "merges": f"{', '.join(plan['merges'])}, each with {len(plan['scales'])} factors"
            if plan["merges"]
            else None,
            "one LoRA": f"{'; '.join(stages)}, seeds {', '.join(map(str, one['seeds']))}" if one else None,
            "ablations": "yes" if plan["ablations"] else "no",
        },
        title="plan",
    )
    _notes(plan)


def show_result(result: Mapping[str, Any]) -> None:
    """Print contenders, tasks, what is missing, and the verdicts."""
    contenders = result["contenders"]
    scored = f"{result['records']['scored']:,} records of {len(result['tasks'])} tasks"
    rows = [_cells(contender) for contender in contenders]
    columns = ["contender", ">exact match", ">of oracle", ">loss", ">trained", ">seeds", "chosen"]
    strong = next((place for place, one in enumerate(contenders) if one["kind"] == "router"), -1)
    print_table(columns, rows, title=scored, strong=strong)
    shown = [one for one in contenders if one["kind"] != "ablation"]
    if len(result["tasks"]) > 1:
        _show_tasks(result["tasks"], shown[:MOST_COLUMNS])
    say("exact match and loss: means over tasks, and over seeds; ±: standard deviation over seeds.", "dim")
    _notes(result)
    for name, why in result["skipped"].items():
        note(f"{name}: {why}")
    for verdict in result["verdicts"]:
        say(f"! {verdict}", "yellow")
    if not result["verdicts"]:
        say("every router beats what it was compared with and is not told the task", "green")


def _cells(contender: Mapping[str, Any]) -> list[str]:
    spread = f" ± {contender['spread']:.3f}" if contender["seeds"] > 1 else ""
    ratio = NONE if contender["ratio"] is None else f"{contender['ratio']:.0%}"
    trained = f"{contender['trained']:,}" if contender["trained"] else NONE
    seeds = str(contender["seeds"]) if contender["kind"] != "reference" else NONE
    exact, loss = f"{contender['exact']:.3f}{spread}", f"{contender['loss']:.3f}"
    return [contender["name"], exact, ratio, loss, trained, seeds, contender["about"]]


def _show_tasks(tasks: Sequence[str], contenders: Sequence[Mapping[str, Any]]) -> None:
    """Exact match, a line per task."""
    columns = ["task", *(f">{one['name']}" for one in contenders)]
    found = [
        [task, *(f"{one['tasks'][task]['exact']:.2f}" if task in one["tasks"] else NONE for one in contenders)]
        for task in tasks
    ]
    print_table(columns, found, title="exact match by task")


def _stage(stage: Mapping[str, Any]) -> str:
    length = f"{stage['steps']} steps" if stage["steps"] is not None else f"{stage['epochs']:g} epochs"
    return f"{stage['name']}: {length} at {stage['learning_rate']:g} ({stage['schedule']})"


def _notes(plan: Mapping[str, Any]) -> None:
    for words in plan["missing"]:
        note(words)
    for words in plan["warnings"]:
        note(f"warning: {words}", "yellow")
