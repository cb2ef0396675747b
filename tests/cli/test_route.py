"""``compose route`` on the demo base: the gates it shows are the router's, in the terminal, as JSON and as files."""

import json
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer
from typer.testing import CliRunner

from compose.bank import Bank
from compose.cli.main import build_app
from compose.cli.route import show, switch_rate
from compose.cli.route_texts import mean_gates, route_text
from compose.demo.assets import demo_bank, demo_base
from compose.engine.attach import attach
from compose.fewshot.loading import LoadedModel, load_model
from compose.routers.builder import build
from compose.routers.experts import fresh_experts, linear_targets
from compose.routers.gates.linear import LinearGate
from compose.routers.saved import save
from compose.routers.site_sums import dominant_expert
from compose.routers.spec import MixtureSpec
from compose.routers.trace import RoutingTrace
from compose.text.encoding import PromptFormat

EXPERTS = ("capitals", "commas", "sort_words")
TEXT = "Sort the words: stone river lamp"
NORMAL = LinearGate(init="normal", std=1.0)


@pytest.fixture(scope="module")
def loaded():
    return load_model(demo_base())


@pytest.fixture(scope="module")
def router(loaded, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a router over three experts of the demo bank."""
    attached = attach(loaded.model, Bank.open(demo_bank()).select(EXPERTS))
    try:
        return save(
            build(attached, MixtureSpec(gate=NORMAL, preset="molora")), tmp_path_factory.mktemp("r") / "router"
        )
    finally:
        attached.detach()


@pytest.fixture
def routed(loaded):
    attached = attach(loaded.model, Bank.open(demo_bank()).select(EXPERTS))
    yield build(attached, MixtureSpec(gate=NORMAL, site="block", gate_input="block"))
    attached.detach()


def call(router: Path, *arguments: object, stdin: str | None = None):
    options = ["--router", str(router), "--base", str(demo_base()), "--bank", str(demo_bank())]
    words = ["route", *options, *map(str, arguments)]
    return CliRunner().invoke(build_app(), words, input=stdin, env={"COLUMNS": "160"})


def test_the_gates_are_those_of_the_router(routed, loaded) -> None:
    found = route_text(routed, loaded, TEXT, new_tokens=6)
    trace, (strip,) = found.trace, found.trace.strips
    assert len(strip.tokens) == strip.prompt_length + found.new_tokens
    assert "".join(strip.tokens).endswith(found.continuation)
    assert TEXT in "".join(strip.tokens)
    ids = loaded.tokenizer(loaded.prompt_format.prompt_template.replace("{input}", TEXT)).input_ids
    ids = ids[: strip.prompt_length]
    with torch.no_grad(), routed.recording() as decisions:
        routed(input_ids=torch.tensor([ids]))
    for line, each in zip(strip.lines, decisions, strict=True):
        assert line.experts[: len(ids)] == tuple(dominant_expert(each).tolist())
        gates = torch.tensor(strip.gates[line.site])[: len(ids)]
        torch.testing.assert_close(gates, each.gates_NE, rtol=1e-4, atol=1e-5)
    whole = torch.tensor([strip.gates[sums.site] for sums in trace.sites])
    torch.testing.assert_close(
        torch.tensor([shares for _, shares in mean_gates(trace)]), whole.mean(1), rtol=1e-4, atol=1e-5
    )


def test_switches_are_those_of_the_continuation(routed, loaded) -> None:
    assert switch_rate(route_text(routed, loaded, TEXT).trace) is None
    found = route_text(routed, loaded, TEXT, new_tokens=6)
    pairs = min(5, found.new_tokens)
    assert pairs > 1
    assert {float(sums.scalar("pairs").sum()) for sums in found.trace.sites} == {pairs}
    start = found.trace.strips[0].prompt_length - 1
    each = [line.experts[start : start + pairs + 1] for line in found.trace.strips[0].lines]
    rates = [sum(one != two for one, two in pairwise(experts)) / pairs for experts in each]
    assert switch_rate(found.trace) == pytest.approx(sum(rates) / len(rates))


def test_the_terminal_shows_text_layers_and_names(routed, loaded, capsys) -> None:
    show(route_text(routed, loaded, TEXT, new_tokens=3))
    printed = capsys.readouterr().out
    assert TEXT in printed
    assert "Experts by layer" in printed
    assert any(f"{name} (" in printed for name in EXPERTS)
    assert "switch rate" in printed
    assert "\x1b" not in printed


def test_json_has_everything(router) -> None:
    result = call(router, TEXT, "--tokens", 4, "--json")
    assert result.exit_code == 0, result.output
    plain = json.loads(result.stdout)
    assert plain["experts"] == list(EXPERTS)
    assert plain["about"]["preset"] == "molora"
    assert len(plain["sites"]) == len(plain["gates"]) > 7
    assert {token["expert"] for token in plain["tokens"]} <= set(EXPERTS)
    for gates in plain["gates"].values():
        assert len(gates) == len(plain["tokens"])
        torch.testing.assert_close(torch.tensor(gates).sum(-1), torch.ones(len(gates)))
    assert 0 <= plain["switch_rate"] <= 1


def test_files_are_written_and_never_replaced_unasked(router, tmp_path: Path) -> None:
    page, trace = tmp_path / "page.html", tmp_path / "trace.json"
    result = call(router, "-", "--report", page, "--save-trace", trace, stdin=TEXT + "\n")
    assert result.exit_code == 0, result.output
    assert "molora" in page.read_text()
    assert RoutingTrace.load(trace).strips[0].gates
    again = call(router, TEXT, "--report", page)
    assert again.exit_code == 2
    assert "exists; give --force" in again.stderr
    shown = CliRunner().invoke(build_app(), ["route", "--trace", str(trace), "--report", str(page), "--force"])
    assert shown.exit_code == 0, shown.output
    assert "all tasks" in shown.stdout
    plain = CliRunner().invoke(build_app(), ["route", "--trace", str(trace), "--json"])
    assert json.loads(plain.stdout)["overall"]["entropy"] == pytest.approx(RoutingTrace.load(trace).overall().entropy)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["route"], "no text"),
        (["route", "a", "--base", "b"], "missing --router DIR"),
        (["route", "a", "--router", "r"], "missing --base MODEL"),
        (["route", "a", "--trace", "t.json"], "leave out the text"),
        (["route", "--trace", "/nowhere/t.json"], "no such file"),
        (["route", "a", "--report", "/nowhere/a.html"], "a folder that exists"),
    ],
    ids=["no-text", "no-router", "no-base", "text-and-trace", "no-trace", "no-folder"],
)
def test_wrong_calls_are_told_what_to_do(words, message) -> None:
    result = CliRunner().invoke(build_app(), words)
    assert result.exit_code == 2
    assert message in result.stderr


def test_a_gate_that_reads_tasks_is_told_one(loaded) -> None:
    from compose.errors import ComposeError
    from compose.routers.gates.table import TableGate

    attached = attach(loaded.model, Bank.open(demo_bank()).select(EXPERTS))
    spec = MixtureSpec(gate=TableGate(), site="block", scope="task", gate_input="task_id")
    routed = build(attached, spec, tasks=("sums", "words"))
    try:
        with pytest.raises(ComposeError, match="give --task, one of sums, words"):
            route_text(routed, loaded, TEXT)
        with pytest.raises(ComposeError, match="unknown task 'word'; did you mean 'words'"):
            route_text(routed, loaded, TEXT, task="word")
        found = route_text(routed, loaded, TEXT, task="words", new_tokens=2)
        assert found.trace.strips[0].task == "words"
    finally:
        attached.detach()


def test_the_encoder_s_text_is_shown_and_the_decoder_s_switches_are_counted(tiny_model, workspace) -> None:
    model = tiny_model("t5")
    targets = [target for target in linear_targets(model) if "relative" not in target]
    bank = Bank.from_adapters(fresh_experts(model, targets, num_experts=3, rank=2, init="kaiming_both"))
    attached = attach(model, bank)
    routed = build(attached, MixtureSpec(gate=NORMAL))
    tokenizer = AutoTokenizer.from_pretrained(workspace.base)
    found = route_text(routed, LoadedModel(model, tokenizer, PromptFormat()), "say a b:", new_tokens=5)
    (strip,) = found.trace.strips
    assert "".join(strip.tokens) == "say a b:"
    assert all(line.site.startswith("encoder") for line in strip.lines)
    assert len(found.trace.sites) == len(targets)
    counted = {sums.site for sums in found.trace.sites if float(sums.scalar("pairs").sum())}
    wanted = {site for site in routed.router.layout if site.startswith("decoder")}
    wanted -= {site for site in wanted if site.endswith(("EncDecAttention.k", "EncDecAttention.v"))}
    assert counted == (wanted if found.new_tokens else set())
    assert found.new_tokens > 1
