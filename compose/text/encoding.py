"""Encoding: examples to token ids, for decoder-only and encoder-decoder models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from compose.errors import ComposeError, ExamplesError
from compose.text.examples import Example

FORMAT_FILE = "compose.json"


@dataclass(frozen=True)
class PromptFormat:
    """How an example becomes text.

    Attributes:
        prompt_template: Contains ``{input}`` once. Ignored for examples with ``messages``, which take the tokenizer's
            chat template.
        response_suffix: Appended to the response; ``None`` stands for the tokenizer's end-of-text token.
    """

    prompt_template: str = "{input}"
    response_suffix: str | None = None

    def __post_init__(self) -> None:
        if self.prompt_template.count("{input}") != 1:
            raise ComposeError(f"prompt_template must contain {{input}} once, got {self.prompt_template!r}")

    @classmethod
    def of_folder(cls, folder: Path) -> PromptFormat:
        """Read ``compose.json`` beside a model's weights, or return the default when there is none."""
        file = folder / FORMAT_FILE
        if not file.is_file():
            return cls()
        fields = json.loads(file.read_text(encoding="utf-8"))
        unknown = sorted(set(fields) - {"prompt_template", "response_suffix"})
        if unknown:
            raise ComposeError(f"{file}: unknown fields {unknown}; allowed: prompt_template, response_suffix")
        return cls(**fields)

    def save(self, folder: Path) -> None:
        """Write ``compose.json``, unless it would only repeat the default."""
        if self != PromptFormat():
            (folder / FORMAT_FILE).write_text(json.dumps(asdict(self)) + "\n", encoding="utf-8")

    def prompt(self, example: Example, tokenizer: Any) -> str:
        """Return the text before the response."""
        if example.messages:
            turns = [dict(turn) for turn in example.messages]
            return tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
        return self.prompt_template.replace("{input}", example.input)

    def suffix(self, tokenizer: Any) -> str:
        """Return what ends a response."""
        return self.response_suffix if self.response_suffix is not None else (tokenizer.eos_token or "")


@dataclass(frozen=True)
class Encoded:
    """One example as token ids: ``prompt`` and ``response`` (with its end token)."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]

    @property
    def length(self) -> int:
        """Tokens in all."""
        return len(self.prompt) + len(self.response)


def encode(
    examples: Sequence[Example], tokenizer: Any, prompt_format: PromptFormat, *, encoder_decoder: bool
) -> list[Encoded]:
    """Tokenise prompt and response apart, so their border never depends on the tokenizer's merges.

    Raises:
        ExamplesError: A prompt of a decoder-only model, or a response, has no tokens.
    """
    encoded = []
    for number, example in enumerate(examples, start=1):
        try:
            encoded.append(encode_one(example, tokenizer, prompt_format, encoder_decoder=encoder_decoder))
        except ExamplesError as error:
            raise ExamplesError(f"example {number} {error}") from None
    return encoded


def encode_one(example: Example, tokenizer: Any, prompt_format: PromptFormat, *, encoder_decoder: bool) -> Encoded:
    """Tokenise one example; see `encode`.

    Raises:
        ExamplesError: It "has no tokens in its prompt", or response.
    """
    prompt = prompt_ids(example, tokenizer, prompt_format, encoder_decoder=encoder_decoder)
    response = response_ids(example.output, tokenizer, prompt_format)
    if not prompt or not response:
        raise ExamplesError(f"has no tokens in its {'response' if prompt else 'prompt'}")
    return Encoded(tuple(prompt), tuple(response))


def prompt_ids(example: Example, tokenizer: Any, prompt_format: PromptFormat, *, encoder_decoder: bool) -> list[int]:
    """Token ids of a prompt; a decoder-only model's does not end in an end-of-text token, for the response follows."""
    special = not example.messages
    prompt = tokenizer(prompt_format.prompt(example, tokenizer), add_special_tokens=special).input_ids
    if not encoder_decoder and prompt and prompt[-1] == tokenizer.eos_token_id and special:
        return prompt[:-1]
    return prompt


def response_ids(text: str, tokenizer: Any, prompt_format: PromptFormat) -> list[int]:
    """Token ids of a response and its end token."""
    return tokenizer(text + prompt_format.suffix(tokenizer), add_special_tokens=False).input_ids


def end_ids(tokenizer: Any, prompt_format: PromptFormat) -> list[int]:
    """Token ids that end a response: the last one of the response suffix, and the end-of-text token."""
    suffix = tokenizer(prompt_format.suffix(tokenizer), add_special_tokens=False).input_ids
    return list(dict.fromkeys(token for token in [*suffix[-1:], tokenizer.eos_token_id] if token is not None))


def pad(
    rows: Sequence[Sequence[int]], fill: int | None, *, left: bool = False, multiple: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids ``(B, T)`` int64 and mask ``(B, T)`` int64; ``fill=None`` repeats each row's last token.

    ``T`` is the longest row's length, rounded up to a multiple of ``multiple``.
    """
    width = -(-max(len(row) for row in rows) // multiple) * multiple
    ids, mask = [], []
    for row in rows:
        gap = width - len(row)
        filler = [row[-1] if fill is None else fill] * gap
        ids.append([*filler, *row] if left else [*row, *filler])
        mask.append([0] * gap + [1] * len(row) if left else [1] * len(row) + [0] * gap)
    return torch.tensor(ids), torch.tensor(mask)
