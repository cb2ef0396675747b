"""What the baselines need of PEFT: a model with adapters injected, holding the very factors our bank holds."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch

from compose.adapter import Adapter


def peft_state(adapter: Adapter, *, device: str = "cpu") -> dict[str, torch.Tensor]:
    """Return the state dict PEFT would save, scaling left out (PEFT holds it in the configuration)."""
    state = {}
    for path, update in adapter.targets.items():
        state[f"base_model.model.{path}.lora_A.weight"] = update.a.to(device)
        state[f"base_model.model.{path}.lora_B.weight"] = update.b.to(device)
    return state


def peft_config(adapter: Adapter) -> Any:
    """Return the ``LoraConfig`` of an adapter; targets unlike the first one go into its patterns."""
    from peft import LoraConfig

    ranks = {path: update.rank for path, update in adapter.targets.items()}
    alphas = {path: int(update.scaling * update.rank) for path, update in adapter.targets.items()}
    rank, alpha = next(iter(ranks.values())), next(iter(alphas.values()))
    return LoraConfig(
        r=rank, lora_alpha=alpha, target_modules=sorted(_suffixes(adapter)), lora_dropout=0.0, bias="none",
        rank_pattern={path: value for path, value in ranks.items() if value != rank},
        alpha_pattern={path: value for path, value in alphas.items() if value != alpha},
    )  # fmt: skip


def _suffixes(adapter: Adapter) -> set[str]:
    return {path.split(".")[-1] for path in adapter.targets}


def peft_model(model: Any, adapters: Sequence[Adapter], *, device: str = "cpu") -> Any:
    """Inject ``adapters`` into ``model`` through PEFT; return the ``PeftModel`` in evaluation mode, the first active.

    ``autocast_adapter_dtype`` is off, so factors keep the model's dtype: the baseline casts nothing in its forward.
    """
    from peft import get_peft_model, set_peft_model_state_dict

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = get_peft_model(
            model, peft_config(adapters[0]), adapter_name=adapters[0].name, autocast_adapter_dtype=False
        )
        for adapter in adapters[1:]:
            wrapped.add_adapter(adapter.name, peft_config(adapter), autocast_adapter_dtype=False)
        dtype = next(iter(model.parameters())).dtype
        for adapter in adapters:
            state = {key: value.to(dtype) for key, value in peft_state(adapter, device=device).items()}
            check_load(set_peft_model_state_dict(wrapped, state, adapter_name=adapter.name))
    wrapped.set_adapter(adapters[0].name)
    for parameter in wrapped.parameters():
        parameter.requires_grad_(False)
    return wrapped.to(device).eval()


def check_load(result: Any) -> None:
    """Raise when PEFT did not know a key: the baseline would then run with random factors."""
    if result.unexpected_keys:
        raise AssertionError(f"PEFT did not take {result.unexpected_keys[:3]}")
