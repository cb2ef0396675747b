"""MixtureSpec: a mixture of LoRA experts as orthogonal choices, saved as JSON beside its weights."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from typing import Any, Literal, get_args

from compose.errors import IncompatibleError
from compose.routers.component import Component, describe, from_description
from compose.routers.gates.linear import LinearGate
from compose.routers.losses.registry import LOSSES, AuxLoss
from compose.routers.normalisations.softmax import Softmax
from compose.routers.pooling import Pooling
from compose.routers.selectors.every import All
from compose.routers.sites import SITE_KINDS, SiteKind
from compose.routers.steps import GATES, NORMALISATIONS, SELECTORS

Scope = Literal["static", "task", "sequence", "token", "step"]
GateInput = Literal[
    "none", "task_id", "cluster_id", "text", "embeddings", "first_pass", "tap", "block", "layer", "ranks", "outputs"
]
Renormalise = Literal["none", "sum", "softmax", "softmax_probs"]
Post = Literal["none", "bias", "scale"]
Structure = Literal["lora", "shared_a", "ia3", "ffn"]
Missing = Literal["mask", "zero"]
Trains = Literal["none", "router", "experts", "both"]


@dataclass(frozen=True, kw_only=True)
class MixtureSpec:
    """Who mixes, where, how often, from what, and what trains. Fields name the components of the papers.

    ``y = W x + Σ_e g_e s_e B_e A_e x`` (outputs) or ``y = W x + (Σ_e g_e B_e)(Σ_e g_e A_e) x`` (parameters).

    Attributes:
        preset: The preset it was made from, ``""`` for a combination of one's own.
        site: Where gates live; see `compose.routers.sites`.
        scope: How often gates change.
        gate_input: What the gate reads: nothing; the row's task, cluster or text embedding; hidden states that enter
            the first block (``embeddings``); the last hidden states of a pass of the bare base model (``first_pass``,
            two passes); the input of one target in such a pass (``tap``); hidden states that enter the block; the
            input of the site's first target (``layer``), or what that target's experts make of it: rank activations
            (``ranks``) or outputs (``outputs``), for gates that compute those from the input and the factors.
        pooling: How hidden states become one vector per sequence (`compose.routers.pooling`); only prompt tokens are
            read. With gates per token: of the prompt's embeddings or base pass, for gate networks that read them too
            (``blend``, ``prompt_mlp``); for those also ``mean_std``.
        tap: Regular expression for the target that ``tap`` reads: the last one that contains it.
        gate: Gate network; None for mixtures without one.
        normalise: Scores to probabilities.
        select: Who takes part.
        renormalise: After selection: nothing, division by the sum, softmax of the selected scores, or softmax of the
            selected probabilities (a double softmax that some published code computes).
        post: A learned bias added, or a learned scale multiplied, per site and expert, after renormalisation.
        post_init: Initial value(s) of ``post``; one number for all, or one per expert.
        gate_power: Exponent of the gates after that; 2 is what MoCLE's code computes.
        global_scale: Multiplies all gates.
        combine: What is mixed; two different functions.
        structure: What an expert is: low-rank factors; factors with one shared A (HydraLoRA); an output vector (IA3);
            a whole feed-forward part whose linears carry its factors (``ffn``, MixLoRA).
        splits: Blocks of the widths that are mixed apart, with parameters combined (MHR).
        targets: Regular expression that a target's path must contain to be routed. Others get no adapter.
        always_on: Experts outside the gates, added at full strength.
        universal: ``"none"``, or ``"complement"``: always-on experts get ``1 - max g`` (MoCLE).
        subtract_start: Subtract the mean of the experts' updates as they were at the start (kept frozen beside the
            trained ones), for experts that start as parts of the base weight (GOAT). The base itself is not edited.
        missing: An expert without factors at a target is masked and the rest renormalised, or contributes zero.
        losses: Auxiliary losses, added to the model's loss.
        train: What trains.
        expert_grad: ``"sqrt_gate"``: the experts' gradient carries the gate's square root (arXiv:2502.15828).
        noise: Standard deviation of noise on the scores, in training.
        expert_dropout: Probability that an expert is masked for a decision, in training.
        capacity: Factor of the even share of decisions an expert may take, in training; None: no limit.
        departures: Where it differs from its paper, in words.
    """

    preset: str = ""
    site: SiteKind = "linear"
    scope: Scope = "token"
    gate_input: GateInput = "layer"
    pooling: Pooling = "none"
    tap: str = ""
    gate: Component | None = field(default_factory=LinearGate)
    normalise: Component = field(default_factory=Softmax)
    select: Component = field(default_factory=All)
    renormalise: Renormalise = "none"
    post: Post = "none"
    post_init: float | tuple[float, ...] = 0.0
    gate_power: int = 1
    global_scale: float = 1.0
    combine: Literal["outputs", "parameters"] = "outputs"
    structure: Structure = "lora"
    splits: int = 1
    targets: str = ""
    always_on: tuple[str, ...] = ()
    universal: Literal["none", "complement"] = "none"
    subtract_start: bool = False
    missing: Missing = "mask"
    losses: tuple[AuxLoss, ...] = ()
    train: Trains = "router"
    expert_grad: Literal["plain", "sqrt_gate"] = "plain"
    noise: float = 0.0
    expert_dropout: float = 0.0
    capacity: float | None = None
    departures: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        problems = [*_choices(self), *_contradictions(self)]
        if problems:
            raise IncompatibleError(f"this mixture {self.preset!r} is not possible:\n  " + "\n  ".join(problems))

    @property
    def trains_experts(self) -> bool:
        """Whether the experts' factors train."""
        return self.train in ("experts", "both")

    @property
    def trains_router(self) -> bool:
        """Whether the gates train."""
        return self.train in ("router", "both")

    def to_json(self) -> dict[str, Any]:
        """Return the specification as plain values; see `from_json`."""
        plain = {each.name: getattr(self, each.name) for each in fields(self)}
        plain["gate"] = None if self.gate is None else describe(GATES, self.gate)
        plain["normalise"] = describe(NORMALISATIONS, self.normalise)
        plain["select"] = describe(SELECTORS, self.select)
        plain["losses"] = [describe(LOSSES, loss) for loss in self.losses]
        return plain

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> MixtureSpec:
        """Return the specification of `to_json`.

        Raises:
            IncompatibleError: Unknown or contradicting fields.
            UnknownNameError: An unknown component.
        """
        known = {each.name for each in fields(cls)}
        if unknown := sorted(set(plain) - known):
            raise IncompatibleError(f"unknown field {unknown[0]!r} of a mixture; known: {', '.join(sorted(known))}")
        options: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in plain.items()}
        if options.get("gate") is not None:
            options["gate"] = from_description(GATES, options["gate"])
        for key, registry in (("normalise", NORMALISATIONS), ("select", SELECTORS)):
            if key in options:
                options[key] = from_description(registry, options[key])
        options["losses"] = tuple(from_description(LOSSES, loss) for loss in options.get("losses", ()))
        return cls(**options)


