"""Pickled weights: exactly the tensors come out, nothing of the pickle runs, and nothing large is allocated."""

import json
import pickle
import sys
import zipfile
from pathlib import Path

import pytest
import safetensors.torch
import torch

from compose.errors import AdapterFormatError, BackendUnavailableError
from compose.formats.peft import read_adapter
from compose.hub_index import unpickle, unpickle_worker
from compose.hub_index.refusals import AdapterRejectedError, code_of

CONFIG = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["q"], "base_model_name_or_path": "toy"}
KEY = "base_model.model.m.layers.0.q."


def plain() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        KEY + "lora_A.weight": torch.randn(2, 6, generator=generator, dtype=torch.bfloat16),
        KEY + "lora_B.weight": torch.randn(5, 2, generator=generator, dtype=torch.bfloat16),
    }


@pytest.fixture
def pickled(tmp_path: Path) -> Path:
    folder = tmp_path / "old"
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG))
    torch.save(plain(), folder / "adapter_model.bin")
    return folder


class Runs:
    """Pickles as a call that makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


def test_the_tensors_come_out_bit_for_bit_and_once(pickled: Path, tmp_path: Path) -> None:
    converted = unpickle.convert_pickled(pickled, tmp_path, tmp_path / "store")
    again = unpickle.convert_pickled(pickled, tmp_path, tmp_path / "store")
    assert converted == again
    saved = safetensors.torch.load_file(converted.folder / "adapter_model.safetensors")
    assert {name: tensor.tolist() for name, tensor in saved.items()} == {
        name: tensor.tolist() for name, tensor in plain().items()
    }
    assert {tensor.dtype for tensor in saved.values()} == {torch.bfloat16}
    assert (converted.folder / "adapter_config.json").read_bytes() == (pickled / "adapter_config.json").read_bytes()
    assert list(read_adapter(converted.folder).targets) == ["m.layers.0.q"]


def test_code_in_a_pickle_does_not_run(pickled: Path, tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    (pickled / "adapter_model.bin").write_bytes(pickle.dumps(Runs(canary)))
    with pytest.raises(
        AdapterRejectedError, match=r"adapter_model.bin: .*; save the adapter as safetensors"
    ) as caught:
        unpickle.convert_pickled(pickled, tmp_path, tmp_path / "store")
    assert code_of(caught.value) == "pickle"
    assert not canary.exists()
    assert not (tmp_path / "store").exists()
    torch.save({KEY + "lora_A.weight": Runs(canary)}, pickled / "adapter_model.bin")
    with pytest.raises(AdapterRejectedError):
        unpickle.convert_pickled(pickled, tmp_path, tmp_path / "store")
    assert not canary.exists()
    torch.load(pickled / "adapter_model.bin", weights_only=False)
    assert canary.exists()  # the file would have


def test_a_tensor_without_storage_is_refused_unread(pickled: Path) -> None:
    torch.save({KEY + "lora_A.weight": torch.zeros(1).expand(2**20, 2**20)}, pickled / "adapter_model.bin")
    with pytest.raises(AdapterFormatError, match=r"says it has 4,398,046,511,104 bytes, its storage has 4$"):
        unpickle_worker.convert((pickled / "adapter_model.bin").read_bytes(), 2**31)


def test_what_is_too_large_is_refused(pickled: Path, tmp_path: Path) -> None:
    size = (pickled / "adapter_model.bin").stat().st_size
    with pytest.raises(AdapterFormatError, match="more than the limit"):
        unpickle.convert_pickled(pickled, tmp_path, tmp_path / "store", max_bytes=size - 1)


@pytest.mark.parametrize("content", [b"", b"\x80", b"PK\x03\x04", b"not a pickle", b"\x80\x02]K\x01a."])
def test_damaged_files_are_refused(content: bytes) -> None:
    with pytest.raises(AdapterFormatError, match="not "):
        unpickle_worker.convert(content, 10**6)


def test_cut_files_are_refused(pickled: Path) -> None:
    data = (pickled / "adapter_model.bin").read_bytes()
    for keep in range(0, len(data), 97):
        with pytest.raises(AdapterFormatError):
            unpickle_worker.convert(data[:keep], 10**6)


def test_a_link_that_leads_out_is_refused(pickled: Path, tmp_path: Path) -> None:
    (tmp_path / "outside.bin").write_bytes((pickled / "adapter_model.bin").read_bytes())
    (pickled / "adapter_model.bin").unlink()
    (pickled / "adapter_model.bin").symlink_to(tmp_path / "outside.bin")
    with pytest.raises(AdapterRejectedError, match="leads out of"):
        unpickle.convert_pickled(pickled, pickled, tmp_path / "store")


def test_an_old_torch_is_not_used(pickled: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.9.1+cpu")
    with pytest.raises(BackendUnavailableError, match=r"CVE-2026-24747\), this is 2.9.1"):
        unpickle.convert_pickled(pickled, tmp_path, tmp_path / "store")


def shared(numel: int) -> torch.Tensor:
    return torch.zeros(4).as_strided((numel,), (0,))


@pytest.mark.parametrize(
    ("found", "message"),
    [
        ([torch.ones(1)], "not a state dict but list"),
        ({}, "0 tensors"),
        ({1: torch.ones(1)}, "not a state dict"),
        ({"a": 1.0}, "a is float and no tensor"),
        ({"a": torch.ones(1).to_sparse()}, "only dense tensors"),
        ({"a": torch.ones(1, dtype=torch.int64)}, "only dense tensors"),
        ({"a": torch.ones(1, device="meta")}, "only dense tensors"),
        ({"a": shared(5)}, "says it has 20 bytes, its storage has 16"),
        ({"a/b": torch.ones(1)}, "tensor name"),
        ({"a": torch.ones(3), "b": torch.ones(3)}, "tensors of more than 20 bytes"),
    ],
)
def test_only_plain_tensors_are_taken(found, message: str) -> None:
    with pytest.raises(AdapterFormatError, match=message):
        unpickle_worker.tensors_of(found, 20)


def test_views_come_out_as_what_they_show() -> None:
    whole = torch.arange(12.0).view(3, 4)
    (tensor,) = unpickle_worker.tensors_of({"a": whole.T[1:3]}, 10**6).values()
    assert tensor.is_contiguous()
    assert tensor.tolist() == whole.T[1:3].tolist()


@pytest.mark.skipif(sys.platform != "linux", reason="address space is bounded on Linux")
def test_memory_is_bounded(pickled: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(unpickle, "_MARGIN", 2**22)
    torch.save({KEY + "lora_A.weight": torch.zeros(2**23)}, pickled / "adapter_model.bin")

    with zipfile.ZipFile(pickled / "adapter_model.bin") as old:
        parts = {name: old.read(name) for name in old.namelist()}
    with zipfile.ZipFile(pickled / "adapter_model.bin", "w", zipfile.ZIP_DEFLATED) as bomb:
        for name, data in parts.items():
            bomb.writestr(name, data)
    assert (pickled / "adapter_model.bin").stat().st_size < 2**18
    with pytest.raises(AdapterRejectedError):
        unpickle.convert_pickled(pickled, tmp_path, tmp_path / "store")
    assert not (tmp_path / "store").exists()
