"""``compose route``: which experts a trained router gives a text, token by token and layer by layer."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from compose.cli import COMMANDS, Command
from compose.cli.console import note, print_json, print_table, say, stdout
from compose.cli.options import INPUTS, OUTPUT, Banks, Base, Device, Dtype, Json
from compose.errors import ComposeError, DuplicateNameError
from compose.report.plain import printable

if TYPE_CHECKING:
    from compose.cli.route_texts import Routed
    from compose.routers.trace import RoutingTrace

STYLES = (
    "blue",
    "dark_orange",
    "green",
    "magenta",
    "yellow",
    "purple",
    "red",
    "cyan",
    "bright_green",
    "bright_magenta",
)
SHOWN_EXPERTS = 3

Text = Annotated[str | None, typer.Argument(metavar="[TEXT]", help="The text; - reads standard input.")]
Router = Annotated[
    Path | None,
    typer.Option("--router", metavar="DIR", help="A trained router's folder.", rich_help_panel=INPUTS),
]
Trace = Annotated[
    Path | None,
    typer.Option(
        "--trace", metavar="FILE", help="Show a saved trace.json instead of running a text.", rich_help_panel=INPUTS
    ),
]
History = Annotated[
    Path | None,
    typer.Option(
        "--history", metavar="FILE", help="history.jsonl of the training, for the pictures.", rich_help_panel=INPUTS
    ),
]
Tokens = Annotated[int, typer.Option("--tokens", metavar="N", min=0, help="Continue the text by N tokens at most.")]
TaskName = Annotated[
    str | None, typer.Option("--task", metavar="NAME", help="The text's task, for gates that read it.")
]
Cluster = Annotated[
    int | None, typer.Option("--cluster", metavar="N", min=0, help="The text's cluster, for gates that read it.")
]
Report = Annotated[
    Path | None, typer.Option("--report", metavar="FILE", help="Write a page (HTML).", rich_help_panel=OUTPUT)
]
Png = Annotated[
    Path | None,
    typer.Option("--png", metavar="FILE", help="Write a picture (needs the extra plots).", rich_help_panel=OUTPUT),
]
SaveTrace = Annotated[
    Path | None,
    typer.Option("--save-trace", metavar="FILE", help="Write trace.json, gates included.", rich_help_panel=OUTPUT),
]
Overwrite = Annotated[bool, typer.Option("--force", help="Replace files that exist.", rich_help_panel=OUTPUT)]


def route(  # noqa: PLR0913 - one parameter per option
    text: Text = None,
    router: Router = None,
    base: Base = None,
    bank: Banks = None,
    trace: Trace = None,
    history: History = None,
    tokens: Tokens = 0,
    task: TaskName = None,
    cluster: Cluster = None,
    report: Report = None,
    png: Png = None,
    save_trace: SaveTrace = None,
    force: Overwrite = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Show the gates of a trained router for one text: experts by layer, and every token in its expert's colour.

    The text passes through the model's prompt template (compose.json beside its weights). With --tokens it is
    continued greedily, and the share of neighbouring tokens with different dominant experts is told. --trace shows
    what was measured before, for the pictures of a whole evaluation.
    """
    _check_outputs([report, png, save_trace], force=force)
    if trace is not None:
        _refuse_both(text, router)
        from compose.routers.trace import RoutingTrace

        found = RoutingTrace.load(trace)
        _write(found, report, png, None, history)
        print_json(_summary(found)) if json else _show_trace(found)
        return
    routed = _run(text, router, (base, bank or []), (device, dtype), (tokens, task, cluster))
    _write(routed.trace, report, png, save_trace, history)
    print_json(_plain(routed)) if json else show(routed)


def show(routed: Routed) -> None:
    """Print a routed text: its tokens in the colours of their experts, and the experts of every layer."""
    trace = routed.trace
    (strip,) = trace.strips
    _print_strip(strip.tokens, strip.majority(), trace.experts)
    if routed.new_tokens:
        say(f"continuation ({routed.new_tokens} tokens): {routed.continuation}")
    _print_layers(trace)
    overall = trace.overall()
    if overall is not None:
        say(f"entropy of a decision {_write_number(overall.entropy)} nats of at most {overall.largest_entropy:.3f}")
    rate = switch_rate(trace)
    if rate is not None:
        say(f"switch rate {rate:.3f}: share of neighbouring new tokens with another dominant expert")


def switch_rate(trace: RoutingTrace) -> float | None:
    """Mean over sites of the share of neighbouring generated tokens with different dominant experts."""
    rates = []
    for sums in trace.sites:
        found = trace.metrics(sums.site)
        if found is not None and found.switch_rate is not None:
            rates.append(found.switch_rate)
    return sum(rates) / len(rates) if rates else None


def _run(
    text: str | None,
    router: Path | None,
    sources: tuple[str | None, list[Path]],
    place: tuple[str, str],
    wishes: tuple[int, str | None, int | None],
) -> Routed:
    """Load everything, route the text, and leave the model as it was."""
    base, folders = sources
    given = sys.stdin.read().rstrip("\n") if text == "-" else text
    if not given or not given.strip():
        raise ComposeError("no text; give TEXT, or - to read it from standard input")
    if router is None or base is None:
        missing = "--router DIR" if router is None else "--base MODEL"
        raise ComposeError(f"missing {missing} (or --trace FILE to show what was measured before)")
    from compose.bank import Bank
    from compose.cli.loading import load_base
    from compose.cli.route_texts import route_text
    from compose.engine.routed import open_routed

    loaded = load_base(base, device=place[0], dtype=place[1])
    opened = open_routed(loaded.model, Bank.open(folders) if folders else None, router)
    tokens, task, cluster = wishes
    try:
        about = {"preset": opened.spec.preset or "mixture", "base": base, "router": str(router)}
        return route_text(opened, loaded, given, new_tokens=tokens, task=task, cluster=cluster, about=about)
    finally:
        opened.attached.detach()


