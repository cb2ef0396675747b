"""Generation with gates that read the text so far, anew for every token (token-level adaptation, arXiv:2311.10847).

A token's gates come from the text that ends with it, and act on it alone; prompt tokens have those of the whole
prompt. So what is in a cache never has to change, and a cache gives what no cache gives.

Shape letters: ``B`` rows, ``T`` tokens, ``D`` width of text embeddings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from compose.errors import IncompatibleError
from compose.routers.first_pass import past_length
from compose.routers.routed import RoutedModel

Decode = Callable[[Sequence[int]], str]
Encode = Callable[[Sequence[str]], torch.Tensor]


def generate_by_step(
    routed: RoutedModel, prompts: Sequence[Sequence[int]], *, decode: Decode, encode: Encode, **options: Any
) -> list[list[int]]:
    """Continue prompts; every new token is computed with the gates of the text up to it.

    Args:
        routed: The model with a router of scope ``"step"`` that reads text.
        prompts: ``B`` rows of token ids.
        decode: Token ids -> text, without special tokens: ``partial(tokenizer.decode, skip_special_tokens=True)``.
        encode: ``n`` texts -> embeddings ``(n, D)``; a text is embedded once.
        options: Of ``routed.generate``. No beams: the order of rows may not change on the way.

    Returns:
        ``B`` rows of new token ids.

    Raises:
        IncompatibleError: The router reads something else, the model has an encoder, or beams or several sequences per
            row are wanted.
    """
    if routed.spec.scope != "step" or routed.spec.gate_input != "text":
        raise IncompatibleError(
            f"generate_by_step is for gates that read text at every step, as preset 'token_level'; this router reads "
            f"{routed.spec.gate_input!r} per {routed.spec.scope}"
        )
    if routed.config.is_encoder_decoder:
        raise IncompatibleError(
            "generate_by_step is for decoder-only models: keys and values of cross-attention belong to no new token"
        )
    wide = [name for name in ("num_beams", "num_return_sequences") if options.get(name, 1) != 1]
    if wide:
        raise IncompatibleError(f"{wide[0]} must be 1: the text of a row has to stay in its row")
    texts = _Texts(routed, [list(prompt) for prompt in prompts], decode, encode)
    hook = routed.model.register_forward_pre_hook(texts.before_model, with_kwargs=True)
    try:
        return routed.generate(prompts, text_embedding=texts.of_prompts(), **options)
    finally:
        hook.remove()


class _Texts:
    """Follows the tokens of every row and hands the embeddings of their texts to the session."""

    def __init__(self, routed: RoutedModel, prompts: list[list[int]], decode: Decode, encode: Encode) -> None:
        self.session = routed.session
        self.prompts, self.decode, self.encode = prompts, decode, encode
        self.before = max(len(prompt) for prompt in prompts)  # columns that are no new tokens
        self.columns = torch.zeros(len(prompts), 0, dtype=torch.int64)
        self.known: dict[str, torch.Tensor] = {}

    def of_prompts(self) -> torch.Tensor:
        """``(B, D)``."""
        return self._embedded([self.decode(prompt) for prompt in self.prompts])

    def before_model(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Tell the session ``(B, T, D)``: one embedding per token of this forward."""
        ids = kwargs["input_ids"]
        past = past_length(kwargs.get("past_key_values"))
        self.columns = torch.cat([self.columns[:, :past], ids.to("cpu")], dim=1)
        texts = [
            self.decode(prompt + self.columns[row, self.before : place + 1].tolist())
            for row, prompt in enumerate(self.prompts)
            for place in range(past, self.columns.shape[1])
        ]
        embedded = self._embedded(texts).unflatten(0, (len(self.prompts), -1)).to(ids.device)
        self.session.context = replace(self.session.context, text_embedding=embedded)

    def _embedded(self, texts: Sequence[str]) -> torch.Tensor:
        new = list(dict.fromkeys(text for text in texts if text not in self.known))
        if new:
            self.known.update(zip(new, self.encode(new).unbind(0), strict=True))
        return torch.stack([self.known[text] for text in texts])
