"""From mixed examples to tensors: token ids, labels on the response, and what routers may know of each row.

Shape letters: ``B`` rows, ``T`` tokens (of the encoder, where there is one), ``S`` tokens of the response side: ``T``
of a decoder-only model, the decoder's own of an encoder-decoder model.

Positions. A decoder-only model predicts token ``t + 1`` at position ``t``, and transformers shifts ``labels`` inside.
So ``labels`` and ``response_mask`` stand at the tokens themselves, while ``expert_labels_BS`` stands where the
decision is made: the label for predicting token ``t + 1`` is at ``t``. The first is at the last prompt token; the last
response token has none. An encoder-decoder model gets its decoder's inputs already shifted: there the label for
predicting token ``t`` is at ``t``. (MeteoRA, arXiv:2405.13053, keeps the expert of every token, those of the prompt
too, as a second plane of ``labels``; ``token_labels="all"`` is that, standing where the decisions are.)
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, get_args

import torch

from compose.errors import ExamplesError, IncompatibleError, unknown_name
from compose.routers.records import MixedExample, task_names
from compose.text.encoding import Encoded, PromptFormat, encode_one, pad
from compose.text.jsonl import raise_problems

Truncate = Literal["refuse", "prompt_left"]
TokenLabels = Literal["none", "response", "all"]
UNKNOWN = -1
"""Number of an expert, cluster or group that a record does not name."""
IGNORED = -100
"""Label of a token that is not predicted."""


class EncodedMixed(NamedTuple):
    """A mixed example as numbers.

    Attributes:
        prompt: Token ids.
        response: Token ids, with the end token.
        task_id: Its place among the tasks' names.
        expert_id: Place among the experts' names, or `UNKNOWN`.
        cluster_id: Or `UNKNOWN`.
        group: 0, 1 or `UNKNOWN`.
        cut: Tokens that were cut from the left of the prompt.
    """

    prompt: tuple[int, ...]
    response: tuple[int, ...]
    task_id: int
    expert_id: int = UNKNOWN
    cluster_id: int = UNKNOWN
    group: int = UNKNOWN
    cut: int = 0


def encode_mixed(
    examples: Sequence[MixedExample],
    tokenizer: Any,
    prompt_format: PromptFormat,
    *,
    encoder_decoder: bool,
    tasks: Sequence[str] | None = None,
    experts: Sequence[str] | None = None,
    max_length: int | None = None,
    truncate: Truncate = "refuse",
) -> list[EncodedMixed]:
    """Tokenise prompts and responses apart, and number tasks and experts.

    Args:
        examples: In order.
        tokenizer: The model's.
        prompt_format: How an example becomes text.
        encoder_decoder: Whether prompt and response are separate inputs.
        tasks: Names whose places are the task ids; None: those of the examples, sorted (`task_names`).
        experts: Names whose places are the expert ids, the bank's; None: no expert is known.
        max_length: Most tokens of prompt and response together, or of each for an encoder-decoder model; None: any.
        truncate: What to do with longer ones: refuse them all by name, or cut prompts from the left, behind a
            beginning-of-text token. Responses are never cut.

    Raises:
        ExamplesError: Examples without tokens, too long, or of unknown tasks or experts; all of them are named.
        IncompatibleError: ``max_length`` or ``truncate`` cannot be.
    """
    if truncate not in get_args(Truncate) or (max_length is not None and max_length < 2):
        raise IncompatibleError(
            f"truncate must be one of {', '.join(get_args(Truncate))} and max_length at least 2, "
            f"got {truncate!r} and {max_length}"
        )
    task_numbers = {name: number for number, name in enumerate(task_names(examples) if tasks is None else tasks)}
    expert_numbers = None if experts is None else {name: number for number, name in enumerate(experts)}
    start = getattr(tokenizer, "bos_token_id", None)
    limit = _Limit(max_length, truncate, encoder_decoder, start)
    found, problems = [], []
    for number, example in enumerate(examples, start=1):
        try:
            task_id = _number("task", example.task, task_numbers)
            expert_id = _number("expert", example.expert, expert_numbers)
            encoded = encode_one(example.example, tokenizer, prompt_format, encoder_decoder=encoder_decoder)
            fitting, cut = limit.fit(encoded)
        except ExamplesError as error:
            problems.append(f"{example.place or f'example {number}'}: {error}")
            continue
        cluster_id = UNKNOWN if example.cluster is None else example.cluster
        group = UNKNOWN if example.group is None else example.group
        found.append(EncodedMixed(fitting, encoded.response, task_id, expert_id, cluster_id, group, cut))
    raise_problems(problems)
    return found


@dataclass(frozen=True)
class MixedBatch:
    """A batch as tensors; integers are int64, masks bool. See the module for positions.

    Attributes:
        input_ids: ``(B, T)``.
        attention_mask: int64 ``(B, T)``: 0 for padding.
        labels: ``(B, S)``: token ids of the response, `IGNORED` elsewhere.
        prompt_mask: ``(B, T)``: tokens of the prompt, without padding.
        response_mask: ``(B, S)``: tokens of the response, with its end token.
        task_ids: ``(B,)``.
        cluster_ids: ``(B,)``, `UNKNOWN` where a record has none.
        expert_labels: ``(B,)``, `UNKNOWN` where a record has none.
        groups: ``(B,)``, likewise.
        expert_labels_BS: ``(B, S)``: the expert each decision should name, `UNKNOWN` where there is none; None where
            it was not asked for.
        position_ids: ``(B, T)``: places not counting padding; None unless padding is on the left.
    """

    input_ids: torch.Tensor
    attention_mask: torch.Tensor
    labels: torch.Tensor
    prompt_mask: torch.Tensor
    response_mask: torch.Tensor
    task_ids: torch.Tensor
    cluster_ids: torch.Tensor
    expert_labels: torch.Tensor
    groups: torch.Tensor
    expert_labels_BS: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None

    @property
    def num_targets(self) -> int:
        """Tokens that are predicted: the denominator of the mean loss."""
        return int(self.response_mask.sum())

    def model_inputs(self) -> dict[str, torch.Tensor]:
        """What the bare model takes."""
        found = {"input_ids": self.input_ids, "attention_mask": self.attention_mask, "labels": self.labels}
        return found if self.position_ids is None else {**found, "position_ids": self.position_ids}

    def routing_inputs(self) -> dict[str, torch.Tensor]:
        """What a router may know of the rows: fields of `RoutingContext` that the model's inputs do not tell.

        ``expert_labels`` are those per token where there are some. ``cluster_ids`` are left out unless every row has
        one, so that a gate that needs them says so.
        """
        labels = self.expert_labels if self.expert_labels_BS is None else self.expert_labels_BS
        found = {"task_ids": self.task_ids, "prompt_mask": self.prompt_mask, "expert_labels": labels}
        return {**found, "cluster_ids": self.cluster_ids} if bool((self.cluster_ids >= 0).all()) else found

    def to(self, device: torch.device | str) -> MixedBatch:
        """Return the batch on a device."""
        moved = {name: value.to(device) for name, value in vars(self).items() if value is not None}
        return MixedBatch(**moved)


@dataclass(frozen=True, kw_only=True)
class Collator:
    """Pads encoded examples to one width and makes a `MixedBatch` of them.

    Attributes:
        pad_token_id: Fills ``input_ids``; padding is masked, so any id will do.
        encoder_decoder: Whether prompt and response are separate inputs.
        padding_side: Of prompt and response together; an encoder-decoder model is padded on the right.
        multiple: Widths are rounded up to a multiple of it.
        token_labels: Decisions that get their expert's number in ``expert_labels_BS``: ``"response"``: those that
            predict the response; ``"all"``: those that predict any token (of the decoder); ``"none"``: no such tensor.
        position_ids: Whether left-padded batches say them; some models compute their own and take none.
    """

    pad_token_id: int
    encoder_decoder: bool = False
    padding_side: Literal["left", "right"] = "right"
    multiple: int = 1
    token_labels: TokenLabels = "none"
    position_ids: bool = True

    def __post_init__(self) -> None:
        problems = []
        if self.padding_side not in ("left", "right"):
            problems.append(f"padding_side must be left or right, got {self.padding_side!r}")
        if self.encoder_decoder and self.padding_side == "left":
            problems.append("an encoder-decoder model is padded on the right")
        if self.multiple < 1:
            problems.append(f"multiple must be at least 1, got {self.multiple}")
        if self.token_labels not in get_args(TokenLabels):
            problems.append(
                f"token_labels must be one of {', '.join(get_args(TokenLabels))}, got {self.token_labels!r}"
            )
        if problems:
            raise IncompatibleError("; ".join(problems))

    def __call__(self, rows: Sequence[EncodedMixed]) -> MixedBatch:
        """Return the batch of ``rows``, on the CPU.

        Raises:
            IncompatibleError: There are no rows.
        """
        if not rows:
            raise IncompatibleError("a batch needs at least one row")
        ids, mask, labels, prompt = self._one_input(rows) if not self.encoder_decoder else self._two_inputs(rows)
        experts = torch.tensor([row.expert_id for row in rows])
        left = self.padding_side == "left" and self.position_ids
        return MixedBatch(
            input_ids=ids,
            attention_mask=mask,
            labels=labels,
            prompt_mask=prompt,
            response_mask=labels != IGNORED,
            task_ids=torch.tensor([row.task_id for row in rows]),
            cluster_ids=torch.tensor([row.cluster_id for row in rows]),
            expert_labels=experts,
            groups=torch.tensor([row.group for row in rows]),
            expert_labels_BS=self._token_labels(experts, mask, labels),
            position_ids=(mask.cumsum(1) - 1).clamp_min(0) if left else None,
        )

    def _one_input(self, rows: Sequence[EncodedMixed]) -> tuple[torch.Tensor, ...]:
        left = self.padding_side == "left"
        together = [[*row.prompt, *row.response] for row in rows]
        answers = [[*[IGNORED] * len(row.prompt), *row.response] for row in rows]
        ids, mask = pad(together, self.pad_token_id, left=left, multiple=self.multiple)
        labels, _ = pad(answers, IGNORED, left=left, multiple=self.multiple)
        return ids, mask, labels, mask.bool() & (labels == IGNORED)

    def _two_inputs(self, rows: Sequence[EncodedMixed]) -> tuple[torch.Tensor, ...]:
        ids, mask = pad([row.prompt for row in rows], self.pad_token_id, multiple=self.multiple)
        labels, _ = pad([row.response for row in rows], IGNORED, multiple=self.multiple)
        return ids, mask, labels, mask.bool()

    def _token_labels(
        self, experts_B: torch.Tensor, mask_BT: torch.Tensor, labels_BS: torch.Tensor
    ) -> torch.Tensor | None:
        """Experts where a decision predicts a token that counts; see the module."""
        if self.token_labels == "none":
            return None
        predicted_BS = labels_BS != IGNORED
        if not self.encoder_decoder:
            real_BT = mask_BT.bool()
            of_next = predicted_BS if self.token_labels == "response" else real_BT
            predicted_BS = torch.cat([of_next[:, 1:], torch.zeros_like(of_next[:, :1])], dim=1) & real_BT
        return torch.where(predicted_BS, experts_B[:, None], UNKNOWN)


class _Limit(NamedTuple):
    most: int | None
    truncate: Truncate
    encoder_decoder: bool
    start: int | None

    def fit(self, encoded: Encoded) -> tuple[tuple[int, ...], int]:
        """The prompt within the limit, and how many of its tokens were cut."""
        prompt, response = encoded.prompt, encoded.response
        if self.most is None:
            return prompt, 0
        room = self.most if self.encoder_decoder else self.most - len(response)
        if len(response) > self.most:
            raise ExamplesError(f"its response of {len(response)} tokens does not fit into max_length {self.most}")
        over = len(prompt) - room
        if over <= 0:
            return prompt, 0
        if self.truncate == "refuse":
            raise ExamplesError(
                f"{len(prompt)} prompt and {len(response)} response tokens exceed max_length {self.most} by {over}; "
                "raise it, leave the record out, or cut prompts from the left (truncate 'prompt_left')"
            )
        head = prompt[:1] if self.start is not None and prompt[0] == self.start else ()
        if room <= len(head):
            raise ExamplesError(
                f"its response of {len(response)} tokens leaves no room for a prompt within max_length {self.most}"
            )
        return (*head, *prompt[len(head) + over :]), over


def _number(kind: str, name: str | None, numbers: dict[str, int] | None) -> int:
    if name is None or numbers is None:
        return UNKNOWN
    if name not in numbers:
        raise ExamplesError(unknown_name(kind, name, numbers))
    return numbers[name]