_CLOSED = {
    "site": SITE_KINDS,
    "scope": get_args(Scope),
    "gate_input": get_args(GateInput),
    "pooling": get_args(Pooling),
    "renormalise": get_args(Renormalise),
    "post": get_args(Post),
    "combine": ("outputs", "parameters"),
    "structure": get_args(Structure),
    "universal": ("none", "complement"),
    "missing": get_args(Missing),
    "train": get_args(Trains),
    "expert_grad": ("plain", "sqrt_gate"),
}
_PER_ROW = ("task_id", "cluster_id", "text")
_OF_BODY = ("embeddings", "first_pass", "tap")


def _choices(spec: MixtureSpec) -> list[str]:
    problems = [
        f"{name} must be one of {', '.join(allowed)}; got {getattr(spec, name)!r}"
        for name, allowed in _CLOSED.items()
        if getattr(spec, name) not in allowed
    ]
    if spec.splits < 1 or spec.gate_power < 1:
        problems.append(f"splits and gate_power must be at least 1, got {spec.splits}, {spec.gate_power}")
    if not 0 <= spec.expert_dropout < 1:
        problems.append(f"expert_dropout must lie in [0, 1), got {spec.expert_dropout}")
    if spec.noise < 0 or (spec.capacity is not None and spec.capacity <= 0):
        problems.append(f"noise must be >= 0 and capacity > 0, got {spec.noise}, {spec.capacity}")
    for name in ("targets", "tap"):
        try:
            re.compile(getattr(spec, name))
        except re.error as error:
            problems.append(f"{name} is no regular expression: {error}")
    return problems


