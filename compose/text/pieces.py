"""Texts of single tokens, as they stand in the whole."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def token_texts(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return what each token adds to the decoded text, so that the pieces joined are the text.

    Where a character is spread over several tokens, or a token changes what was before it, the pieces in question are
    the tokens decoded alone.

    Args:
        tokenizer: A Transformers tokenizer.
        ids: ``T`` token ids.
    """
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False)
        grown = text.startswith(before) and not text.endswith("\ufffd")
        pieces.append(text[len(before) :] if grown else tokenizer.decode([ids[end - 1]]))
        before = text
    return pieces
