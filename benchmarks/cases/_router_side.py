"""What the router cases run: our mixtures, and PEFT's LoRA and X-LoRA with the same experts."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import models
import torch
from peft_side import peft_model
from registry import Check, Measured, Settings
from timing import Timing, interleaved

import compose
from compose.adapter import Adapter
from compose.bank import Bank
from compose.engine.generate import generate_tokens
from compose.formats.peft import write_adapter
from compose.routers.builder import build
from compose.routers.presets.registry import preset
from compose.routers.selectors.top_k import TopK

Batch = dict[str, torch.Tensor]
KINDS: dict[str, dict[str, Any]] = {
    "xlora": {"name": "xlora"},
    "xlora_layerwise": {"name": "xlora_layerwise"},
    "dense": {"name": "molora", "train": "router"},
    "dense_both": {"name": "molora", "train": "both"},
    "top2": {"name": "molora", "train": "router", "select": TopK(k=2), "renormalise": "sum"},
    "top2_both": {"name": "molora", "train": "both", "select": TopK(k=2), "renormalise": "sum"},
}


def random_batch(name: str, rows: int, tokens: int) -> dict[str, torch.Tensor]:
    """Random tokens, their own labels."""
    vocab = models.MODELS[name].config["vocab_size"]
    ids = torch.randint(3, vocab, (rows, tokens), generator=torch.Generator().manual_seed(1))
    return {"input_ids": ids, "labels": ids}


def ratio(
    what: str, ours: Callable[[], object], lora: Callable[[], object], target: float | None, settings: Settings
) -> Measured:
    """Time ours against PEFT's LoRA; without a target the ratio is only told, as that of the medians always is.

    Where rounds differ by a third, the fastest of the two may belong to other states of the machine.
    """
    rounds = settings.rounds or (1 if settings.quick else 5)
    mine, theirs = interleaved(ours, lora, device=settings.device, rounds=rounds)
    medians = Check("the same, of medians", mine.median / theirs.median, unit="x")
    return Measured([check_of(what, mine, theirs, target), medians], mine, theirs)


def check_of(what: str, mine: Timing, theirs: Timing, target: float | None) -> Check:
    value = mine.best / theirs.best
    return Check(what, value, unit="x") if target is None else Check(what, value, "<=", target, "x")


def lora_step(name: str, rank: int, batch: Batch, *, generate: int = 0) -> Callable[[], object]:
    """A training step (forward and backward) of PEFT's LoRA; with ``generate`` so many new tokens instead."""
    model = models.build(name)
    wrapped = peft_model(model, models.random_adapters(model, name, 1, rank))
    if generate:
        return lambda: _generate(wrapped, batch["input_ids"], generate)
    for parameter_name, parameter in wrapped.named_parameters():
        parameter.requires_grad_("lora_" in parameter_name)
    wrapped.train()
    return lambda: _backward(wrapped, batch)


def _backward(model: Any, batch: Batch) -> None:
    model(**batch, use_cache=False).loss.backward()
    for parameter in model.parameters():
        parameter.grad = None


@torch.no_grad()
def _generate(model: Any, prompt: torch.Tensor, new: int, **options: Any) -> torch.Tensor:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=new, min_new_tokens=new,
            do_sample=False, **options,
        )  # fmt: skip


def saved_megabytes(step: Callable[[], object]) -> float:
    """Megabytes of distinct memory that autograd keeps for one backward pass, parameters not counted."""
    seen: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        step()
    return sum(seen.values()) / 2**20


