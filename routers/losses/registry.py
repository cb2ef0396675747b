"""The registry of auxiliary losses and what they are."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import ClassVar, Literal, Protocol

import torch

from compose.errors import IncompatibleError
from compose.registry import Registry
from compose.routers.routing import Decisions

Over = Literal["real", "response"]
Reduce = Literal["mean", "sum"]
WorldSum = Callable[[torch.Tensor], torch.Tensor]


class AuxLoss(Protocol):
    """A frozen dataclass of options; called with the decisions of one site it returns a float32 scalar.

    Attributes:
        coefficient: Multiplies the value.
        over: ``"real"``: all but padding; ``"response"``: labelled tokens only.
        reduce: Over sites: their mean, or their sum as MoLA's code does.
        needs_inputs: Whether `Decisions.x_ND` and ``stack`` are read.
        needs_labels: Whether expert labels are read.
    """

    @property
    def coefficient(self) -> float: ...  # noqa: D102 - see the class
    @property
    def over(self) -> Over: ...  # noqa: D102
    @property
    def reduce(self) -> Reduce: ...  # noqa: D102
    @property
    def needs_inputs(self) -> bool: ...  # noqa: D102
    @property
    def needs_labels(self) -> bool: ...  # noqa: D102

    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site; ``world_sum`` adds up counts over processes (identity in one)."""


@dataclass(frozen=True, kw_only=True)
class AbstractLoss(ABC):
    """The fields every auxiliary loss has; see `AuxLoss`.

    Laws: only masked-in decisions count; the value is 0, with a graph, where there are none; experts that the site
    lacks take no part, and ``E`` is the number of those it has. Where a loss is made of means over decisions the
    means are those of all processes, and gradients averaged over processes are those of the whole batch.
    """

    needs_inputs: ClassVar[bool] = False
    needs_labels: ClassVar[bool] = False

    coefficient: float = 0.01
    over: Over = "real"
    reduce: Reduce = "mean"

    def __post_init__(self) -> None:
        problems = self.problems()
        if not (math.isfinite(self.coefficient) and self.coefficient >= 0):
            problems.append(f"coefficient must be finite and >= 0, got {self.coefficient}")
        if self.over not in ("real", "response"):
            problems.append(f"over must be real or response, got {self.over!r}")
        if self.reduce not in ("mean", "sum"):
            problems.append(f"reduce must be mean or sum, got {self.reduce!r}")
        if problems:
            raise IncompatibleError(f"{type(self).__name__}: " + "; ".join(problems))

    def problems(self) -> list[str]:
        """What is wrong with the loss's own options."""
        return []

    @abstractmethod
    def __call__(self, decisions: Decisions, world_sum: WorldSum) -> torch.Tensor:
        """Return the loss of one site."""


LOSSES: Registry[type[AuxLoss]] = Registry("auxiliary loss", package="compose.routers.losses")
