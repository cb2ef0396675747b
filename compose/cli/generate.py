"""``compose generate``: text from the base model with adapters or weights in force, for all prompts or for each."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from compose.cli import COMMANDS, Command
from compose.cli.console import print_json
from compose.cli.options import OUTPUT, Banks, Base, Device, Dtype, Force, Json
from compose.errors import ComposeError

if TYPE_CHECKING:
    from compose.cli.chosen_weights import ChosenWeights
    from compose.fewshot.loading import LoadedModel

RETRIEVE = "Adapters by retrieval"

Texts = Annotated[
    list[str] | None,
    typer.Argument(metavar="[TEXT]...", help="Prompts; - reads one a line from standard input.", show_default=False),
]
Prompt = Annotated[list[str] | None, typer.Option("--prompt", help="A prompt; may be repeated.", show_default=False)]
AdapterName = Annotated[
    str | None, typer.Option("--adapter", metavar="NAME", help="One adapter of the bank, at full strength.")
]
Weights = Annotated[
    str | None,
    typer.Option("--weights", metavar="RUN|JSON", help="A run folder, a JSON file, or {'name': weight} as JSON."),
]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="Longest answer.", rich_help_panel=OUTPUT)]
Requests = Annotated[
    str | None,
    typer.Option(
        "--requests",
        metavar="FILE",
        help="JSONL: prompt, and adapter or weights, optionally id and max_new_tokens; - reads standard input.",
    ),
]
BatchSize = Annotated[
    int,
    typer.Option(
        "--batch-size", min=1, help="With --requests, --retrieve: how many run at a time.", rich_help_panel=OUTPUT
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out", "-o", metavar="FILE", help="With --requests: results, instead of stdout.", rich_help_panel=OUTPUT
    ),
]
RetrieveMode = Annotated[
    str | None,
    typer.Option(
        "--retrieve",
        metavar="MODE",
        help="selection, fusion, mixture or soup: every prompt gets the adapters retrieved for it.",
        rich_help_panel=RETRIEVE,
    ),
]
RetrieverFolder = Annotated[
    Path | None,
    typer.Option("--retriever", metavar="FOLDER", help="Made by compose retrieve --save.", rich_help_panel=RETRIEVE),
]
Top = Annotated[
    int | None, typer.Option("--top", min=1, help="Adapters per prompt, 3 by default.", rich_help_panel=RETRIEVE)
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        metavar="T",
        help="Weigh adapters by a softmax of their scores at this temperature, instead of equally.",
        rich_help_panel=RETRIEVE,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        metavar="SCORE",
        help="Leave out adapters that score less; a prompt without any gets the base model.",
        rich_help_panel=RETRIEVE,
    ),
]


def generate(  # noqa: PLR0913 - one parameter per option
    texts: Texts = None,
    base: Base = None,
    bank: Banks = None,
    prompt: Prompt = None,
    adapter: AdapterName = None,
    weights: Weights = None,
    requests: Requests = None,
    retrieve: RetrieveMode = None,
    retriever: RetrieverFolder = None,
    top: Top = None,
    temperature: Temperature = None,
    threshold: Threshold = None,
    demo: Annotated[bool, typer.Option("--demo", help="Use the shipped base model and bank.")] = False,
    max_new_tokens: MaxNewTokens = 64,
    batch_size: BatchSize = 16,
    out: Out = None,
    force: Force = False,
    device: Device = "cpu",
    dtype: Dtype = "auto",
    json: Json = False,
) -> None:
    """Continue prompts greedily, with an adapter or weights over the bank in force.

    Prompts pass through the model's prompt template (compose.json beside its weights), as in a search. Without
    --adapter and --weights the bare base model answers.

    With --requests every prompt has its own adapter, weights or neither; --adapter and --weights serve those without
    their own. All run in one batch which a waiting request joins as soon as another is done. One JSON line per request
    is written when it finishes: index, id, text, new_tokens, reason (stop or length).

    With --retrieve every prompt gets the adapters that a retriever finds for it, in one batch with the others; what
    each got is told on standard error, or in --json.
    """
    given = [*(prompt or []), *(texts or [])]
    prompts = _prompts(given) if requests is None else []
    _check_outputs(requests, given, out, json=json)
    chosen_by = {"--requests": requests, "--adapter": adapter, "--weights": weights}
    _check_retrieval(retrieve, chosen_by, (retriever, top, temperature, threshold))
    base_path, folders = _sources(base, bank, demo=demo)
    if adapter is not None and weights is not None:
        raise ComposeError("--adapter and --weights exclude each other; give one of them")
    if (adapter or weights) and not folders:
        raise ComposeError("--adapter and --weights need --bank DIR")
    from compose.cli.chosen_weights import one_adapter, read_weights
    from compose.cli.loading import load_base

    chosen = read_weights(weights) if weights is not None else None if adapter is None else one_adapter(adapter)
    if retrieve is not None:
        from compose.cli.generate_retrieved import RetrievalJob, answer_retrieved

        wishes = RetrievalJob(
            retrieve, retriever, folders, demo, top or 3, temperature, threshold, batch_size, max_new_tokens
        )
        answer_retrieved(
            wishes, prompts, base_path, lambda: load_base(base_path, device=device, dtype=dtype), json=json
        )
        return
    if requests is not None:
        from compose.cli.generate_requests import RequestJob, answer_requests

        job = RequestJob(requests, folders, chosen, max_new_tokens, batch_size, out, force)
        answer_requests(job, lambda: load_base(base_path, device=device, dtype=dtype))
        return
    loaded = load_base(base_path, device=device, dtype=dtype)
    answers = _answers(loaded, prompts, folders, chosen, max_new_tokens)
    if json:
        outputs = [{"prompt": given, "text": text} for given, text in zip(prompts, answers, strict=True)]
        print_json({"base": base_path, "weights": None if chosen is None else chosen.summary(), "outputs": outputs})
        return
    for text in answers:
        print(text)


def _answers(
    loaded: LoadedModel, prompts: list[str], folders: list[Path], chosen: ChosenWeights | None, max_new_tokens: int
) -> list[str]:
    if chosen is None:
        return _continue(loaded, prompts, max_new_tokens)
    from compose.bank import Bank
    from compose.engine.attach import attach

    with attach(loaded.model, chosen.select(Bank.open(folders))) as attached, attached.using(chosen.on(attached)):
        return _continue(loaded, prompts, max_new_tokens)


def _continue(loaded: LoadedModel, prompts: list[str], max_new_tokens: int) -> list[str]:
    from compose.engine.generate import generate_tokens
    from compose.fewshot.scoring import stop_ids
    from compose.text.encoding import encode
    from compose.text.examples import Example

    encoder_decoder = loaded.model.config.is_encoder_decoder
    examples = [Example(text, "") for text in prompts]
    encoded = encode(examples, loaded.tokenizer, loaded.prompt_format, encoder_decoder=encoder_decoder)
    rows = [item.prompt for item in encoded]
    found = generate_tokens(loaded.model, rows, max_new_tokens=max_new_tokens, stop_ids=stop_ids(loaded))
    return loaded.tokenizer.batch_decode(found, skip_special_tokens=True)


def _prompts(given: list[str]) -> list[str]:
    prompts = [text for text in given if text != "-"]
    if "-" in given:
        prompts += [line.rstrip("\n") for line in sys.stdin if line.strip()]
    if not prompts:
        raise ComposeError("no prompts; give --prompt TEXT, or - to read one a line from standard input")
    if any(not text.strip() for text in prompts):
        raise ComposeError("a prompt is empty; give each --prompt some text")
    return prompts


def _check_outputs(requests: str | None, given: list[str], out: Path | None, *, json: bool) -> None:
    if requests is None:
        if out is not None:
            raise ComposeError("--out goes with --requests; other answers go to stdout")
        return
    if given:
        raise ComposeError("--requests brings its own prompts; leave out the others")
    if json:
        raise ComposeError("--requests writes JSON lines, one per request; leave out --json")


def _check_retrieval(mode: str | None, others: Mapping[str, object], options: tuple[object, ...]) -> None:
    if mode is None:
        names = ("--retriever", "--top", "--temperature", "--threshold")
        given = [name for name, value in zip(names, options, strict=True) if value is not None]
        if given:
            raise ComposeError(f"{given[0]} goes with --retrieve MODE: selection, fusion, mixture or soup")
        return
    clash = [name for name, value in others.items() if value is not None]
    if clash:
        raise ComposeError(f"--retrieve chooses the adapters; leave out {clash[0]}")


def _sources(base: str | None, bank: list[Path] | None, *, demo: bool) -> tuple[str, list[Path]]:
    if demo:
        if base or bank:
            raise ComposeError("--demo brings its own base model and bank; leave out --base and --bank")
        from compose.cli.demo_files import demo_paths

        base_path, bank_path = demo_paths()
        return str(base_path), [bank_path]
    if base is None:
        raise ComposeError("missing --base MODEL (or --demo for the shipped one)")
    return base, list(bank or [])


COMMANDS.register("generate")(
    Command(
        generate,
        examples=(
            "compose generate --base ./base --bank ./bank --adapter reverse_words --prompt 'Reverse: a b c'",
            "compose generate --base ./base --bank ./bank --weights runs/task - < prompts.txt",
            """compose generate --demo --weights '{"capitals": 0.7, "sort_words": 0.4}' --prompt 'Sort: b a'""",
            "compose generate --demo --requests requests.jsonl --batch-size 32 --out answers.jsonl",
            "compose generate --demo --retrieve selection --prompt 'Sort the words: pear fig apple'",
            "compose generate --base ./base --bank ./bank --retrieve mixture --retriever runs/retriever - < some.txt",
            """echo '{"prompt": "Do it: a b", "adapter": "capitals"}' | compose generate --demo --requests -""",
        ),
    )
)
