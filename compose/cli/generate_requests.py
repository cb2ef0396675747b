"""``compose generate --requests``: a file of requests through one running batch, a line for each as it finishes."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from compose.cli.console import note
from compose.cli.request_file import RequestLine, read_requests, refuse
from compose.errors import ComposeError

if TYPE_CHECKING:
    from compose.bank import Bank
    from compose.cli.chosen_weights import ChosenWeights
    from compose.engine.requests import Finished, Request, RunningBatch
    from compose.engine.rows import RowAdapter
    from compose.fewshot.loading import LoadedModel


@dataclass(frozen=True)
class RequestJob:
    """What the options say.

    Attributes:
        source: File of requests, or ``-``.
        folders: The bank.
        chosen: ``--adapter`` or ``--weights``, for records without their own; ``None``: the base model.
        max_new_tokens: For records without their own.
        batch_size: Requests that run at a time.
        out: File for the results; ``None``: standard output.
        force: Whether a file at ``out`` may be replaced.
    """

    source: str
    folders: Sequence[Path]
    chosen: ChosenWeights | None
    max_new_tokens: int
    batch_size: int
    out: Path | None
    force: bool


def answer_requests(job: RequestJob, load: Callable[[], LoadedModel]) -> None:
    """Check all requests, then generate and write one line for each as it finishes.

    Raises:
        ComposeError: A bad request (all are named), weights that cannot be a default, or a file in the way.
    """
    from compose.bank import Bank
    from compose.engine.attach import attach
    from compose.engine.requests import RunningBatch
    from compose.engine.rows import row_weights
    from compose.fewshot.scoring import stop_ids

    if not job.folders:
        raise ComposeError("--requests needs --bank DIR (or --demo)")
    if job.out is not None and (job.out.is_dir() or (job.out.exists() and not job.force)):
        raise ComposeError(f"--out: {job.out} exists; give another file, or pass --force to replace a file")
    bank = Bank.open(job.folders)
    default = _default(job.chosen, bank)
    lines = read_requests(
        job.source,
        default=default,
        max_new_tokens=job.max_new_tokens,
        check=lambda adapter: row_weights(bank, adapter),
    )
    combine = _combine(job, lines)
    loaded = load()
    with attach(loaded.model, _used(bank, lines)) as attached:
        batch = RunningBatch(attached, max_rows=job.batch_size, stop_ids=stop_ids(loaded), combine=combine)
        places = _fill(batch, loaded, lines, job.source)
        with nullcontext(sys.stdout) if job.out is None else job.out.open("w", encoding="utf-8") as stream:
            _write(batch, loaded, lines, places, stream)


def _default(chosen: ChosenWeights | None, bank: Bank) -> RowAdapter:
    if chosen is None:
        return None
    if len(chosen.values) > 1:
        raise ComposeError(
            f"the weights differ between {len(chosen.values)} groups of layers, which a file of requests cannot mix; "
            "give its prompts without --requests"
        )
    chosen.select(bank)  # refuses unknown adapters, and files that changed since the weights were found
    return dict(zip(chosen.names, chosen.values[0], strict=True))


def _combine(job: RequestJob, lines: Sequence[RequestLine]) -> Any:
    combine = "outputs" if job.chosen is None else job.chosen.combine
    mixed = [(item.line, "has weights") for item in lines if item.own and isinstance(item.adapter, Mapping)]
    if combine == "parameters" and mixed:
        raise ComposeError(
            f"--weights combine 'parameters', the weights of records combine 'outputs' (first at {job.source}:"
            f"{mixed[0][0]}); give them in separate files"
        )
    return combine


def _used(bank: Bank, lines: Sequence[RequestLine]) -> Bank:
    """The adapters that a request names, in the bank's order; one that is never used where there are none."""
    named: set[str] = set()
    for item in lines:
        named.update([item.adapter] if isinstance(item.adapter, str) else item.adapter or ())
    return bank.select([name for name in bank.names if name in named] or bank.names[:1])


def _fill(batch: RunningBatch, loaded: LoadedModel, lines: Sequence[RequestLine], source: str) -> dict[Request, int]:
    """Add every request; return request -> place in ``lines``."""
    from compose.engine.requests import Request
    from compose.text.encoding import encode
    from compose.text.examples import Example

    encoder_decoder = loaded.model.config.is_encoder_decoder
    places, problems = {}, []
    for place, item in enumerate(lines):
        try:
            (encoded,) = encode(
                [Example(item.prompt, "")], loaded.tokenizer, loaded.prompt_format, encoder_decoder=encoder_decoder
            )
            request = Request(encoded.prompt, item.adapter, item.max_new_tokens, item.id)
            batch.add(request)
            places[request] = place
        except ComposeError as error:
            problems.append((item.line, str(error)))
    refuse(source, problems)
    return places


def _write(
    batch: RunningBatch,
    loaded: LoadedModel,
    lines: Sequence[RequestLine],
    places: Mapping[Request, int],
    stream: TextIO,
) -> None:
    started, tokens = time.perf_counter(), 0
    for finished in batch.run():
        place = places[finished.request]
        stream.write(json.dumps(_record(finished, place, lines[place], loaded), ensure_ascii=False) + "\n")
        stream.flush()
        tokens += len(finished.tokens)
    note(f"{len(lines)} requests, {tokens} new tokens in {time.perf_counter() - started:.1f} s")


def _record(finished: Finished, place: int, item: RequestLine, loaded: LoadedModel) -> dict[str, Any]:
    (text,) = loaded.tokenizer.batch_decode([finished.tokens], skip_special_tokens=True)
    known_as = {"index": place} if item.id is None else {"index": place, "id": item.id}
    return {**known_as, "text": text, "new_tokens": len(finished.tokens), "reason": finished.reason}
