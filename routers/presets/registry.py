"""Presets: mixtures by the names of their papers, and the experts that those train from scratch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from compose.adapter import Adapter
from compose.errors import IncompatibleError
from compose.registry import Registry
from compose.routers.experts import ExpertInit, fresh_experts
from compose.routers.spec import MixtureSpec


@dataclass(frozen=True, kw_only=True)
class FreshExperts:
    """Experts that a preset trains from scratch; see `compose.routers.experts.fresh_experts`.

    Attributes:
        num_experts: How many, or one number per equal part of the depth.
        rank: Of each.
        alpha: Scaling is ``alpha / rank``.
        init: Of the factors.
        std: Of ``init="normal"``.
    """

    num_experts: int | tuple[int, ...] = 8
    rank: int = 8
    alpha: float = 16.0
    init: ExpertInit = "kaiming"
    std: float = 0.02

    def make(self, model: Any, targets: Sequence[str], *, seed: int = 0) -> list[Adapter]:
        """Return the adapters for ``Bank.from_adapters``."""
        return fresh_experts(
            model, targets, num_experts=self.num_experts, rank=self.rank, alpha=self.alpha, init=self.init,
            std=self.std, seed=seed,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One published mixture.

    Attributes:
        paper: Where it was published (arXiv id), ``""`` for a baseline.
        summary: One line.
        spec: The mixture as published.
        experts: The experts it trains from scratch; None: it works over a bank of trained adapters.
        needs: What it needs beside data: ``"tasks"``, ``"clusters"``, ``"text"``, ``"expert_labels"``, ``"calibration"``.
        limits: What it cannot do, in words; ``""``: nothing.
    """

    paper: str
    summary: str
    spec: MixtureSpec
    experts: FreshExperts | None = None
    needs: tuple[str, ...] = ()
    limits: str = ""
    schedule: tuple[str, ...] = field(default=())


PRESETS: Registry[Preset] = Registry("preset", package="compose.routers.presets")


def preset(name: str, **options: Any) -> MixtureSpec:
    """Return the mixture of a preset, with some fields of `MixtureSpec` replaced.

    Raises:
        UnknownNameError: No such preset.
        IncompatibleError: No such field, or values that contradict each other.
    """
    spec = PRESETS[name].spec
    known = {each.name for each in fields(MixtureSpec)}
    if unknown := sorted(set(options) - known):
        raise IncompatibleError(
            f"preset {name!r} has no option {unknown[0]!r}; options are the fields of a mixture: {', '.join(sorted(known))}"
        )
    return replace(spec, **options)


def enter(name: str) -> Callable[[Callable[[], Preset]], Callable[[], Preset]]:
    """Return a decorator that registers what a function returns under ``name``; the mixture gets the preset's name."""

    def register(make: Callable[[], Preset]) -> Callable[[], Preset]:
        made = make()
        PRESETS.register(name)(replace(made, spec=replace(made.spec, preset=name)))
        return make

    return register
