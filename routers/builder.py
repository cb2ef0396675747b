"""build: a router for an attached model, from a specification.

Shape letters: ``E`` experts.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from compose.errors import IncompatibleError
from compose.kernels.stack import LoraStack
from compose.routers.component import SiteShape
from compose.routers.experts import check_experts
from compose.routers.mixing import Mixer
from compose.routers.pooling import pooled_width
from compose.routers.residual import StartResidual
from compose.routers.routed import RoutedModel
from compose.routers.router import Router
from compose.routers.session import Attached, RoutingSession
from compose.routers.sites import Site, make_sites
from compose.routers.spec import MixtureSpec, reads_prompt_too
from compose.routers.structures import make_structures
from compose.routers.taps import tap_target


def build(
    attached: Attached,
    spec: MixtureSpec,
    *,
    tasks: Sequence[str] = (),
    clusters: int = 0,
    text_features: int = 0,
    targets: Sequence[str] | None = None,
    seed: int = 0,
) -> RoutedModel:
    """Put a router over the bank of an attached model and make it the selection in force.

    Until it is removed the base model's parameters are frozen; what trains is what the specification says.

    Args:
        attached: ``compose.attach(model, bank)``; with ``trainable=True`` where experts train.
        spec: The mixture; presets by name: ``compose.routers.preset``.
        tasks: Names of the tasks, where gates read task ids.
        clusters: Number of clusters, where gates read cluster ids.
        text_features: Width of text embeddings, where gates read them.
        targets: What is routed, in module order, where it is known; None: what the specification's pattern finds.
        seed: Of initial values.

    Returns:
        The model with its router, an ``nn.Module`` to train, run and save.

    Raises:
        IncompatibleError: The bank, the model and the specification do not fit together.
    """
    check_kinds(attached, spec)
    _check(attached, spec, tasks, clusters, text_features)
    targets = _routed_targets(attached, spec) if targets is None else _known_targets(attached, targets)
    layout = make_sites(targets, spec.site)
    generator = torch.Generator().manual_seed(seed)
    numbers = {"num_tasks": len(tasks), "num_clusters": clusters, "text_features": text_features}
    shapes = _shapes(attached, spec, layout, numbers, generator)
    experts = tuple(attached.bank.names)
    router = Router(spec, layout, shapes, experts=experts, tasks=tuple(tasks))
    structures = make_structures(attached, spec, targets, seed=seed)
    device = next(iter(attached.layers.values())).a_RD.device
    residuals = {target: StartResidual(attached.layers[target]) for target in targets if spec.subtract_start}
    session = RoutingSession(attached, router, Mixer(spec, structures, residuals)).to(device)
    return RoutedModel(session, numbers=numbers)


def check_kinds(attached: object, spec: object) -> None:
    """Check that a bank was attached and that a mixture is a specification.

    Raises:
        IncompatibleError: The model itself was given, or a preset's name.
    """
    if not hasattr(attached, "bank"):
        raise IncompatibleError(
            f"a router stands over an attached bank, got {type(attached).__name__}; "
            "call attached = compose.attach(model, bank) first"
        )
    if not isinstance(spec, MixtureSpec):
        raise IncompatibleError(
            f"the mixture must be a MixtureSpec, got {type(spec).__name__} {str(spec)[:40]!r}; "
            "presets by name: compose.routers.preset('xlora')"
        )


def _check(attached: Attached, spec: MixtureSpec, tasks: Sequence[str], clusters: int, text_features: int) -> None:
    check_experts(attached.bank)
    first = next(iter(attached.layers.values()))
    own = isinstance(first.a_RD, torch.nn.Parameter)
    if spec.trains_experts and not own and spec.structure in ("lora", "ffn"):
        raise IncompatibleError(
            f"this mixture trains its experts (train={spec.train!r}): attach the bank with trainable=True"
        )
    needed = {
        "task_id": ("tasks", len(tasks)),
        "cluster_id": ("clusters", clusters),
        "text": ("text_features", text_features),
    }
    if spec.gate_input in needed and not needed[spec.gate_input][1]:
        raise IncompatibleError(f"gates from {spec.gate_input} need build(..., {needed[spec.gate_input][0]}=...)")
    unknown = [name for name in spec.always_on if name not in attached.bank.names]
    if unknown:
        raise IncompatibleError(
            f"always_on names {unknown[0]!r}, which is not in the bank ({', '.join(attached.bank.names)})"
        )


def _routed_targets(attached: Attached, spec: MixtureSpec) -> list[str]:
    """The bank's targets that the pattern names, in module order."""
    pattern = re.compile(spec.targets)
    order = [name for name, _ in attached.model.named_modules(remove_duplicate=False) if name in attached.layers]
    return [target for target in order if pattern.search(target)]


