"""The mixtures that the router study trains on the demo: which preset, over which experts, at which rate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from compose.routers.gates.linear import LinearGate


@dataclass(frozen=True, kw_only=True)
class Contender:
    """One row of the study's table.

    Attributes:
        preset: Of `compose.routers.PRESETS`.
        options: Fields of the mixture that differ from the preset's.
        over_bank: Over the demo's 36 adapters; else over the fresh experts of the preset.
        learning_rate: The highest; falls linearly.
        told: What it knows of a test item that others do not: ``""``, ``"the task"``.
        prepare: Made of the training records before or instead of training: ``"phatgoose"``, ``"calibrate"``,
            ``"clusters"``.
        chance: Whether it depends on the seed.
    """

    preset: str
    options: Mapping[str, Any] = field(default_factory=dict)
    over_bank: bool = True
    learning_rate: float = 3e-3
    told: str = ""
    prepare: str = ""
    chance: bool = True


ROUTER = {"train": "router"}
ONE_GATE = {"site": "model", "gate_input": "first_pass", "gate": LinearGate(bias=True, layer_norm=True)}

CONTENDERS: dict[str, Contender] = {
    "xlora_prompt": Contender(preset="xlora_prompt", learning_rate=1e-2),
    "moa, one gate": Contender(preset="moa", options=ONE_GATE, learning_rate=1e-1),
    "moelora_task": Contender(preset="moelora_task", options=ROUTER, told="the task", learning_rate=1e-2),
    "meteora": Contender(preset="meteora"),
    "xlora": Contender(preset="xlora"),
    "xlora, one gate per target": Contender(preset="xlora_layerwise"),
    "lora_flow": Contender(preset="lora_flow"),
    "molora": Contender(preset="molora", options=ROUTER),
    "mola": Contender(preset="mola", options=ROUTER),
    "arrow": Contender(preset="arrow", chance=False),
    "spectr": Contender(preset="spectr", chance=False),
    "avg_act": Contender(preset="avg_act", prepare="calibrate", chance=False),
    "phatgoose": Contender(preset="phatgoose", prepare="phatgoose", chance=False),
    "molora, fresh experts": Contender(preset="molora", over_bank=False),
    "mola, fresh experts": Contender(preset="mola", over_bank=False),
    "hydralora, fresh experts": Contender(preset="hydralora", over_bank=False),
    "moelora_task, fresh experts": Contender(preset="moelora_task", over_bank=False, told="the task"),
    "mocle, fresh experts": Contender(preset="mocle", over_bank=False, prepare="clusters"),
    "none_r64": Contender(preset="none_r64", over_bank=False),
}
