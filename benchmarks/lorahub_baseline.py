"""LoRAHub's published procedure, written anew from its description (arXiv:2307.13269) on top of PEFT.

One candidate at a time: every entry of the state dict is summed over the adapters in a Python loop (so A and B factors
are summed apart), the sum is written into the PEFT model, a new ``DataLoader`` is made over the shots, and the model
is run. The loss is the sum over batches of the mean token cross-entropy, divided by the number of examples (so it
depends on the batch size), plus ``0.05 * mean |w|``. The search starts at 0 with bounds 1.5 and 40 evaluations;
nevergrad's NGOpt, which the reference calls, resolves to COBYLA there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from peft import set_peft_model_state_dict
from peft_side import peft_model, peft_state

from compose.adapter import Adapter
from compose.merging.ops import concatenate
from compose.text.encoding import Encoded

BOUND = 1.5
BUDGET = 40
L1 = 0.05


@dataclass
class LoraHub:
    """The procedure, ready to evaluate candidates.

    Attributes:
        model: The PEFT model built from the first adapter; its scaling is used for all.
        states: One state dict per adapter, on the model's device.
        rows: Tokenised shots, padded to one length.
        batch_size: Of the ``DataLoader``; the reference uses 5 for five shots.
    """

    model: Any
    states: list[dict[str, torch.Tensor]]
    rows: list[dict[str, torch.Tensor]]
    batch_size: int = 5

    @classmethod
    def build(cls, model: Any, adapters: Sequence[Adapter], examples: Sequence[Encoded], *, device: str) -> LoraHub:
        """Inject the first adapter and read every state dict; nothing here is timed."""
        dtype = next(iter(model.parameters())).dtype
        states = [
            {key: value.to(dtype) for key, value in peft_state(adapter, device=device).items()} for adapter in adapters
        ]
        encoder_decoder = model.config.is_encoder_decoder
        pad_id = model.config.pad_token_id or 0
        rows = _seq2seq_rows(examples, pad_id) if encoder_decoder else _causal_rows(examples, pad_id)
        return cls(peft_model(model, adapters[:1], device=device), states, rows)

    def merge(self, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        """Return ``sum_i w_i * state_i``, key by key."""
        final: dict[str, torch.Tensor] = {}
        for weight, state in zip(weights, self.states, strict=True):
            for key, value in state.items():
                final[key] = weight * value if key not in final else final[key] + weight * value
        return final

    def loss(self, weights: Sequence[float]) -> float:
        """Evaluate one candidate, without the penalty."""
        final = self.merge(weights)
        set_peft_model_state_dict(self.model, final, adapter_name=self.model.active_adapter)
        device = self.model.device
        total = 0.0
        with torch.no_grad():
            for batch in torch.utils.data.DataLoader(self.rows, batch_size=self.batch_size):  # type: ignore[arg-type]
                total += float(self.model(**{key: value.to(device) for key, value in batch.items()}).loss)
        return total / len(self.rows)

    def score(self, weights: np.ndarray) -> float:
        """Evaluate one candidate: what the reference minimises."""
        return self.loss(weights.tolist()) + L1 * float(np.abs(weights).mean())


@dataclass
class Concatenation(LoraHub):
    """The same procedure for outputs combined: PEFT holds one adapter, the concatenation of all, written anew.

    Attributes:
        owners: Per key of a B factor, the adapter that each column belongs to.
    """

    owners: dict[str, torch.Tensor] = field(default_factory=dict)

    @classmethod
    def build(cls, model: Any, adapters: Sequence[Adapter], examples: Sequence[Encoded], *, device: str) -> LoraHub:
        """Concatenate the adapters at weight 1 and inject the result; nothing here is timed."""
        targets, owners = {}, {}
        for path in dict.fromkeys(path for adapter in adapters for path in adapter.targets):
            present = [(n, adapter.targets[path]) for n, adapter in enumerate(adapters) if path in adapter.targets]
            targets[path] = concatenate([update for _, update in present], [1.0] * len(present))
            columns = [torch.full((update.rank,), n) for n, update in present]
            owners[f"base_model.model.{path}.lora_B.weight"] = torch.cat(columns).to(device)
        built = super().build(model, [Adapter("joined", "benchmark", targets)], examples, device=device)
        return cls(built.model, built.states, built.rows, owners=owners)

    def merge(self, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        """Return the state with every adapter's columns of B at its weight."""
        (state,) = self.states
        first = next(iter(state.values()))
        numbers = torch.tensor(weights, dtype=first.dtype, device=first.device)
        return {
            key: value * numbers[self.owners[key]] if key in self.owners else value for key, value in state.items()
        }


def token_mean(losses: np.ndarray, examples: Sequence[Encoded]) -> np.ndarray:
    """Turn our losses ``(P, S)`` per example into the reference's number for one batch of all shots: ``(P,)``."""
    tokens = np.array([len(example.response) for example in examples], dtype=float)
    return losses @ tokens / tokens.sum() / len(examples)


def _seq2seq_rows(examples: Sequence[Encoded], pad_id: int) -> list[dict[str, torch.Tensor]]:
    width = max(len(example.prompt) for example in examples)
    labels = max(len(example.response) for example in examples)
    rows: list[Mapping[str, list[int]]] = [
        {
            "input_ids": [*example.prompt, *[pad_id] * (width - len(example.prompt))],
            "attention_mask": [1] * len(example.prompt) + [0] * (width - len(example.prompt)),
            "labels": [*example.response, *[-100] * (labels - len(example.response))],
        }
        for example in examples
    ]
    return [{key: torch.tensor(value) for key, value in row.items()} for row in rows]


def _causal_rows(examples: Sequence[Encoded], pad_id: int) -> list[dict[str, torch.Tensor]]:
    width = max(example.length for example in examples)
    rows: list[Mapping[str, list[int]]] = [
        {
            "input_ids": [*example.prompt, *example.response, *[pad_id] * (width - example.length)],
            "attention_mask": [1] * example.length + [0] * (width - example.length),
            "labels": [-100] * len(example.prompt) + [*example.response] + [-100] * (width - example.length),
        }
        for example in examples
    ]
    return [{key: torch.tensor(value) for key, value in row.items()} for row in rows]