def _print_strip(tokens: tuple[str, ...], majority: list[int], experts: tuple[str, ...]) -> None:
    from rich.text import Text as RichText

    line = RichText()
    for token, expert in zip(tokens, majority, strict=True):
        line.append(printable(token), style=_style(expert))
    console = stdout()
    console.print(line, soft_wrap=True)
    legend = RichText()
    for expert in sorted({expert for expert in majority if expert >= 0}):
        count = majority.count(expert)
        legend.append(f"{printable(experts[expert])} ({count})", style=_style(expert))
        legend.append("  ")
    console.print(legend, soft_wrap=True)


def _style(expert: int) -> str:
    return "dim" if expert < 0 else f"bold {STYLES[expert % len(STYLES)]}"


def _print_layers(trace: RoutingTrace) -> None:
    from compose.cli.route_texts import mean_gates

    rows = []
    for label, shares in mean_gates(trace):
        order = sorted(range(len(shares)), key=lambda expert: -shares[expert])[:SHOWN_EXPERTS]
        rows.append([label, *(f"{trace.experts[expert]} {shares[expert]:.2f}" for expert in order)])
    heads = ["first", "second", "third"][: min(SHOWN_EXPERTS, len(trace.experts))]
    print_table([">layer", *heads], rows, title="Experts by layer, mean share of the gates")


def _show_trace(trace: RoutingTrace) -> None:
    """Print the measures of a saved trace, by task, and its warnings."""
    from compose.report.routing_data import warnings_of

    rows = []
    for name in (None, *trace.seen_tasks()):
        found = trace.overall(name)
        if found is not None:
            values = (
                found.entropy,
                found.information,
                found.active,
                found.max_load,
                found.accuracy,
                found.switch_rate,
            )
            busiest = trace.experts[max(range(len(found.load)), key=found.load.__getitem__)]
            rows.append([name or "all tasks", *map(_write_number, values), busiest, str(len(found.dead))])
    heads = [">entropy", ">information", ">active", ">max load", ">accuracy", ">switches"]
    print_table(["task", *heads, "busiest expert", ">dead"], rows, title=f"{len(trace.sites)} sites, means over them")
    for warning in warnings_of(trace):
        note(f"warning: {warning}", "yellow")


def _write_number(value: float | None) -> str:
    from compose.report.svg import number

    return number(value)


def _summary(trace: RoutingTrace) -> dict[str, Any]:
    """A saved trace for ``--json``: means over sites, by task."""
    from compose.report.routing_data import warnings_of

    means = {name: trace.overall(name) for name in trace.seen_tasks()}
    overall = trace.overall()
    return {
        "experts": trace.experts,
        "sites": len(trace.sites),
        "overall": None if overall is None else overall.to_json(),
        "tasks": {name: found.to_json() for name, found in means.items() if found is not None},
        "warnings": warnings_of(trace),
    }


def _plain(routed: Routed) -> dict[str, Any]:
    """A routed text for ``--json``."""
    from compose.cli.route_texts import mean_gates

    trace = routed.trace
    (strip,) = trace.strips
    layers = [{"layer": label, "load": shares} for label, shares in mean_gates(trace)]
    names = [trace.experts[expert] if expert >= 0 else None for expert in strip.majority()]
    return {
        "about": dict(trace.about),
        "experts": trace.experts,
        "tokens": [{"text": token, "expert": name} for token, name in zip(strip.tokens, names, strict=True)],
        "prompt_length": strip.prompt_length,
        "continuation": routed.continuation,
        "switch_rate": switch_rate(trace),
        "layers": layers,
        "sites": [line._asdict() for line in strip.lines],
        "gates": strip.gates,
    }


def _write(
    trace: RoutingTrace, report: Path | None, png: Path | None, save_trace: Path | None, history: Path | None
) -> None:
    """Write the files that were asked for."""
    if history is not None and report is None and png is None:
        raise ComposeError("--history is for pictures; give --report FILE or --png FILE as well")
    from compose.report.routing_data import read_history

    course = None if history is None else read_history(history, trace.experts)
    if report is not None:
        from compose.report.routing_html import render_routing

        report.write_text(render_routing(trace, course), encoding="utf-8")
    if png is not None:
        from compose.report.routing_png import routing_png

        png.write_bytes(routing_png(trace, course))
    if save_trace is not None:
        trace.save(save_trace)
    for path in (report, png, save_trace):
        if path is not None:
            note(f"wrote {path}")


def _check_outputs(paths: list[Path | None], *, force: bool) -> None:
    for path in paths:
        if path is None:
            continue
        if path.is_dir() or not path.parent.is_dir():
            raise ComposeError(f"{path}: give the name of a file in a folder that exists")
        if path.exists() and not force:
            raise DuplicateNameError(f"{path} exists; give --force to replace it, or another name")


def _refuse_both(text: str | None, router: Path | None) -> None:
    if text is not None or router is not None:
        raise ComposeError("--trace shows what was measured before; leave out the text and --router")


COMMANDS.register("route")(
    Command(
        route,
        examples=(
            "compose route 'Sort: b a' --router runs/molora --base ./base --bank ./bank",
            "compose route 'Sort: b a' --router runs/molora --base ./base --bank ./bank --tokens 9 --report page.html",
            "compose route --trace runs/molora/trace.json --history runs/molora/history.jsonl --report routing.html",
        ),
    )
)