def _known_targets(attached: Attached, targets: Sequence[str]) -> list[str]:
    unknown = [target for target in targets if target not in attached.layers]
    if unknown:
        raise IncompatibleError(f"{unknown[0]!r} is no target of the bank (and {len(unknown) - 1} more are not)")
    return list(targets)


def _shapes(
    attached: Attached,
    spec: MixtureSpec,
    layout: Mapping[str, Site],
    numbers: Mapping[str, int],
    generator: torch.Generator,
) -> dict[str, SiteShape]:
    depth: dict[str, int] = {}
    for site in layout.values():
        depth[site.body] = max(depth.get(site.body, 0), site.layer + 1)
    shapes = {}
    shared: dict[str, torch.nn.Module] = {}
    tapped = attached.layers[tap_target(attached, spec.tap)].stack if spec.tap else None
    for name, site in layout.items():
        stacks = {target: attached.layers[target].stack for target in site.targets}
        shapes[name] = SiteShape(
            name=name,
            layer=site.layer,
            num_layers=depth[site.body],
            in_features=_width(attached, spec, site, stacks, numbers),
            experts=tuple(attached.bank.names),
            available_E=_available(stacks, spec),
            stacks=stacks,
            generator=generator,
            prompt_features=pooled_width(spec.pooling, hidden_size(attached.model)) if reads_prompt_too(spec) else 0,
            shared=shared,
            tapped=tapped,
            **numbers,
        )
        if spec.missing == "mask" and not bool(shapes[name].available_E.any()):
            raise IncompatibleError(f"no expert has factors at {name!r}; leave it out with targets=...")
    return shapes


def _available(stacks: Mapping[str, LoraStack], spec: MixtureSpec) -> torch.Tensor:
    """Experts with factors at any target of a site; all where missing ones count as zero or experts are no factors."""
    ranks = torch.tensor([stack.ranks for stack in stacks.values()])
    if spec.missing == "zero" or spec.structure not in ("lora", "ffn"):
        return torch.ones(ranks.shape[1], dtype=torch.bool)
    return (ranks > 0).any(0)


def _width(
    attached: Attached, spec: MixtureSpec, site: Site, stacks: Mapping[str, LoraStack], numbers: Mapping[str, int]
) -> int:
    stack = stacks[site.leader]
    if spec.gate_input in ("none", "task_id", "cluster_id"):
        return 0
    if spec.gate_input == "tap":
        return int(attached.layers[tap_target(attached, spec.tap)].a_RD.shape[1])
    if spec.gate_input == "text":
        return numbers["text_features"]
    if spec.gate_input == "ranks":
        return stack.num_rows
    if spec.gate_input == "outputs":
        return int(stack.b_RO.shape[1])
    from_encoder = spec.scope == "sequence" and getattr(attached.model.config, "is_encoder_decoder", False)
    if spec.gate_input == "layer" and not from_encoder:
        return int(stack.a_RD.shape[1])
    width = hidden_size(attached.model)
    if spec.gate_input == "layer" and stack.a_RD.shape[1] != width:
        raise IncompatibleError(
            f"{site.leader}: in a decoder, gates per sequence read the encoder's states of width {width}, in the "
            f"encoder this layer's input of width {stack.a_RD.shape[1]}; use site='block_part' or leave the target out"
        )
    return width


def hidden_size(model: Any) -> int:
    """Width of the residual stream, from the model's configuration.

    Raises:
        IncompatibleError: It does not say.
    """
    width = getattr(model.config, "hidden_size", None)
    if not isinstance(width, int):
        raise IncompatibleError(f"the configuration of {type(model).__name__} has no hidden_size; gates need it here")
    return width
