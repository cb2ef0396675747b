"""The population objective: many coefficient vectors evaluated in one forward of the attached model.

Candidates become rows of the batch, each with its own coefficients; nothing is merged and no weights move.
Shape letters: ``P`` candidates, ``S`` examples, ``N`` candidate adapters, ``G`` groups of targets, ``D = G * N``.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch

from compose.engine.attach import AttachedModel
from compose.engine.coefficients import Coefficients, Combine
from compose.fewshot.encoding import Encoded
from compose.fewshot.losses import response_losses
from compose.search.objective import Evaluation

GRADIENT_COST = 2.0
"""Forward-equivalents of one candidate's value and gradient: with a frozen base the backward pass computes activation
gradients only, as many multiplications as the forward."""

DEFAULT_TOKENS = 16_384
"""Tokens in one forward unless the caller says otherwise."""

CPU_TOKENS = 2_048
"""Tokens in one forward on a CPU, at most: beyond, activations leave the caches and every candidate costs more (1.5x
at 16,384 tokens, measured with 3M and 35M parameters)."""

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
        max_tokens: Tokens (rows times padded length) in one forward; bounds memory. A CPU takes no more than
            ``CPU_TOKENS``.
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
        self._max_tokens = min(max_tokens, CPU_TOKENS) if attached.model.device.type == "cpu" else max_tokens
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
        for candidates, examples in self._chunks(len(weights)):
            chunk = population[candidates]
            pull = torch.from_numpy(np.ascontiguousarray(example_weights[np.ix_(candidates, examples)]))
            chunk_losses, chunk_gradients = self._forward(chunk, examples, pull if gradient else None)
            losses[np.ix_(candidates, examples)] = chunk_losses
            if gradients is not None:
                gradients[candidates] += chunk_gradients
        cost = len(weights) * (GRADIENT_COST if gradient else 1.0)
        return Evaluation(losses=losses, gradients=gradients, cost=cost)

    def _chunks(self, population: int) -> Iterator[tuple[list[int], list[int]]]:
        """Cut candidates x examples into forwards of at most ``max_tokens``, examples of like length together."""
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
            rows = max(1, self._max_tokens // (len(examples) * self._examples[examples[-1]].length))
            for start in range(0, population, rows):
                yield list(range(start, min(start + rows, population))), examples

    def _forward(
        self, weights_PD: torch.Tensor, examples: Sequence[int], pull_PS: torch.Tensor | None
    ) -> tuple[np.ndarray, np.ndarray | None]:
        count, device = len(weights_PD), self._attached.device
        rows = [self._examples[index] for index in examples] * count
        if pull_PS is None:
            with self._attached.using(self._selection(weights_PD.float(), len(examples))), torch.no_grad():
                losses = response_losses(self._attached.model, rows)
            return losses.view(count, len(examples)).double().cpu().numpy(), None
        leaf = weights_PD.to(device, torch.float32).requires_grad_()
        with self._attached.using(self._dense(leaf, len(examples))), torch.enable_grad():
            losses_PS = response_losses(self._attached.model, rows).view(count, len(examples))
            pulled = (losses_PS * pull_PS.to(device, losses_PS.dtype)).sum()
            (gradient_PD,) = torch.autograd.grad(pulled, leaf)
        return losses_PS.detach().double().cpu().numpy(), gradient_PD.double().cpu().numpy()

    def _dense(self, weights_PD: torch.Tensor, repeats: int) -> Coefficients:
        """Coefficients of all adapters, each candidate repeated for its examples."""
        values_GPN = weights_PD.view(len(weights_PD), self.num_groups, self.num_adapters).transpose(0, 1)
        values = values_GPN.repeat_interleave(repeats, dim=1)
        return Coefficients(values if self._groups is not None else values[0], self._combine, self._groups)

    def _selection(self, weights_PD: torch.Tensor, repeats: int) -> Coefficients | None:
        """Sparse coefficients where every candidate uses few adapters: its rank rows suffice, not the whole bank's."""
        used_PN = weights_PD.view(len(weights_PD), self.num_groups, self.num_adapters).ne(0).any(1)
        most = int(used_PN.sum(1).max())
        if most == 0:
            return None
        if most * SPARSE_SHARE > self.num_adapters:
            return self._dense(weights_PD, repeats)
        indices_PK = used_PN.int().argsort(dim=1, descending=True, stable=True)[:, :most]
        weights_GPN = weights_PD.view(len(weights_PD), self.num_groups, self.num_adapters).transpose(0, 1)
        values_GPK = weights_GPN.gather(2, indices_PK.expand(self.num_groups, -1, -1))
        values, indices = values_GPK.repeat_interleave(repeats, dim=1), indices_PK.repeat_interleave(repeats, dim=0)
        return Coefficients(values if self._groups is not None else values[0], self._combine, self._groups, indices)
