"""Any preset over any tiny model, as its needs demand, with batches that tell it what it wants to know."""

from __future__ import annotations

import re
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from compose.bank import Bank
from compose.engine.attach import attach
from compose.routers.builder import build
from compose.routers.experts import fresh_experts, linear_targets
from compose.routers.gates.proto import Prototypes
from compose.routers.presets.registry import PRESETS, experts_for

TASKS = ("first", "second", "third")
CLUSTERS = 4
TEXT_FEATURES = 6
RANKS = (3, 1, 8, 5)


def told(name: str, rows: int = 3) -> dict[str, torch.Tensor]:
    """What a preset needs to hear beside the model's inputs; see ``Preset.needs``."""
    needs, number = PRESETS[name].needs, torch.arange(rows)
    said = {}
    if "tasks" in needs:
        said["task_ids"] = number % len(TASKS)
    if "clusters" in needs:
        said["cluster_ids"] = (number + 1) % CLUSTERS
    if "text" in needs:
        generator = torch.Generator().manual_seed(7)
        said["text_embedding"] = torch.randn(rows, TEXT_FEATURES, generator=generator)
    if "expert_labels" in needs:
        said["expert_labels"] = number % len(RANKS)
    return said


def batch_of(architecture: str, rows: int = 3, tokens: int = 9, prompt: int = 5) -> dict[str, torch.Tensor]:
    """Prompts and responses, padding on the right of the last row; a class per row for BERT."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 67, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    mask[-1, -2:] = 0
    if architecture == "bert":
        return {"input_ids": ids, "attention_mask": mask, "labels": torch.arange(rows) % 3}
    if architecture == "t5":
        labels = torch.randint(3, 67, (rows, 6), generator=generator)
        labels[-1, -1] = -100
        return {"input_ids": ids, "attention_mask": mask, "labels": labels}
    labels = ids.clone()
    labels[:, :prompt] = -100
    labels[mask == 0] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def awaken(routed, seed: int = 5) -> None:
    """Give experts and gates values as if they had trained: random B, random scores."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in routed.named_parameters():
            scale = {"b_RO": 0.1, "b_ErO": 0.1, "l_EO": 0.3}.get(name.rpartition(".")[2])
            if name.startswith("router."):
                scale = 0.5
            if scale is not None:
                noise = torch.randn(parameter.shape, generator=generator) * scale
                parameter.add_(noise.to(parameter.dtype))


def calibrated(routed, seed: int = 11) -> None:
    """Fill prototypes that a calibration would fill, at random."""
    generator = torch.Generator().manual_seed(seed)
    for gate in (module for module in routed.router.modules() if isinstance(module, Prototypes)):
        for expert in range(len(gate.filled_E)):
            if not gate.filled_E[expert]:
                gate.fill_(expert, torch.randn(gate.prototypes_EPD.shape[1:], generator=generator))


class Presets:
    """Factory of routed models; detaches what it made."""

    def __init__(self, tiny_model, make_experts) -> None:
        self._tiny_model, self._make_experts, self._made = tiny_model, make_experts, []

    def __call__(self, name: str, architecture: str = "llama", *, dtype=None, awake: bool = False, seed=0, **options):
        entry = PRESETS[name]
        model = self._tiny_model(architecture)
        if entry.experts is None:
            bank = self._make_experts(model, RANKS)
        else:
            bank = Bank.from_adapters(experts_for(name, model, seed=seed))
        model = model if dtype is None else model.to(dtype)
        spec = replace(entry.spec, **options)
        attached = attach(model, bank, trainable=spec.trains_experts)
        self._made.append(attached)
        routed = build(
            attached, spec, tasks=TASKS, clusters=CLUSTERS, text_features=TEXT_FEATURES, seed=seed
        ).eval()  # fmt: skip
        calibrated(routed)
        if awake:
            awaken(routed)
        return routed

    def detach(self) -> None:
        """Take all of them off their models."""
        for attached in self._made:
            if attached.active is not None:
                attached.detach()
        self._made.clear()


