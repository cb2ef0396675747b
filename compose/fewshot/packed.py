"""Packed examples: what all prompts begin with is computed once, and the rest of every example follows it in one row.

Few-shot examples of a task repeat their instruction. Under causal attention the keys and values of that part are the
same for all of them, so one row holds it once, then the rest of each example, which sees the shared part and itself
only. Every example's losses are what they are alone, up to rounding, and no token is padding.
"""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile
from typing import Any

import torch
from torch.nn import functional
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from compose.text.encoding import Encoded

MODEL_TYPES = frozenset(
    ["gemma", "gpt2", "gpt_neox", "llama", "mistral", "olmo", "olmo2", "phi", "qwen2", "qwen3", "stablelm"]
)
"""Architectures that take positions and a mask per pair of tokens; the tests compare each with its plain losses."""

SAVING = 0.2
"""Share of the tokens that packing must save to be used."""


MOST_TOKENS = 2_048
"""Of a row; its mask has the square of it."""


@dataclass(frozen=True)
class PackedExamples:
    """Some examples in one row of ``T`` tokens, of which ``L`` predict a response token.

    Attributes:
        examples: Indices of the ``S`` examples in the list they were packed from.
        ids_T: Token ids.
        positions_T: Position of each token in its own example.
        mask_TT: 0 where the line's token may see the column's, else the lowest float32.
        keep_L: Which tokens predict a response token.
        labels_L: The response tokens.
        owner_L: Which of the ``S`` examples each response token belongs to.
        lengths_S: Response tokens of each example.
    """

    examples: tuple[int, ...]
    ids_T: torch.Tensor
    positions_T: torch.Tensor
    mask_TT: torch.Tensor
    keep_L: torch.Tensor
    labels_L: torch.Tensor
    owner_L: torch.Tensor
    lengths_S: torch.Tensor

    @property
    def num_tokens(self) -> int:
        """``T``."""
        return len(self.ids_T)

    def losses(self, model: Any, copies: int) -> torch.Tensor:
        """Mean cross-entropy of every example's response, ``copies`` times over: ``(copies, S)`` float32.

        The coefficients in force are one set for all copies or one per copy; with gradients enabled there is a graph.
        """
        arguments: dict[str, Any] = {
            "input_ids": self.ids_T.expand(copies, -1),
            "position_ids": self.positions_T.expand(copies, -1),
            "attention_mask": self.mask_TT.to(model.dtype).expand(copies, 1, -1, -1),
        }
        if "logits_to_keep" in inspect.signature(model.forward).parameters:
            logits_PLV = model(**arguments, use_cache=False, logits_to_keep=self.keep_L).logits
        else:
            logits_PLV = model(**arguments, use_cache=False).logits[:, self.keep_L]
        labels_PL = self.labels_L.expand(copies, -1)
        losses_PL = functional.cross_entropy(logits_PLV.float().transpose(1, 2), labels_PL, reduction="none")
        # Summed by example, not multiplied by a matrix: a loss that is not finite stays its own example's.
        sums_PS = losses_PL.new_zeros(copies, len(self.examples)).index_add(1, self.owner_L, losses_PL)
        return sums_PS / self.lengths_S


def pack(model: Any, examples: Sequence[Encoded], max_tokens: int) -> list[PackedExamples]:
    """Pack examples into as few rows as ``max_tokens`` per row allows.

    Rows are also kept short against the model's width, where attention between examples costs little.

    Returns:
        The rows, shortest examples first; none where the model cannot take them or they save too little.
    """
    shared = _shared_tokens(examples)
    limit = min(max_tokens, MOST_TOKENS, max(256, 2 * model.config.hidden_size)) if takes_packed_rows(model) else 0
    order = sorted(range(len(examples)), key=lambda index: (examples[index].length, index))
    groups: list[list[int]] = [[]]
    tokens = shared
    for index in order:
        rest = examples[index].length - 1 - shared
        if groups[-1] and tokens + rest > limit:
            groups.append([])
            tokens = shared
        groups[-1].append(index)
        tokens += rest
    plain = sum(example.length - 1 for example in examples)
    packed = plain - shared * (len(examples) - len(groups))
    if not limit or packed > (1 - SAVING) * plain:
        return []
    return [_packed(examples, group, shared, model.device) for group in groups]


def takes_packed_rows(model: Any) -> bool:
    """Whether every layer of the model attends to all earlier tokens and lets the caller mask them."""
    config = model.config
    return (
        config.model_type in MODEL_TYPES
        and config._attn_implementation in ("sdpa", "eager")
        and all(type(layer) is DynamicLayer for layer in DynamicCache(config=config).layers)
    )


def _shared_tokens(examples: Sequence[Encoded]) -> int:
    """How many tokens all prompts begin with; never the last, which predicts a response."""
    columns = zip(*(example.prompt[:-1] for example in examples), strict=False)
    return sum(1 for _ in takewhile(lambda column: len(set(column)) == 1, columns))


def _packed(examples: Sequence[Encoded], group: Sequence[int], shared: int, device: torch.device) -> PackedExamples:
    ids, positions, owner = [*examples[group[0]].prompt[:shared]], [*range(shared)], [-1] * shared
    keep: list[int] = []
    labels: list[int] = []
    columns: list[int] = []
    for column, index in enumerate(group):
        prompt, response = examples[index].prompt, examples[index].response
        end = len(ids) + len(prompt) - shared
        columns += [column] * len(response)
        keep += range(end - 1, end - 1 + len(response))
        labels += response
        ids += [*prompt[shared:], *response[:-1]]
        positions += range(shared, examples[index].length - 1)
        owner += [column] * (len(ids) - len(owner))
    owner_T, order_T = torch.tensor(owner), torch.arange(len(ids))
    visible_TT = (owner_T == owner_T[:, None]) | (owner_T == -1)
    mask_TT = torch.zeros(len(ids), len(ids)).masked_fill(
        ~(visible_TT & (order_T <= order_T[:, None])), torch.finfo(torch.float32).min
    )
    tensors = (
        torch.tensor(ids),
        torch.tensor(positions),
        mask_TT,
        torch.tensor(keep),
        torch.tensor(labels),
        torch.tensor(columns),
    )
    lengths = torch.tensor([float(len(examples[index].response)) for index in group])
    return PackedExamples(tuple(group), *(tensor.to(device) for tensor in (*tensors, lengths)))
