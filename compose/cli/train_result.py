"""What ``compose train`` prints: a plan, the runs that are done, the presets there are."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from compose.cli.console import note, print_facts, print_table, say


def show_plan(plan: Mapping[str, Any]) -> None:
    """Print what a run would do."""
    parameters = plan["trained_parameters"]
    print_facts(
        {
            "preset": plan["preset"],
            "gates": f"per {plan['scope']}, at {plan['sites']} sites ({plan['site']}), {plan['targets']} targets",
            "experts": f"{len(plan['experts'])}: {_some(plan['experts'])}",
            "trained": f"{parameters['router']:,} parameters of the router, {parameters['experts']:,} of the experts "
            f"(base: {plan['base_parameters']:,})",
            "records": f"{plan['records']:,} of {len(plan['tasks'])} tasks, longest {plan['longest_tokens']} tokens, "
            f"{plan['predicted_tokens']:,} predicted",
            "cut": f"{plan['truncated_records']:,} prompts" if plan["truncated_records"] else None,
            "steps": f"{plan['steps']:,}, about {plan['seconds_per_step']:.3g} s each",
            "minutes": f"about {plan['minutes']:.2f} for each of {len(plan['seeds'])} runs",
        },
        title="plan",
    )
    rows = [
        [
            stage["name"],
            stage["trains"],
            f"{stage['steps']:,}",
            f"{stage['batch_size']}/{stage['accumulation']}",
            f"{stage['learning_rate']:g}",
            stage["schedule"],
        ]
        for stage in plan["stages"]
    ]
    print_table(["stage", "trains", ">steps", ">batch/parts", ">rate", "schedule"], rows)
    drawn: dict[str, int] = {}
    for stage in plan["stages"]:
        for task, count in stage["tasks"].items():
            drawn[task] = drawn.get(task, 0) + count
    print_table(["task", ">records drawn"], [[task, f"{count:,}"] for task, count in drawn.items()])
    for words in plan["departures"]:
        note(f"departs from its paper: {words}")


def show_runs(runs: Sequence[Mapping[str, Any]]) -> None:
    """Print where every run ended."""
    for run in runs:
        first, last, parameters = run["first"], run["last"], run["trained_parameters"]
        load = last["load"]
        print_facts(
            {
                "steps": f"{run['steps']:,}, {run['records']:,} records of {len(run['tasks'])} tasks",
                "trained": f"{parameters['router']:,} of the router, {parameters['experts']:,} of the experts",
                "loss": f"{first['loss']:.4f} -> {last['loss']:.4f}",
                "entropy": None if last["entropy"] is None else f"{first['entropy']:.3f} -> {last['entropy']:.3f}",
                "load": f"{min(load):.3f} to {max(load):.3f} of the choices per expert" if load else None,
                "folder": run["folder"],
            },
            title=f"{run['preset']}, seed {run['seed']}",
        )
    say("The losses are of the records it trained on; 'compose eval' compares on others.", "dim")


def preset_facts() -> list[dict[str, Any]]:
    """Name, paper, summary and needs of every preset."""
    from compose.routers.presets.registry import PRESETS

    return [
        {
            "name": name,
            "paper": PRESETS[name].paper,
            "trains": PRESETS[name].spec.train,
            "bank": PRESETS[name].experts is None,
            "needs": list(PRESETS[name].needs),
            "summary": PRESETS[name].summary,
            "limits": PRESETS[name].limits,
        }
        for name in sorted(PRESETS)
    ]


def show_presets(presets: Sequence[Mapping[str, Any]]) -> None:
    """Print a table of presets."""
    rows = [
        [
            one["name"],
            one["trains"],
            "bank" if one["bank"] else "its own",
            ", ".join(one["needs"]),
            one["paper"],
            one["summary"],
        ]
        for one in presets
    ]
    print_table(["preset", "trains", "experts", "needs", "arXiv", "what"], rows)


def _some(names: Sequence[str], most: int = 6) -> str:
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")