@pytest.fixture
def routed_preset(tiny_model, make_experts):
    """Return a factory: ``routed_preset("mola", "llama", awake=True)``."""
    presets = Presets(tiny_model, make_experts)
    yield presets
    presets.detach()


@pytest.fixture
def say():
    """Return `told`."""
    return told


@pytest.fixture
def inputs_of():
    """Return `batch_of`."""
    return batch_of


@pytest.fixture
def wake():
    """Return `awaken`."""
    return awaken


class Block(torch.nn.Module):
    """A layer with an attention-like and a feed-forward-like linear layer, one after the other."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attn = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(width, width)})
        self.mlp = torch.nn.ModuleDict({"up_proj": torch.nn.Linear(width, width)})

    def forward(self, hidden_states):
        return self.mlp["up_proj"](torch.tanh(self.attn["q_proj"](hidden_states)))


class Layers(torch.nn.Module):
    """The smallest model that routers work on: blocks in float64, hidden states in and out."""

    def __init__(self, width: int, depth: int) -> None:
        super().__init__()
        self.config = SimpleNamespace(hidden_size=width, is_encoder_decoder=False)
        self.layers = torch.nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, x, attention_mask=None):
        for layer in self.layers:
            x = layer(x)
        return x


UP = "layers.0.mlp.up_proj"


class Small:
    """One routed target in a model of one block, and what is needed to compute it by hand in float64.

    ``y = W x + b + Σ gates_e delta_e x`` with ``x`` the target's input; see `by_hand`.
    """

    def __init__(self, spec, *, experts=4, width=6, rank=2, depth=1, targets=UP, extra=(), **options) -> None:
        torch.manual_seed(4)
        self.model = Layers(width, depth).double()
        adapters = fresh_experts(
            self.model, [name for name in linear_targets(self.model) if re.search(targets, name)],
            num_experts=experts + len(extra), rank=rank, alpha=3.0, init="kaiming_both",
            names=[*(f"e{index}" for index in range(experts)), *extra],
        )  # fmt: skip
        self.bank = Bank.from_adapters(adapters)
        self.attached = attach(self.model, self.bank, trainable=spec.trains_experts)
        self.routed = build(self.attached, spec, **options).eval()
        self.x = torch.randn(2, 5, width, dtype=torch.float64)
        self.inputs: dict[str, torch.Tensor] = {}
        self.outputs: dict[str, torch.Tensor] = {}
        for name, layer in self.attached.layers.items():
            layer.register_forward_hook(self._keep(name))

    def _keep(self, name):
        def hook(module, args, output):
            self.inputs[name], self.outputs[name] = args[0].detach(), output

        return hook

    def run(self, **said):
        """The output of the routed target; see ``inputs`` for what it read."""
        self.routed(x=self.x, **said)
        return self.outputs[UP]

    @property
    def gate(self):
        """The first site's gate network."""
        return next(iter(self.routed.router.gates.values())).gate

    def read(self, target=UP):
        """The target's input, float64."""
        return self.inputs[target]

    def base(self, target=UP):
        """``W x + b``."""
        return self.attached.layers[target].base_layer(self.inputs[target]).detach()

    def deltas(self, target=UP):
        """``delta_e x`` for each expert as it is now: ``(E, B, T, O)``."""
        layer, x = self.attached.layers[target], self.inputs[target]
        parts = []
        for expert, scaling in enumerate(layer.stack.scaling_E.tolist()):
            a, b = layer.stack.factors(expert)
            parts.append(scaling * (x @ a.detach().T) @ b.detach())
        return torch.stack(parts)

    def by_hand(self, gates, target=UP):
        """``W x + b + Σ gates (..., E) delta_e x``."""
        gates = gates.double()
        while gates.dim() < 3:
            gates = gates.unsqueeze(-2)
        return self.base(target) + torch.einsum("bte,ebto->bto", gates.expand(2, 5, -1), self.deltas(target))


@pytest.fixture
def small():
    """Return a factory: ``small(spec, experts=4, ...)``; see `Small`."""
    return Small
