"""Twelve small inputs that announce, or unfold to, more memory than there is; run under a limit of 2 GiB."""

from __future__ import annotations

import json
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from compose.adapter import Adapter, LowRank
from compose.formats.compeft import WEIGHTS_NAME as COMPEFT_NAME
from compose.formats.compeft import compeft_files
from tests.hostile.adapters import CONFIG, CONFIG_NAME, PICKLE_NAME, WEIGHTS_NAME, files_of, lora_tensors, raw, write
from tests.hostile.figures import Figures
from tests.hostile.handmade import Case
from tests.hostile.handmade_pickles import stride_zero
from tests.hostile.handmade_safetensors import SAFETENSORS
from tests.hostile.ingesting import add_pickled
from tests.hostile.loading import load
from tests.hostile.recipes import merge_recipe

LIMIT = 2 * 2**30
MOST_BYTES = 64 * 2**20

Make = Callable[[Path], Path]


def run(folder: Path) -> Figures:
    """Open every bomb in this process, its address space limited; each must be refused, and little allocated."""
    figures = Figures("S7")
    load(write(folder / "sound", files_of(lora_tensors())))
    paths = {}
    for number, case in enumerate(BOMBS):
        place = folder / str(number)
        place.mkdir()
        paths[case.name] = case.make(place)
    resource.setrlimit(resource.RLIMIT_AS, (LIMIT, LIMIT))
    for case in BOMBS:
        error = figures.case(case.name, lambda case=case: case.run(paths[case.name]), memory=True)  # type: ignore[misc]
        if error is None:
            figures.other.append(f"{case.name}: accepted")
    return figures


def _same(name: str) -> Make:
    """One of the handmade weight files."""
    return next(case.make for case in SAFETENSORS if case.name == name)


def _rank(rank: int) -> Make:
    return lambda folder: write(folder, files_of(lora_tensors(), r=rank))


def _lists(folder: Path) -> Path:
    """16 MB of empty lists: parsed, they take 600."""
    return write(folder, {**files_of(lora_tensors()), WEIGHTS_NAME: raw(b'{"a":[' + b"[]," * 5_000_000 + b"[]]}")})


def _lokr(size: int) -> Make:
    """W1 whole and W2 a product: exact factors of rank ``size`` between ``size ** 2`` inputs and outputs."""

    def make(folder: Path) -> Path:
        path = "base_model.model.m.layers.0.q"
        tensors = {
            f"{path}.lokr_w1": torch.ones(size, size),
            f"{path}.lokr_w2_a": torch.ones(size, 1),
            f"{path}.lokr_w2_b": torch.ones(1, size),
        }
        config = {**CONFIG, "peft_type": "LOKR", "r": 1, "alpha": 1, "target_modules": ["q"]}
        config.pop("lora_alpha")
        return write(folder, {CONFIG_NAME: json.dumps(config).encode(), WEIGHTS_NAME: safetensors.torch.save(tensors)})

    return make


def _compeft(folder: Path) -> Path:
    """Zeros, of which a quarter of a megabyte may announce 2 GB."""
    update = LowRank(torch.zeros(2, 6), torch.zeros(5, 2), 1.0)
    files = dict(compeft_files(Adapter("x", "toy", {"m.layers.0.q": update})))
    import struct
    import zlib

    names = [f"base_model.model.m.layers.0.q.lora_{half}.weight" for half in "AB"]
    filler = "base_model.model.m.filler.weight"
    table: dict[str, list[Any]] = {
        names[0]: ["F32", [2, 250_000_000], 0, 0, 0, 0],
        names[1]: ["F32", [5, 2], 0, 0, 0, 0],
        filler: ["F32", [65_536]],
    }
    packed = zlib.compress(json.dumps(table).encode())
    stream = packed + bytes(4 * 65_536)
    header = {
        "__metadata__": {"compeft": f"1 {len(packed)}"},
        "stream": {"dtype": "U8", "shape": [len(stream)], "data_offsets": [0, len(stream)]},
    }
    text = json.dumps(header).encode()
    config = json.loads(files["compeft_config.json"])
    config.update(modules_to_save=["filler"])
    files["compeft_config.json"] = json.dumps(config).encode()
    files[COMPEFT_NAME] = struct.pack("<Q", len(text)) + text + stream
    return write(folder, files)


def _sparse(folder: Path) -> Path:
    """A file of 1.9 GiB that takes no place on the disk: one row of A, and nothing but holes."""
    inner = 500_000_000
    header = {
        f"base_model.model.m.layers.0.q.lora_{half}.weight": {
            "dtype": "F32",
            "shape": shape,
            "data_offsets": offsets,
        }
        for half, shape, offsets in (("A", [1, inner], [0, 4 * inner]), ("B", [1, 1], [4 * inner, 4 * inner + 4]))
    }
    files = files_of(lora_tensors(), r=1, target_modules=["q"])
    write(folder, {**files, WEIGHTS_NAME: raw(header)})
    with (folder / WEIGHTS_NAME).open("r+b") as stream:
        stream.truncate(stream.seek(0, 2) + 4 * inner + 4)
    return folder


def _pickle(folder: Path) -> Path:
    return write(folder, {CONFIG_NAME: files_of(lora_tensors())[CONFIG_NAME], PICKLE_NAME: stride_zero()})


def _aliases(folder: Path) -> Path:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{level}: &a{level} [{', '.join([f'*a{level - 1}'] * 9)}]" for level in range(1, 12)]
    (folder / "recipe.yaml").write_text("\n".join(lines))
    return folder / "recipe.yaml"


BOMBS = [
    Case("r of 2^31", _rank(2**31), ""),
    Case("r of 65,536 and small weights", _rank(65_536), ""),
    Case("shape (0, 2^62)", _same("shape (0, 2^62)"), ""),
    Case("shape that overflows 64 bits", _same("shape that overflows 64 bits"), ""),
    Case("100,000 tensors", _same("100,000 tensors"), ""),
    Case("a header of 100 MB", _same("header of 100 MB"), ""),
    Case("a header of 5 million empty lists", _lists, ""),
    Case("LoKr whose exact factors take 8 GB", _lokr(1000), ""),
    Case("LoKr whose exact factors take 1.7 GB", _lokr(600), ""),
    Case("ComPEFT zeros of 2 GB in 262 KB", _compeft, ""),
    Case("a sparse file of 2 GB", _sparse, ""),
    Case("a pickled tensor of stride 0 and 10^9 entries", _pickle, "", add_pickled),
]
"""`run` is what each is opened with; none is accepted."""

ALIASES = Case("YAML aliases that expand to 9^11 values", _aliases, "", merge_recipe)
