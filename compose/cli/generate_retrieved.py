"""``compose generate --retrieve``: every prompt with the adapters that are retrieved for it, all in one batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from compose.cli.console import note, print_json
from compose.errors import ComposeError

if TYPE_CHECKING:
    from compose.fewshot.loading import LoadedModel


@dataclass(frozen=True)
class RetrievalJob:
    """What the options say.

    Attributes:
        mode: Of `compose.retriever.composition.Composer`.
        folder: The retriever; None: one that is fitted on the demo's tasks.
        banks: Folders of the bank.
        demo: Whether the bank is the demo's.
        top: Adapters per prompt.
        temperature: Of similarity weights; None: equal weights.
        threshold: Adapters that score less are left out; None: none are.
        batch_size: Rows that run at a time.
        max_new_tokens: Longest answer.
    """

    mode: str
    folder: Path | None
    banks: Sequence[Path]
    demo: bool
    top: int
    temperature: float | None
    threshold: float | None
    batch_size: int
    max_new_tokens: int


def answer_retrieved(
    job: RetrievalJob, prompts: Sequence[str], base: str, load: Callable[[], LoadedModel], *, json: bool
) -> None:
    """Retrieve, generate, and print one answer per prompt.

    Raises:
        ComposeError: No bank, no retriever, one of another bank or encoder, or options that do not fit.
    """
    from compose.bank import Bank
    from compose.cli.retriever_source import RetrieverSource
    from compose.engine.attach import attach
    from compose.engine.retrieved import retrieve_and_generate
    from compose.fewshot.scoring import stop_ids
    from compose.retriever.composition import Composer, Weighting

    if not job.banks:
        raise ComposeError("--retrieve needs --bank DIR (or --demo)")
    if job.folder is None and not job.demo:
        raise ComposeError("--retrieve needs --retriever FOLDER; compose retrieve ... --save FOLDER makes one")
    weights: Weighting = "uniform" if job.temperature is None else "similarity"
    options: dict[str, Any] = {
        "mode": job.mode, "k": job.top, "weights": weights, "threshold": job.threshold,
        "temperature": 1.0 if job.temperature is None else job.temperature,
    }  # fmt: skip
    Composer(**options)  # refuses bad ones before anything is loaded
    loaded = load()
    with attach(loaded.model, Bank.open(job.banks)) as attached:
        source = RetrieverSource(job.folder, demo=job.folder is None)
        found = retrieve_and_generate(
            attached,
            source.open(lambda: (attached, loaded.tokenizer)),
            prompts,
            tokenizer=loaded.tokenizer,
            prompt_format=loaded.prompt_format,
            batch_size=job.batch_size,
            max_new_tokens=job.max_new_tokens,
            stop_ids=stop_ids(loaded),
            **options,
        )
    if json:
        outputs = [
            {"prompt": prompt, "text": text, "adapters": row}
            for prompt, text, row in zip(prompts, found.texts, found.rows, strict=True)
        ]
        print_json({"base": base, "retrieve": job.mode, "outputs": outputs})
        return
    for text, row in zip(found.texts, found.rows, strict=True):
        note(f"[{_shown(row)}]")
        print(text)


def _shown(row: Mapping[str, float]) -> str:
    return ", ".join(f"{name} {weight:.2f}" for name, weight in row.items()) or "base model"
