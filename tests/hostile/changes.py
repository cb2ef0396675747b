"""A weight file that changes while it is loaded: truncated, overwritten, replaced or unlinked at four moments."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
import torch

from compose.adapter import Adapter
from compose.bank import Bank
from compose.errors import ComposeError
from compose.files import safetensors_file
from tests.hostile.adapters import WEIGHTS_NAME, Tensors, files_of, lora_tensors, parts_of, weights_of, write
from tests.hostile.figures import Figures

REPEATS = 50


def truncate(path: Path, draw: random.Random) -> None:
    """Cut the file anywhere."""
    os.truncate(path, draw.randrange(path.stat().st_size))


def overwrite(path: Path, draw: random.Random) -> None:
    """Put other values, or anything, in place into the file."""
    content = bytearray(path.read_bytes())
    other = weights_of(_tensors(draw.randrange(1000))) if draw.random() < 0.5 else draw.randbytes(len(content))
    at = draw.randrange(len(content))
    with path.open("r+b") as stream:
        stream.seek(at)
        stream.write(other[at:])


def replace(path: Path, draw: random.Random) -> None:
    """Rename another adapter's file over it."""
    other = path.with_name("other")
    other.write_bytes(weights_of(_tensors(draw.randrange(1000))))
    other.rename(path)


def unlink(path: Path, draw: random.Random) -> None:
    """Remove it."""
    path.unlink()


ACTIONS: tuple[Callable[[Path, random.Random], None], ...] = (truncate, overwrite, replace, unlink)
MOMENTS = ("before it is read", "while it is read", "before it is parsed", "after it is loaded")


def run(repeats: int, folder: Path) -> Figures:
    """Load with every action at every moment, ``repeats`` times each, and return what became of it."""
    figures = Figures("S6")
    with figures.whole():
        for action in ACTIONS:
            for moment in MOMENTS:
                for number in range(repeats):
                    draw = random.Random(f"{action.__name__}/{moment}/{number}")
                    files = files_of(_tensors(number))
                    path = write(folder, files) / WEIGHTS_NAME
                    figures.case(
                        f"{action.__name__} {moment}, {number}",
                        lambda path=path, act=(lambda: action(path, draw)), moment=moment: load(path, act, moment),  # type: ignore[misc]
                    )
                    for left in folder.iterdir():
                        left.unlink()
    return figures


def load(path: Path, act: Callable[[], None], moment: str) -> None:
    """Open, load and use an adapter whose file changes at a moment; refusals pass through.

    Raises:
        AssertionError: A loaded value is not that of the bytes whose hash is recorded, or follows the file.
    """
    header = path.read_bytes()
    bank = Bank.open(path.parent, names=["x"])
    if moment == "before it is read":
        act()
    with _changing(act, moment):
        adapter = bank["x"]
    before = {name: (update.a.clone(), update.b.clone()) for name, update in adapter.targets.items()}
    if moment == "after it is loaded":
        act()
    check_hash(adapter, header)
    for name, (a, b) in before.items():
        assert torch.equal(adapter.targets[name].a, a)
        assert torch.equal(adapter.targets[name].b, b)
    with contextlib.suppress(ComposeError):  # reads again: refused if the bytes are not those of the recorded hash
        for name, stack in bank.stacks().items():
            assert torch.equal(stack.a_RD, before[name][0])
            assert torch.equal(stack.b_RO, before[name][1].T)


def check_hash(adapter: Adapter, original: bytes) -> None:
    """Raise an AssertionError where the values under the header are not bytes of the recorded hash."""
    header, data = parts_of(original)
    values = {}
    for path, update in adapter.targets.items():
        values[f"base_model.model.{path}.lora_A.weight"] = update.a
        values[f"base_model.model.{path}.lora_B.weight"] = update.b
    names = sorted((name for name in header if name in values), key=lambda name: header[name]["data_offsets"])
    rebuilt = original[: len(original) - len(data)] + b"".join(values[name].numpy().tobytes() for name in names)
    assert hashlib.sha256(rebuilt).hexdigest() == adapter.sha256, "values and recorded hash differ"


@contextlib.contextmanager
def _changing(act: Callable[[], None], moment: str) -> Iterator[None]:
    """Act once: between two reads of the file, or between the last read and the parser."""
    waiting = [act]

    def now() -> None:
        if waiting:
            waiting.pop()()

    read, parse = safetensors_file._read_up_to, safetensors.torch.load

    def reading(stream: Any, count: int) -> bytes:
        first = read(stream, count // 2)
        now()
        return first + read(stream, count - len(first))

    def parsing(data: bytes) -> Tensors:
        now()
        return parse(data)

    patches = {
        "while it is read": mock.patch.object(safetensors_file, "_read_up_to", reading),
        "before it is parsed": mock.patch.object(safetensors.torch, "load", parsing),
    }
    with patches.get(moment, contextlib.nullcontext()):
        yield


def _tensors(seed: int) -> Tensors:
    return lora_tensors(seed=seed)
