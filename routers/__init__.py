"""Routers: mixtures of LoRA experts over a bank; names resolve on first use."""

from __future__ import annotations

import importlib

_EXPORTS = {
    "FreshExperts": "compose.routers.presets.registry",
    "MixedExample": "compose.routers.records",
    "MixtureSpec": "compose.routers.spec",
    "PRESETS": "compose.routers.presets.registry",
    "Preset": "compose.routers.presets.registry",
    "RoutedModel": "compose.routers.routed",
    "RouterTrainer": "compose.routers.trainer",
    "Routing": "compose.routers.routing",
    "RoutingContext": "compose.routers.context",
    "RoutingMeter": "compose.routers.metrics",
    "RoutingTrace": "compose.routers.trace",
    "Sampling": "compose.routers.sampling",
    "Stage": "compose.routers.stages",
    "TrainResult": "compose.routers.training",
    "TrainSettings": "compose.routers.train_settings",
    "build": "compose.routers.builder",
    "calibrate": "compose.routers.calibration",
    "experts_for": "compose.routers.presets.registry",
    "fresh_experts": "compose.routers.experts",
    "generate_by_step": "compose.routers.text_steps",
    "linear_targets": "compose.routers.experts",
    "load": "compose.routers.saved",
    "prepare": "compose.routers.train_data",
    "preset": "compose.routers.presets.registry",
    "read_mixed": "compose.routers.records",
    "router_collator": "compose.routers.trainer",
    "save": "compose.routers.saved",
    "subtract_general": "compose.routers.general_knowledge",
    "train": "compose.routers.training",
    "train_phatgoose_gates": "compose.routers.phatgoose",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> object:
    """Import a public name from its module on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module 'compose.routers' has no attribute {name!r}")
    return getattr(importlib.import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return list(__all__)
