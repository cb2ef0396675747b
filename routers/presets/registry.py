"""Presets: mixtures by the names of their papers, and the experts that those train from scratch."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any

from compose.adapter import Adapter
from compose.errors import IncompatibleError
from compose.registry import Registry
from compose.routers.experts import ExpertInit, ScalingRule, fresh_experts, linear_targets
from compose.routers.spec import MixtureSpec


@dataclass(frozen=True, kw_only=True)
class FreshExperts:
    """Experts that a preset trains from scratch; see `compose.routers.experts.fresh_experts`.

    Attributes:
        num_experts: How many behind the gates, or one number per equal part of the depth.
        always_on: Names of further experts, outside the gates (`MixtureSpec.always_on`).
        rank: Of each.
        alpha: See ``scaling``.
        scaling: From alpha and rank.
        init: Of the factors.
        std: Of ``init="normal"``.
    """

    num_experts: int | tuple[int, ...] = 8
    always_on: tuple[str, ...] = ()
    rank: int = 8
    alpha: float = 16.0
    scaling: ScalingRule = "alpha"
    init: ExpertInit = "kaiming"
    std: float = 0.02

    def make(self, model: Any, targets: Sequence[str], *, seed: int = 0) -> list[Adapter]:
        """Return the adapters for ``Bank.from_adapters``; those outside the gates stand last."""
        count, names = self.num_experts, None
        if self.always_on:
            if not isinstance(count, int):
                raise IncompatibleError("experts outside the gates go with one number of experts for all layers")
            names = [*(f"expert_{index}" for index in range(count)), *self.always_on]
            count = len(names)
        return fresh_experts(
            model, targets, num_experts=count, rank=self.rank, alpha=self.alpha, scaling=self.scaling, init=self.init,
            std=self.std, seed=seed, names=names,
        )  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Preset:
    """One published mixture.

    Attributes:
        paper: Where it was published (arXiv id), ``""`` for a baseline.
        summary: One line.
        spec: The mixture as published.
        experts: The experts it trains from scratch; None: it works over a bank of trained adapters.
        needs: What it needs beside data: ``"tasks"``, ``"clusters"``, ``"text"``, ``"expert_labels"`` or
            ``"calibration"``.
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
            f"preset {name!r} has no option {unknown[0]!r}; options are the fields of a mixture: "
            f"{', '.join(sorted(known))}"
        )
    return replace(spec, **options)


def experts_for(name: str, model: Any, targets: Sequence[str] | None = None, *, seed: int = 0) -> list[Adapter]:
    """Return the untrained experts of a preset that trains its own.

    From a model to a routed model::

        bank = Bank.from_adapters(experts_for("mola", model))
        attached = attach(model, bank, trainable=True)
        routed = build(attached, preset("mola"))

    Args:
        name: The preset.
        model: Not attached.
        targets: Paths of linear layers; None: all linear layers of numbered blocks that the preset routes.
        seed: Of the factors' values.

    Raises:
        UnknownNameError: No such preset.
        IncompatibleError: It works over trained experts, or no layer of the model fits.
    """
    entry = PRESETS[name]
    if entry.experts is None:
        raise IncompatibleError(
            f"preset {name!r} works over a bank of trained adapters; it makes no experts of its own"
        )
    if targets is None:
        pattern = re.compile(entry.spec.targets)
        targets = [target for target in linear_targets(model) if pattern.search(target)]
    if not targets:
        raise IncompatibleError(f"the model has no linear layers for preset {name!r} (targets={entry.spec.targets!r})")
    return entry.experts.make(model, targets, seed=seed)


def enter(name: str) -> Callable[[Callable[[], Preset]], Callable[[], Preset]]:
    """Return a decorator that registers what a function returns under ``name``; the mixture gets the preset's name."""

    def register(make: Callable[[], Preset]) -> Callable[[], Preset]:
        made = make()
        PRESETS.register(name)(replace(made, spec=replace(made.spec, preset=name)))
        return make

    return register
