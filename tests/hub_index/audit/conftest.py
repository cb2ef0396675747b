"""Small adapters as folders, weight files made by hand, and banks of siblings."""

import json
import struct
from pathlib import Path

import pytest
import torch

from compose.adapter import Adapter, LowRank
from compose.formats.peft import write_adapter
from compose.hub_index.audit.evidence import Evidence
from compose.hub_index.audit.rule import run_rules

MODULES = tuple(f"model.layers.{layer}.self_attn.{part}_proj" for layer in range(2) for part in "qv")
CARD = "---\nlicense: apache-2.0\n---\n# An adapter\n"


def low_rank(rank: int, generator: torch.Generator, *, out: int = 12, wide: int = 10, size: float = 1.0) -> LowRank:
    a, b = torch.randn(rank, wide, generator=generator), torch.randn(out, rank, generator=generator)
    return LowRank(a, b * size, 0.5)


def make_adapter(name: str, seed: int, *, rank: int = 3, base: str = "owner/base", size: float = 1.0) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    return Adapter(name, base, {module: low_rank(rank, generator, size=size) for module in MODULES})


@pytest.fixture
def make(tmp_path: Path):
    """Write an adapter as a folder with a card; return the folder."""

    def write(name: str = "one", seed: int = 0, **more) -> Path:
        folder = write_adapter(make_adapter(name, seed, **more), tmp_path / name)
        (folder / "README.md").write_text(CARD)
        return folder

    return write


@pytest.fixture(scope="session")
def sibling():
    """Make an adapter whose singular values fall and whose norm varies a little from one to the next."""

    def build(name: str, seed: int, base: str = "owner/base") -> Adapter:
        generator = torch.Generator().manual_seed(seed)
        size = float(torch.empty(()).normal_(generator=generator).mul(0.2).exp())
        falling = torch.tensor([1.0, 0.5, 0.25])
        targets = {}
        for module in MODULES:
            update = low_rank(3, generator, size=size)
            targets[module] = LowRank(update.a, update.b * falling, update.scaling)
        return Adapter(name, base, targets)

    return build


@pytest.fixture(scope="session")
def siblings(sibling) -> tuple[Adapter, ...]:
    """Thirty adapters of one kind."""
    return tuple(sibling(f"sibling-{seed}", seed) for seed in range(30))


@pytest.fixture
def edit():
    """Change fields of a folder's configuration; None removes one."""

    def change(folder: Path, **fields) -> Path:
        file = folder / "adapter_config.json"
        config = {**json.loads(file.read_text()), **fields}
        file.write_text(json.dumps({key: value for key, value in config.items() if value is not ...}))
        return folder

    return change


@pytest.fixture
def weights():
    """Replace a folder's weight file by one with this header (an object, or its text) and data."""

    def write(folder: Path, header: dict | bytes, data: bytes = b"", *, length: int | None = None) -> Path:
        text = header if isinstance(header, bytes) else json.dumps(header).encode()
        head = struct.pack("<Q", len(text) if length is None else length)
        (folder / "adapter_model.safetensors").write_bytes(head + text + data)
        return folder

    return write


@pytest.fixture
def rules():
    """Return the names of the rules that find something in a folder."""

    def run(folder: Path, **more) -> set[str]:
        return {one.rule for one in run_rules(Evidence(folder, folder.name, **more))}

    return run


@pytest.fixture
def findings():
    """Return the findings of one rule in a folder."""

    def run(folder: Path, rule: str, **more):
        return [one for one in run_rules(Evidence(folder, folder.name, **more)) if one.rule == rule]

    return run
