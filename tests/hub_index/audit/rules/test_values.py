"""Values: NaN, overflow, zeros, and files that are not those of the index."""

import torch
from safetensors.torch import load_file, save_file

from compose.hub_index.records import AdapterRecord

FIRST = "model.layers.0.self_attn.q_proj"


def change(folder, part: str, value) -> object:
    file = folder / "adapter_model.safetensors"
    tensors = load_file(file)
    for name in tensors:
        if part in name:
            tensors[name] = value(tensors[name])
    save_file(tensors, file)
    return folder


def test_values_that_are_not_finite_are_counted_per_tensor(make, findings, rules) -> None:
    def spoil(tensor: torch.Tensor) -> torch.Tensor:
        tensor.view(-1)[:2] = torch.tensor([float("nan"), float("-inf")])
        return tensor

    folder = change(make(), f"{FIRST}.lora_B", spoil)
    (found,) = findings(folder, "values.finite")
    assert found.module == FIRST
    assert "2 of 36 values" in found.detail
    assert "config.refused" not in rules(folder)  # headers alone are fine


def test_factors_of_wild_magnitude_overflow_half_precision(make, findings) -> None:
    folder = change(make(), f"{FIRST}.lora_B", lambda tensor: tensor + 1e18)
    assert [one.module for one in findings(folder, "values.overflow")] == [FIRST]


def test_an_adapter_of_zeros_and_a_module_of_zeros(make, rules, findings) -> None:
    assert "values.zero" in rules(change(make("all"), "lora_B", torch.zeros_like))
    assert "values.zero" in rules(change(make("a"), "lora_A", torch.zeros_like))
    folder = change(make("part"), f"{FIRST}.lora_B", torch.zeros_like)
    assert "values.zero" not in rules(folder)
    assert "1 of 4 modules" in findings(folder, "values.zero-part")[0].detail


def test_zeros_are_told_of_files_that_the_loader_refuses(make, edit, rules) -> None:
    folder = edit(change(make(), "lora_B", torch.zeros_like), target_modules=["q_proj"])
    assert {"config.refused", "values.zero"} <= rules(folder)


def test_a_file_that_is_not_that_of_the_index(make, rules) -> None:
    from compose.formats.peft import read_adapter

    folder = make()
    known = AdapterRecord(name="one", sha256_weights=read_adapter(folder).sha256, license="mit")
    assert "values.changed" not in rules(folder, record=known)
    other = AdapterRecord(name="one", sha256_weights="0" * 64, license="mit")
    assert "values.changed" in rules(folder, record=other)
