"""retrieve_and_generate: every text of a batch with the adapters that are retrieved for it, all in one forward.

As LoraRetriever (arXiv:2402.09997) does it, with any retriever; see `compose.retriever.composition` for the modes.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from compose.engine.attach import AttachedModel
from compose.engine.coefficients import Selection
from compose.engine.generate import check_generates, default_stop_ids
from compose.engine.rows import row_weights, rows_selection
from compose.errors import IncompatibleError
from compose.retriever.composition import Composed, Composer, ModeName, Ranks, Weighting
from compose.text.encoding import PromptFormat, end_ids, prompt_ids
from compose.text.examples import Example

_SHOWN_NAMES = 5


class RetrievedTexts(NamedTuple):
    """What was generated, and with what.

    Attributes:
        texts: One per input; with ``num_return_sequences`` that many per input, next to each other.
        rows: Adapter -> weight of every input, the best first; empty where the bare base model ran.
    """

    texts: list[str]
    rows: list[dict[str, float]]


def retrieve_and_generate(  # noqa: PLR0913 - one parameter per choice of the method
    attached: AttachedModel,
    retriever: Ranks,
    texts: Sequence[str],
    *,
    k: int | None = 3,
    mode: ModeName = "selection",
    weights: Weighting = "uniform",
    temperature: float = 1.0,
    threshold: float | None = None,
    exclude: Any = None,
    tokenizer: Any = None,
    prompt_format: PromptFormat | None = None,
    batch_size: int | None = None,
    max_new_tokens: int = 64,
    stop_ids: Sequence[int] | None = None,
    **options: Any,
) -> RetrievedTexts:
    """Retrieve adapters for every text and continue all texts as one batch, every row with its own.

    A row gets what it gets alone, up to rounding (``mode="soup"`` aside, which looks at all texts together).

    Args:
        attached: A bank on a causal or encoder-decoder model.
        retriever: Ranks adapters of this bank by text.
        texts: Inputs; the retriever reads them as they are, the model through ``prompt_format``.
        k: How many adapters a row gets at most; None: all.
        mode: ``"selection"``: the first alone. ``"fusion"``: parameters of the first ``k`` mixed. ``"mixture"``: their
            outputs mixed. ``"soup"``: AdapterSoup, one set of ``k`` for all texts, parameters mixed.
        weights: ``"uniform"`` or ``"similarity"`` (softmax of the scores).
        temperature: Of the softmax.
        threshold: Adapters that score less are not used; a text without any runs on the bare base model.
        exclude: Adapters that texts must not get, as the retriever's ``top`` takes them: one entry per text.
        tokenizer: Of the model; None: the one saved beside it.
        prompt_format: How a text becomes a prompt; None: ``compose.json`` beside the model, or the text as it is.
        batch_size: Rows that run at a time; None: all.
        max_new_tokens: Upper limit of new tokens per row.
        stop_ids: Token ids that end a row; None: the model's own and the last of the prompt format's suffix.
        options: Further options of the model's ``generate``: ``do_sample``, ``num_beams`` ... Greedy without any.

    Raises:
        IncompatibleError: The retriever names adapters that are not in the bank; the model does not generate; no
            tokenizer is known; or options do not fit.
        UnknownNameError: No such mode or weighting, or ``exclude`` names no adapter.
    """
    check_generates(attached.model)
    if batch_size is not None and batch_size < 1:
        raise IncompatibleError(f"batch_size must be at least 1, or None for one batch, got {batch_size}")
    _check_names(attached, retriever)
    composer = Composer(mode=mode, k=k, weights=weights, temperature=temperature, threshold=threshold)
    model: Any = attached.model
    own, written = _written_beside(model, tokenizer, prompt_format)
    prompts = _prompts(texts, own, written, encoder_decoder=model.config.is_encoder_decoder)
    composed = composer(retriever, texts, exclude)
    stops = _stops(model, own, written) if stop_ids is None else stop_ids
    rows, found = composed.rows(), list[str]()
    size = len(rows) if batch_size is None else batch_size
    for start in range(0, len(rows), size):
        part = slice(start, start + size)
        new_ids = attached.generate(
            prompts[part],
            rows[part],
            max_new_tokens=max_new_tokens,
            stop_ids=stops,
            combine=composed.combine,
            **options,
        )
        found += own.batch_decode(new_ids, skip_special_tokens=True)
    return RetrievedTexts(found, rows)


def retrieved_selection(
    attached: AttachedModel, retriever: Ranks, texts: Sequence[str], *, exclude: Any = None, **options: Any
) -> Selection | None:
    """Retrieve adapters for every text, as what ``attached.set`` and ``attached.using`` take: for any forward.

    Args:
        attached: A bank on any model, encoders and classifiers among them.
        retriever: Ranks adapters of this bank by text.
        texts: ``B`` inputs, in the order of the rows of the forward.
        exclude: Adapters that texts must not get.
        options: Of `compose.retriever.composition.Composer`: ``mode``, ``k``, ``weights``, ``temperature``,
            ``threshold``.

    Returns:
        ``AdapterIds (B,)`` where every row has at most one adapter, at full strength; else sparse ``Coefficients``
        ``(B, K)``; None where no row has any.

    Raises:
        IncompatibleError: The retriever names adapters that are not in the bank, or options do not fit.
        UnknownNameError: No such mode or weighting, or ``exclude`` names no adapter.
    """
    return selection_of(attached, Composer(**options)(retriever, texts, exclude))


def selection_of(attached: AttachedModel, composed: Composed) -> Selection | None:
    """Return what was composed as a selection; see `retrieved_selection`.

    Raises:
        IncompatibleError: It names adapters that are not in the bank.
    """
    _check_names(attached, composed)
    chosen = [row_weights(attached.bank, row) for row in composed.rows()]
    return rows_selection(chosen, combine=composed.combine, device=attached.device)


def _check_names(attached: AttachedModel, source: Ranks | Composed) -> None:
    """Refuse adapters that the bank does not have, whether or not a text would get them."""
    names, bank = list(source.names), attached.bank
    missing = [name for name in names if name not in bank]
    if missing:
        more = f" and {len(missing) - _SHOWN_NAMES} more" if len(missing) > _SHOWN_NAMES else ""
        raise IncompatibleError(
            f"the retriever ranks {len(names)} adapters, of which the bank ({len(bank)} adapters) lacks "
            f"{', '.join(map(repr, missing[:_SHOWN_NAMES]))}{more}; attach the bank it was fitted for, or fit it "
            "again for this one"
        )


def _written_beside(model: Any, tokenizer: Any, prompt_format: PromptFormat | None) -> tuple[Any, PromptFormat]:
    """The tokenizer and prompt format given, else those saved beside the model."""
    source = str(getattr(model, "name_or_path", "") or "")
    if prompt_format is None:
        prompt_format = PromptFormat.of_folder(Path(source)) if source and Path(source).is_dir() else PromptFormat()
    if tokenizer is not None:
        return tokenizer, prompt_format
    if not source:
        raise IncompatibleError("the model does not say where it was loaded from; give tokenizer=")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False), prompt_format
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise IncompatibleError(f"no tokenizer beside the model at {source!r} ({first}); give tokenizer=") from error


def _prompts(
    texts: Sequence[str], tokenizer: Any, prompt_format: PromptFormat, *, encoder_decoder: bool
) -> list[list[int]]:
    if isinstance(texts, str):
        raise IncompatibleError("texts must be a list of texts, got one string; give [text]")
    return [
        list(prompt_ids(Example(text, ""), tokenizer, prompt_format, encoder_decoder=encoder_decoder))
        for text in texts
    ]


def _stops(model: Any, tokenizer: Any, prompt_format: PromptFormat) -> list[int]:
    return list(dict.fromkeys([*default_stop_ids(model), *end_ids(tokenizer, prompt_format)]))
