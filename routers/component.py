"""Components: the parts of a mixture as frozen dataclasses that build a module per site and survive JSON."""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping
from dataclasses import asdict, fields
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn

from compose.errors import IncompatibleError, UnknownNameError
from compose.kernels.stack import LoraStack
from compose.registry import Registry


class SiteShape(NamedTuple):
    """What a component may know about the site it is built for.

    Attributes:
        name: Name of the site: a module path, or ``"model"``.
        layer: Layer number, -1 for a site of the whole model.
        num_layers: Layers of the stack the site belongs to.
        in_features: Width of the gate's input.
        experts: Names of all experts, in the bank's order.
        available_E: bool: which of them exist at this site.
        stacks: Target -> factors, of the site's targets.
        num_tasks: Known tasks; 0 where task ids are not used.
        num_clusters: Known clusters, likewise.
        text_features: Width of text embeddings, 0 where they are not used.
        generator: Source of initial values; draws are in the order of sites.
        prompt_features: Width of the prompt's vector, for gates per token that read it too.
        shared: Modules that sites have in common, by name; a component looks there first and enters what it makes.
        tapped: Factors of the target whose input the gate reads in the base pass; None: it reads none.
    """

    name: str
    layer: int
    num_layers: int
    in_features: int
    experts: tuple[str, ...]
    available_E: torch.Tensor
    stacks: Mapping[str, LoraStack]
    num_tasks: int
    num_clusters: int
    text_features: int
    generator: torch.Generator
    shared: MutableMapping[str, nn.Module] | None = None
    tapped: LoraStack | None = None
    prompt_features: int = 0

    @property
    def num_experts(self) -> int:
        """``E``."""
        return len(self.experts)

    @property
    def read_stack(self) -> LoraStack:
        """Factors of the target whose input the gate reads: the tapped one, or the site's first."""
        return next(iter(self.stacks.values())) if self.tapped is None else self.tapped


class Component(Protocol):
    """A frozen dataclass of options that builds the module computing it at one site."""

    def build(self, shape: SiteShape) -> nn.Module:
        """Return the module for one site."""


def describe(registry: Registry[Any], component: Any) -> dict[str, Any]:
    """Return ``{"name": registered name, **options}``.

    Raises:
        UnknownNameError: The component's class is not registered.
    """
    for name in registry:
        if registry[name] is type(component):
            return {"name": name, **asdict(component)}
    raise UnknownNameError(f"{type(component).__name__} is not a registered {registry.kind}")


def from_description(registry: Registry[Any], description: Mapping[str, Any]) -> Any:
    """Return the component of a description; see `describe`.

    Raises:
        UnknownNameError: No such component.
        IncompatibleError: It has no such option.
    """
    options = dict(description)
    entry = registry[options.pop("name", "")]
    known = {field.name for field in fields(entry)}
    if unknown := sorted(set(options) - known):
        raise IncompatibleError(
            f"{registry.kind} {description['name']!r} has no option {unknown[0]!r}; "
            f"options: {', '.join(sorted(known)) or 'none'}"
        )
    return entry(**{name: tuple(value) if isinstance(value, list) else value for name, value in options.items()})
