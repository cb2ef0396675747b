"""What the router cases run: our mixtures, and PEFT's LoRA and X-LoRA with the same experts."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable
from functools import cached_property
from pathlib import Path
from typing import Any

import models
import torch
from peft_side import peft_model

import compose
from compose.bank import Bank
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

    def generate(self, prompt: torch.Tensor, new: int) -> torch.Tensor:
        """Greedy generation with caches."""
        return _generate(self.routed.eval().model, prompt, new)

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
        """X-LoRA gives PEFT's logits; other routers give those of the slow reference kernels."""
        ids = torch.arange(3, 15).view(2, 6) if batch is None else batch["input_ids"][:2, :6]
        self.routed.eval()
        if self.kind == "xlora":
            with torch.no_grad():
                theirs = self.peft.eval()(input_ids=ids).logits
            torch.testing.assert_close(self.forward({"input_ids": ids}), theirs, atol=1e-5, rtol=1e-5)
            self.peft.train()
        else:
            spec = preset(**KINDS[self.kind])
            model = models.build(self.name)
            bank = Bank.from_adapters(self.adapters)
            attached = compose.attach(model, bank, backend="reference", trainable=spec.trains_experts)
            slow = build(attached, spec, seed=0).eval()
            with torch.no_grad():
                wanted = slow(input_ids=ids, use_cache=False).logits
            torch.testing.assert_close(self.forward({"input_ids": ids}), wanted, atol=1e-4, rtol=1e-4)
        self.routed.train()
