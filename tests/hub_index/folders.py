"""Adapter folders to take in: small, sound, and with a base model's name that says where it is from."""

import json
from pathlib import Path

import safetensors.torch
import torch

CONFIG = {
    "peft_type": "LORA",
    "task_type": "CAUSAL_LM",
    "r": 2,
    "lora_alpha": 4,
    "target_modules": ["q", "v"],
    "base_model_name_or_path": "org/toy",
}
CARD = "---\nlicense: mit\ntags: [sums]\n---\n# Sums\n\nAdds numbers.\n"
PREFIX = "base_model.model."


def tensors(seed: int = 0, prefix: str = PREFIX, rank: int = 2) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    found = {}
    for layer in range(2):
        for target in ("q", "v"):
            path = f"{prefix}m.layers.{layer}.{target}"
            found[f"{path}.lora_A.weight"] = torch.randn(rank, 6, generator=generator)
            found[f"{path}.lora_B.weight"] = torch.randn(5, rank, generator=generator)
    return found


def make(folder: Path, seed: int = 0, *, content=None, card: str | None = CARD, metadata=None, **fields) -> Path:
    """Write a PEFT folder; ``content`` replaces its tensors, ``fields`` are of its configuration (None: left out)."""
    folder.mkdir(parents=True)
    config = {key: value for key, value in {**CONFIG, **fields}.items() if value is not None}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    saved = tensors(seed) if content is None else content
    safetensors.torch.save_file(saved, folder / "adapter_model.safetensors", metadata=metadata or {"format": "pt"})
    if card is not None:
        (folder / "README.md").write_text(card)
    return folder