def _contradictions(spec: MixtureSpec) -> list[str]:
    problems = []
    hidden = spec.gate_input not in (*_PER_ROW, "none")
    if (spec.scope == "static") != (spec.gate_input == "none"):
        problems.append("static gates read nothing (gate_input 'none'), and gates that read nothing are static")
    if spec.scope == "task" and spec.gate_input != "task_id":
        problems.append("gates per task read task_id")
    if spec.gate_input in _PER_ROW and spec.scope not in ("task", "sequence", "step"):
        problems.append(f"{spec.gate_input} says something of a whole row; scope must be task, sequence or step")
    problems += _pooling(spec, hidden)
    if spec.site == "model" and spec.gate_input in ("layer", "block", "ranks", "outputs"):
        problems.append(
            f"a gate for the whole model cannot read {spec.gate_input!r}: layers that ran before had no gate"
        )
    if spec.gate_input in _OF_BODY and spec.scope not in ("token", "sequence"):
        problems.append(f"gates from {spec.gate_input} change per token or sequence")
    problems += _of_experts(spec)
    if spec.gate is None and (spec.scope != "static" or spec.trains_router):
        problems.append("a mixture without a gate network is static and trains no router")
    if (spec.gate_input == "tap") != bool(spec.tap) or (spec.tap and (spec.site, spec.scope) != ("model", "sequence")):
        problems.append("tap names a target for gate_input 'tap', which is for one gate per sequence and model")
    if spec.structure == "ffn" and (spec.site, spec.gate_input) != ("block_part", "layer"):
        problems.append("experts that are feed-forward parts need site 'block_part' and gate_input 'layer'")
    if spec.train == "none" and spec.losses:
        problems.append("auxiliary losses need something that trains")
    return problems


def _of_experts(spec: MixtureSpec) -> list[str]:
    problems = []
    if spec.combine == "parameters" and spec.structure != "lora":
        problems.append("parameters are combined for experts of low-rank factors only")
    if spec.splits > 1 and (spec.combine != "parameters" or spec.scope in ("token", "step") or spec.capacity):
        problems.append("splits are for combined parameters with static, task or sequence gates, without capacity")
    if spec.subtract_start and (spec.structure != "lora" or spec.splits > 1 or spec.combine != "outputs"):
        problems.append("subtract_start is for outputs of low-rank factors")
    return problems


def _pooling(spec: MixtureSpec, hidden: bool) -> list[str]:
    reads_prompt = reads_prompt_too(spec)
    fitting = spec.scope == "token" and spec.gate_input in ("layer", "first_pass") and spec.pooling != "none"
    if reads_prompt and not fitting:
        told = "a gate that reads the prompt too is for gates per token of layer inputs or of a base pass"
        return [f"{told}, with pooling 'mean', 'last' or 'mean_std'"]
    if reads_prompt:
        return []
    if hidden and spec.scope == "sequence" and spec.pooling == "none":
        return ["gates per sequence from hidden states need pooling 'mean' or 'last'"]
    if spec.pooling != "none" and (not hidden or spec.scope != "sequence"):
        return ["pooling is for gates per sequence from hidden states"]
    if spec.pooling == "mean_std":
        return ["pooling 'mean_std' is for gates per token that read the prompt too (blend, prompt_mlp)"]
    return []


def reads_prompt_too(spec: MixtureSpec) -> bool:
    """Whether a gate per token also reads the prompt as one vector."""
    return bool(getattr(spec.gate, "reads_prompt", False))
