"""A small PEFT folder to damage."""

import json

import pytest
import safetensors.torch
import torch

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q", "v"], "base_model_name_or_path": "toy"}


def plain_tensors():
    """Two layers, two targets each, in PEFT's own key style."""
    generator = torch.Generator().manual_seed(0)
    tensors = {}
    for layer in range(2):
        for target in ("q", "v"):
            path = f"base_model.model.m.layers.{layer}.{target}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(2, 6, generator=generator)
            tensors[f"{path}.lora_B.weight"] = torch.randn(5, 2, generator=generator)
    return tensors


@pytest.fixture
def tensors():
    return plain_tensors()


@pytest.fixture
def make_folder(tmp_path):
    """Return a function that writes a PEFT folder: ``make_folder(name, tensors=..., **config fields)``."""

    def make(name="x", tensors=None, **fields):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "adapter_config.json").write_text(json.dumps({**CONFIG, **fields}))
        content = plain_tensors() if tensors is None else tensors
        safetensors.torch.save_file(content, folder / "adapter_model.safetensors", metadata={"format": "pt"})
        return folder

    return make
