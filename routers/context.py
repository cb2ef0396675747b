"""RoutingContext: what a router may know about a batch beside hidden states; masks of prompts and padding.

Shape letters: ``B`` rows, ``T`` tokens.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from compose.errors import IncompatibleError


@dataclass(frozen=True)
class RoutingContext:
    """Travels beside the model's inputs; everything is optional and refused with a message where a gate needs it.

    Attributes:
        task_ids: int64 ``(B,)``.
        cluster_ids: int64 ``(B,)``.
        text_embedding: ``(B, D)``: embeddings of the prompts by an external encoder.
        prompt_mask: bool ``(B, T)``: tokens a sequence-level gate may read; tokens behind it are the response. Derived
            from ``labels`` where not given: the tokens before the first labelled one; without labels: all tokens.
        attention_mask: ``(B, T)``: 0 for padding.
        labels: int64 ``(B, T)``: the model's labels, -100 where nothing is predicted.
        expert_labels: int64 ``(B,)`` or ``(B, T)``: the expert a decision should name, -1 for none.
        lag: How many places before its label a decision stands: 1 where token ``t`` predicts token ``t + 1``.
    """

    task_ids: torch.Tensor | None = None
    cluster_ids: torch.Tensor | None = None
    text_embedding: torch.Tensor | None = None
    prompt_mask: torch.Tensor | None = None
    attention_mask: torch.Tensor | None = None
    labels: torch.Tensor | None = None
    expert_labels: torch.Tensor | None = None
    lag: int = 0

    def with_inputs(
        self, attention_mask: torch.Tensor | None, labels: torch.Tensor | None, *, lag: int = 0
    ) -> RoutingContext:
        """Fill in what the model's own inputs tell, where nobody said otherwise."""
        mask = attention_mask if self.attention_mask is None else self.attention_mask
        return replace(self, attention_mask=mask, labels=labels if self.labels is None else self.labels, lag=lag)

    def of_encoder(self) -> RoutingContext:
        """The context for an encoder: labels per token are the decoder's; a row's expert is the one they agree on."""
        given = self.expert_labels
        return replace(self, labels=None, expert_labels=given if given is None or given.dim() == 1 else agreed(given))

    def real(self, rows: int, tokens: int, device: torch.device) -> torch.Tensor:
        """Bool ``(B, T)``: the last ``tokens`` positions, False for padding."""
        if self.attention_mask is None:
            return torch.ones(rows, tokens, dtype=torch.bool, device=device)
        return repeat_rows(self.attention_mask, rows)[:, -tokens:].to(device).bool()

    def prompt(self, rows: int, tokens: int, device: torch.device) -> torch.Tensor:
        """Bool ``(B, T)``: tokens that a sequence-level gate may read.

        Raises:
            IncompatibleError: A row has none: pooling over its response would leak the answer.
        """
        real = self.real(rows, tokens, device)
        if self.prompt_mask is not None:
            mask = _columns(repeat_rows(self.prompt_mask, rows).to(device).bool(), tokens) & real
        elif self.labels is not None and self.labels.dim() == 2 and self.labels.shape[1] == tokens:
            labelled = repeat_rows(self.labels, rows).to(device) != -100
            mask = real & (labelled.cumsum(1) == 0)
        else:
            mask = real
        if not torch.compiler.is_compiling() and not bool(mask.any(1).all()):
            row = int((~mask.any(1)).nonzero()[0])
            raise IncompatibleError(
                f"row {row} has no prompt tokens, so a gate per sequence has nothing to read that is not the answer; "
                "set the labels of prompt tokens to -100 or give prompt_mask"
            )
        return mask

    def response(self, rows: int, tokens: int, device: torch.device) -> torch.Tensor:
        """Bool ``(B, T)``: tokens that predict a label; all real tokens where there are no labels of this length."""
        real = self.real(rows, tokens, device)
        if self.labels is None or self.labels.dim() != 2 or self.labels.shape[1] != tokens:
            return real
        labelled = repeat_rows(self.labels, rows).to(device) != -100
        return real & torch.nn.functional.pad(labelled[:, self.lag :], (0, self.lag))


def padding_of(mask: object, past: int) -> torch.Tensor | None:
    """Which tokens of a forward are real, ``(B, T)``, from the mask the model was given; None where it gives none.

    Masks ``(B, 1, T, S)`` (static caches), bool or added to scores, are read on their diagonal: a token that is no
    padding sees itself.

    Args:
        mask: What stands in for ``attention_mask``.
        past: Tokens in the cache before this forward.

    Raises:
        IncompatibleError: Another kind of mask.
    """
    if mask is None or (isinstance(mask, torch.Tensor) and mask.dim() == 2):
        return mask
    if not isinstance(mask, torch.Tensor) or mask.dim() != 4 or mask.shape[3] < past + mask.shape[2]:
        given = tuple(mask.shape) if isinstance(mask, torch.Tensor) else type(mask).__name__
        raise IncompatibleError(
            f"routers cannot tell padding from an attention mask {given}; give it as (B, T), or say "
            "routed.told(RoutingContext(attention_mask=...)) around the call"
        )
    own = mask[:, 0].diagonal(past, 1, 2)
    return own if own.dtype == torch.bool else own == 0


def _columns(mask_BT: torch.Tensor, tokens: int) -> torch.Tensor:
    """The mask for ``tokens`` columns: tokens that were added behind it are no prompt."""
    missing = tokens - mask_BT.shape[1]
    return torch.nn.functional.pad(mask_BT, (0, missing)) if missing > 0 else mask_BT[:, :tokens]


def agreed(labels_BT: torch.Tensor) -> torch.Tensor:
    """The label of a row whose labelled tokens agree; -1 where they do not or there are none."""
    highest = labels_BT.amax(1)
    lowest = torch.where(labels_BT < 0, highest[:, None], labels_BT).amin(1)
    return torch.where(lowest == highest, highest, -1)


def repeat_rows(values: torch.Tensor, rows: int) -> torch.Tensor:
    """Repeat ``values (B, ...)`` row by row to ``rows``; generate lays out the copies of a row next to each other.

    Raises:
        IncompatibleError: ``rows`` is no multiple of ``B``.
    """
    given = values.shape[0]
    if given == rows:
        return values
    if given == 0 or rows % given:
        raise IncompatibleError(f"the routing context has {given} rows, the batch {rows}; give one entry per row")
    return values.repeat_interleave(rows // given, dim=0)
