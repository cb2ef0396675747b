"""The population objective: many coefficient vectors evaluated in one forward of the attached model.

Candidates become rows of the batch, each with its own coefficients; nothing is merged and no weights move.
Shape letters: ``P`` candidates, ``S`` examples, ``N`` candidate adapters, ``G`` groups of targets, ``D = G * N``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from compose.engine.attach import AttachedModel
from compose.engine.coefficients import Coefficients, Combine
from compose.fewshot.losses import response_losses
from compose.fewshot.packed import PackedExamples, pack
from compose.search.objective import Evaluation
from compose.text.encoding import Encoded

GRADIENT_COST = 2.0
"""Forward-equivalents of one candidate's value and gradient: with a frozen base the backward pass computes activation
gradients only, as many multiplications as the forward."""

DEFAULT_TOKENS = 16_384
"""Tokens in one forward unless the caller says otherwise."""

CPU_TOKENS = 2_048
"""Tokens in one forward on a CPU, at most: beyond, activations leave the caches and every candidate costs more (1.5x
at 16,384 tokens, measured with 3M and 35M parameters)."""

CPU_PACKED_TOKENS = 1_024
"""The same for packed examples (12 % less per candidate than at twice as many, measured with the demo model)."""

SPARSE_SHARE = 4
"""Candidates that use at most one in so many adapters are evaluated with sparse coefficients."""


class PopulationObjective:
    """Per-example losses, and gradients, of a population of coefficient vectors.

    Implements ``compose.search.objective.Objective``. Results do not depend on how the population is cut into
    forwards, up to rounding.

    Args:
        attached: The model with the candidate adapters attached (``N = len(attached.bank)``).
        examples: The ``S`` encoded shots.
        combine: ``"outputs"`` or ``"parameters"``.
        groups: Target -> group number for coefficients per adapter and group; ``None`` for one per adapter.
        max_tokens: Tokens (padding included) in one forward; bounds memory. A CPU takes no more than ``CPU_TOKENS``,
            or ``CPU_PACKED_TOKENS``.
    """

    def __init__(
        self,
        attached: AttachedModel,
        examples: Sequence[Encoded],
        *,
        combine: Combine = "outputs",
        groups: Mapping[str, int] | None = None,
        max_tokens: int = DEFAULT_TOKENS,
    ) -> None:
        self._attached = attached
        self._examples = list(examples)
        self._combine = combine
        self._groups = groups
        cpu = attached.model.device.type == "cpu"
        packed_tokens = min(max_tokens, CPU_PACKED_TOKENS) if cpu else max_tokens
        self._packs = pack(attached.model, self._examples, packed_tokens)
        padded_tokens = min(max_tokens, CPU_TOKENS) if cpu else max_tokens
        self._max_tokens = packed_tokens if self._packs else padded_tokens
        self._by_length = sorted(range(len(self._examples)), key=lambda index: (self._examples[index].length, index))

    @property
    def example_weights(self) -> np.ndarray:
        """``(S,)``: every example counts the same."""
        return np.ones(self.num_examples)

    @property
    def differentiable(self) -> bool:
        """Gradients are exact."""
        return True

    @property
    def num_examples(self) -> int:
        """``S``."""
        return len(self._examples)

    @property
    def num_groups(self) -> int:
        """``G``."""
        return 1 if self._groups is None else max(self._groups.values()) + 1

    @property
    def num_adapters(self) -> int:
        """``N``."""
        return len(self._attached.bank)

    def __call__(
        self, weights: np.ndarray, *, gradient: bool = False, example_weights: np.ndarray | None = None
    ) -> Evaluation:
        """Evaluate ``weights (P, D)`` float64.

        Args:
            weights: One coefficient vector per candidate, group by group.
            gradient: Also return the gradient of ``sum_s example_weights[p, s] * loss[p, s]``.
            example_weights: ``(P, S)``; ``None`` weighs every example ``1/S``. A candidate skips examples of weight 0
                in the gradient, not in the losses.
        """
        population = torch.from_numpy(np.ascontiguousarray(weights))
        if example_weights is None:
            example_weights = np.tile(self.example_weights / self.num_examples, (len(weights), 1))
        losses = np.empty((len(weights), self.num_examples))
        gradients = np.zeros_like(weights) if gradient else None
        groups: Sequence[PackedExamples | _PaddedExamples] = self._packs or list(self._padded(len(weights)))
        size = max(1, self._max_tokens // max(rows.num_tokens for rows in groups))
        for start in range(0, len(weights), size):
            candidates = list(range(start, min(start + size, len(weights))))
            selection = None if gradient else self._selection(population[candidates].float())
            for rows in groups:
                place = np.ix_(candidates, rows.examples)
                if gradients is None:
                    losses[place] = self._losses(selection, rows, len(candidates))
                else:
                    pull = torch.from_numpy(np.ascontiguousarray(example_weights[place]))
                    losses[place], pulled = self._losses_and_gradients(population[candidates], rows, pull)
                    gradients[candidates] += pulled
        cost = len(weights) * (GRADIENT_COST if gradient else 1.0)
        return Evaluation(losses=losses, gradients=gradients, cost=cost)

    def _padded(self, population: int) -> Iterator[_PaddedExamples]:
        """Put examples of like length together, as far as the whole population fits into a forward."""
        position = 0
        while position < len(self._by_length):
            examples = [self._by_length[position]]
            for index in self._by_length[position + 1 :]:
                width = self._examples[index].length
                padding = sum(width - self._examples[other].length for other in examples)
                if population * (len(examples) + 1) * width > self._max_tokens or padding * 4 > width * len(examples):
                    break
                examples.append(index)
            position += len(examples)
            yield _PaddedExamples(tuple(examples), [self._examples[index] for index in examples])

    def _losses(
        self, selection: Coefficients | None, rows: PackedExamples | _PaddedExamples, count: int
    ) -> np.ndarray:
        with self._attached.using(selection), torch.no_grad():
            return rows.losses(self._attached.model, count).double().cpu().numpy()

    def _losses_and_gradients(
        self, weights_PD: torch.Tensor, rows: PackedExamples | _PaddedExamples, pull_PS: torch.Tensor
    ) -> tuple[np.ndarray, np.ndarray]:
        device = self._attached.device
        leaf = weights_PD.to(device, torch.float32).requires_grad_()
        with self._attached.using(self._dense(leaf)), torch.enable_grad():
            losses_PS = rows.losses(self._attached.model, len(weights_PD))
            pulled = (losses_PS * pull_PS.to(device, losses_PS.dtype)).sum()
            (gradient_PD,) = torch.autograd.grad(pulled, leaf)
        return losses_PS.detach().double().cpu().numpy(), gradient_PD.double().cpu().numpy()

    def _dense(self, weights_PD: torch.Tensor) -> Coefficients:
        """Coefficients of all adapters, one set per candidate."""
        values_GPN = weights_PD.view(len(weights_PD), self.num_groups, self.num_adapters).transpose(0, 1)
        return Coefficients(values_GPN if self._groups is not None else values_GPN[0], self._combine, self._groups)

    def _selection(self, weights_PD: torch.Tensor) -> Coefficients | None:
        """Sparse coefficients where every candidate uses few adapters: its rank rows suffice, not the whole bank's."""
        used_PN = weights_PD.view(len(weights_PD), self.num_groups, self.num_adapters).ne(0).any(1)
        most = int(used_PN.sum(1).max())
        if most == 0:
            return None
        if most * SPARSE_SHARE > self.num_adapters:
            return self._dense(weights_PD)
        indices_PK = used_PN.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        weights_GPN = weights_PD.view(len(weights_PD), self.num_groups, self.num_adapters).transpose(0, 1)
        values_GPK = weights_GPN.gather(2, indices_PK.expand(self.num_groups, -1, -1))
        values = values_GPK if self._groups is not None else values_GPK[0]
        return Coefficients(values, self._combine, self._groups, indices_PK)


@dataclass(frozen=True)
class _PaddedExamples:
    """Some examples as rows of one batch, padded to the longest; see ``PackedExamples``."""

    examples: tuple[int, ...]
    rows: list[Encoded]

    @property
    def num_tokens(self) -> int:
        """Tokens of one copy, padding included."""
        return len(self.rows) * max(row.length for row in self.rows)

    def losses(self, model: Any, copies: int) -> torch.Tensor:
        """Losses ``(copies, S)``; the engine repeats the coefficients of a copy for its rows."""
        return response_losses(model, self.rows * copies).view(copies, len(self.rows))