class Mixtures:
    """One mixture of ours over random experts, and PEFT's X-LoRA with the same experts and classifier."""

    def __init__(self, name: str, kind: str, experts: int, rank: int) -> None:
        self.name, self.kind = name, kind
        model = models.build(name)
        self.adapters = models.random_adapters(model, name, experts, rank)
        spec = preset(**KINDS[kind])
        attached = compose.attach(model, Bank.from_adapters(self.adapters), trainable=spec.trains_experts)
        self.routed = build(attached, spec, seed=0).train()

    def step(self, batch: Batch) -> None:
        """Forward and backward."""
        _backward(self.routed, batch)

    @torch.no_grad()
    def forward(self, batch: Batch) -> torch.Tensor:
        """Forward alone."""
        return self.routed(input_ids=batch["input_ids"], use_cache=False).logits

    def generate(self, prompt: torch.Tensor, new: int) -> list[list[int]]:
        """Greedy generation with caches, as users call it."""
        return self.routed.eval().generate(prompt, max_new_tokens=new, stop_ids=[])

    def generate_bare(self, prompt: torch.Tensor, new: int, times: int) -> None:
        """Ours without adapters and router, several times."""
        for _ in range(times):
            generate_tokens(self.bare, prompt.tolist(), max_new_tokens=new, stop_ids=[])

    @cached_property
    def bare(self) -> Any:
        """The model alone."""
        return models.build(self.name).eval()

    @torch.no_grad()
    def check_bare(self) -> None:
        """It is what the mixture stands on."""
        ids = torch.arange(3, 15).view(2, 6)
        with self.routed.disable():
            ours = self.routed.model(input_ids=ids).logits
        torch.testing.assert_close(ours, self.bare(input_ids=ids).logits)

    @cached_property
    def peft(self) -> Any:
        """PEFT's X-LoRA with our classifier."""
        from peft import XLoraConfig, get_peft_model

        model = models.build(self.name)
        model.config.use_cache = False
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            paths = {}
            for number, adapter in enumerate(self.adapters):
                paths[str(number)] = str(Path(folder) / f"expert-{number}")
                write_adapter(adapter, paths[str(number)])
            config = XLoraConfig(
                task_type="CAUSAL_LM", hidden_size=model.config.hidden_size, adapters=paths,
                layerwise_scalings=self.kind == "xlora_layerwise",
            )  # fmt: skip
            wrapped = get_peft_model(model, config)
        (last,) = [layer for layer in wrapped.base_model.internal_xlora_classifier.layers if hasattr(layer, "weight")]
        gates = [self.routed.router.site(name).gate.layers[-1] for name in self.routed.router.layout]
        with torch.no_grad():
            last.weight.copy_(torch.cat([gate.weight for gate in gates]))
            last.bias.copy_(torch.cat([gate.bias for gate in gates]))
        return wrapped.train()

    def peft_step(self, batch: Batch) -> None:
        """Forward and backward of PEFT's X-LoRA."""
        _backward(self.peft, batch)

    def peft_generate(self, prompt: torch.Tensor, new: int) -> torch.Tensor:
        """Greedy generation of PEFT's X-LoRA, which has no cache."""
        return _generate(self.peft.eval(), prompt, new)

    def check(self, batch: Batch | None) -> None:
        """X-LoRA gives PEFT's logits; other routers give those of a loop over experts."""
        ids = torch.arange(3, 15).view(2, 6) if batch is None else batch["input_ids"][:2, :6]
        self.routed.eval()
        if self.kind.startswith("xlora"):
            with torch.no_grad():
                theirs = self.peft.eval()(input_ids=ids).logits
            torch.testing.assert_close(self.forward({"input_ids": ids}), theirs, atol=1e-5, rtol=1e-5)
            self.peft.train()
        else:
            slow = _naive(models.build(self.name), self.adapters, self.routed, 2 if "top2" in self.kind else None)
            with torch.no_grad():
                wanted = slow(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(self.forward({"input_ids": ids}), wanted, atol=1e-4, rtol=1e-4)
        self.routed.train()


def _naive(model: Any, adapters: Sequence[Adapter], routed: Any, k: int | None) -> Any:
    """``model`` with every target computing its mixture expert by expert, gates and all."""
    for name, site in routed.router.layout.items():
        parent, _, leaf = site.leader.rpartition(".")
        updates = [adapter.targets[site.leader] for adapter in adapters]
        weight_ED = routed.router.site(name).gate.weight_ED.detach()
        setattr(
            model.get_submodule(parent), leaf, _NaiveMixture(model.get_submodule(site.leader), updates, weight_ED, k)
        )
    return model


class _NaiveMixture(torch.nn.Module):
    def __init__(self, base: torch.nn.Module, updates: list[Any], weight_ED: torch.Tensor, k: int | None) -> None:
        super().__init__()
        self.base, self.updates, self.weight_ED, self.k = base, updates, weight_ED, k

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        gates = torch.softmax(x @ self.weight_ED.T, dim=-1)
        if self.k is not None:
            gates = gates * (gates >= gates.topk(self.k, dim=-1).values[..., -1:])
            gates = gates / gates.sum(-1, keepdim=True)
        y = self.base(x)
        for place, update in enumerate(self.updates):
            y = y + gates[..., place : place + 1] * (x @ update.delta().T)
        return y
