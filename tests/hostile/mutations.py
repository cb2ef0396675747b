"""Mutated weight files: bytes of the header, cuts, the length field, the header's structure, and what follows it."""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from compose.formats.compeft import WEIGHTS_NAME as COMPEFT_NAME
from tests.hostile.adapters import SEEDS, WEIGHTS_NAME, parts_of, raw, seed_files, write
from tests.hostile.figures import Figures
from tests.hostile.loading import load

_LENGTHS = (0, 1, 7, 8, 2**16, 2**24, 2**24 + 1, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1)
_NUMBERS = (0, 1, -1, 2, 3, 5, 6, 7, 12, 48, 2**31, 2**32, 2**62, 2**63, 2**64, 10**30, 1.0, 0.5, True, None, "1", [1])
_WORDS = (b"\x00\x00\xc0\x7f", b"\x00\x00\x80\xff", b"\xff\xff\x7f\x7f", b"\xff\x7f\xff\x7f", b"\x00\x7c", b"\x80\x7f")

Mutator = Callable[[bytes, random.Random], bytes]


def run(volume: int, seed: int, folder: Path) -> Figures:
    """Load ``volume`` mutated files, each kind of adapter in turn, and return what became of them."""
    figures = Figures("S2")
    places = {kind: write(folder / kind.replace(" ", "-"), seed_files(kind)) for kind in SEEDS}
    kinds = list(SEEDS)
    for kind in kinds:
        load(places[kind])
    with figures.whole():
        for number in range(volume):
            kind = kinds[number % len(kinds)]
            name = COMPEFT_NAME if COMPEFT_NAME in seed_files(kind) else WEIGHTS_NAME
            draw = random.Random(f"{seed}/{number}")
            (places[kind] / name).write_bytes(mutate(seed_files(kind)[name], draw))
            figures.case(f"{seed}/{number}, {kind}", lambda place=places[kind]: load(place))  # type: ignore[misc]
    return figures


def mutate(weights: bytes, draw: random.Random) -> bytes:
    """Return a sound weight file with one mutation, its kind drawn with the weights of `MUTATORS`."""
    mutator = draw.choices(list(MUTATORS), list(MUTATORS.values()))[0]
    return mutator(weights, draw)


def header_bytes(weights: bytes, draw: random.Random) -> bytes:
    """One to four bytes of the header replaced, a bit of one flipped, or bytes put in or left out."""
    (length,) = struct.unpack("<Q", weights[:8])
    content = bytearray(weights)
    for _ in range(draw.randint(1, 4)):
        at = 8 + draw.randrange(length)
        content[at] = (
            content[at] ^ 1 << draw.randrange(8) if draw.random() < 0.5 else draw.choice(b'"{}[],:0123456789.eE-\\')
        )
    if draw.random() < 0.2:
        at = 8 + draw.randrange(length)
        content[at : at + draw.randint(0, 3)] = draw.randbytes(draw.randint(0, 3))
    return bytes(content)


def truncation(weights: bytes, draw: random.Random) -> bytes:
    """Cut anywhere, or only in what follows the header."""
    (length,) = struct.unpack("<Q", weights[:8])
    return weights[: draw.randrange(0 if draw.random() < 0.5 else 8 + length, len(weights))]


def length_field(weights: bytes, draw: random.Random) -> bytes:
    """Another length of the header: near, at a limit, or anything."""
    (length,) = struct.unpack("<Q", weights[:8])
    near = max(0, length + draw.randint(-9, 9))
    given = draw.choice((near, near, draw.choice(_LENGTHS), draw.getrandbits(64), len(weights) - draw.randint(0, 16)))
    return struct.pack("<Q", given) + weights[8:]


def structure(weights: bytes, draw: random.Random) -> bytes:
    """The header's JSON changed and written again: entries, names, numbers, their order, their nesting."""
    header, data = parts_of(weights)
    for _ in range(draw.randint(1, 3)):
        names = [name for name in header if isinstance(header[name], dict)]
        if names:
            draw.choice(_CHANGES)(header, draw.choice(names), draw)
    text = json.dumps(header).encode()
    if draw.random() < 0.1:
        text = text[:-1] + b"," + text[1:]  # every key twice
    return raw(text, data)


def tail(weights: bytes, draw: random.Random) -> bytes:
    """Bytes appended, or values replaced by NaN, infinity, the largest numbers or anything."""
    (length,) = struct.unpack("<Q", weights[:8])
    if draw.random() < 0.4:
        return weights + (bytes(draw.randint(1, 64)) if draw.random() < 0.5 else draw.randbytes(draw.randint(1, 64)))
    content = bytearray(weights)
    for _ in range(draw.randint(1, 3)):
        word = draw.choice(_WORDS) if draw.random() < 0.5 else draw.randbytes(4)
        at = 8 + length + draw.randrange(0, max(1, len(weights) - 8 - length - 3))
        content[at : at + len(word)] = word
    return bytes(content[: len(weights)])


MUTATORS: Mapping[Mutator, int] = {header_bytes: 40, truncation: 15, length_field: 10, structure: 25, tail: 10}
"""Mutator -> its share in percent."""


def _drop(header: dict[str, Any], name: str, draw: random.Random) -> None:
    del header[name]


def _rename(header: dict[str, Any], name: str, draw: random.Random) -> None:
    changes = (
        lambda: name.replace("lora_A", "lora_B"),
        lambda: name.replace(".weight", ".default.weight"),
        lambda: name.replace("layers.0", f"layers.{draw.choice((1, 10**30, 'x', ''))}"),
        lambda: name + "." + draw.choice(("weight", "bias", "lora_magnitude_vector", "base_layer", "\0", "/..")),
        lambda: name[draw.randrange(len(name)) :],
        lambda: "_orig_mod." * draw.randint(1, 9) + name,
        lambda: "a." * draw.randint(1, 300) + name,
    )
    renamed = draw.choice(changes)()
    header[renamed] = header.pop(name)


def _copy(header: dict[str, Any], name: str, draw: random.Random) -> None:
    header[name.replace("layers.0", "layers.1") + draw.choice(("", "x"))] = dict(header[name])


def _swap(header: dict[str, Any], name: str, draw: random.Random) -> None:
    other = draw.choice(list(header))
    header[name], header[other] = header[other], header[name]


def _number(header: dict[str, Any], name: str, draw: random.Random) -> None:
    values = header[name].get(draw.choice(("shape", "data_offsets")))
    if isinstance(values, list) and values:
        values[draw.randrange(len(values))] = draw.choice(_NUMBERS)


def _reshape(header: dict[str, Any], name: str, draw: random.Random) -> None:
    """The same entries under another shape, which safetensors takes."""
    shape = header[name].get("shape")
    if isinstance(shape, list):
        header[name]["shape"] = draw.choice((shape[::-1], [*shape, 1], [1, *shape], [1] * 7 + shape, shape[:1], []))


def _dtype(header: dict[str, Any], name: str, draw: random.Random) -> None:
    header[name]["dtype"] = draw.choice(("F16", "BF16", "F32", "F64", "I32", "U8", "BOOL", "F8_E5M2", "", 3, None))


def _value(header: dict[str, Any], name: str, draw: random.Random) -> None:
    nested: Any = 1
    for _ in range(draw.randint(0, 200)):
        nested = [nested] if draw.random() < 0.5 else {"a": nested}
    header[name] = draw.choice((nested, [], {}, None, "x" * draw.randint(0, 5000), {**header[name], "more": nested}))


def _metadata(header: dict[str, Any], name: str, draw: random.Random) -> None:
    header["__metadata__"] = draw.choice(
        ({}, None, {"format": 1}, {"a": "x" * draw.randint(0, 5000)}, [], {"compeft": "1 999999"}, {"compeft": "2 1"})
    )


_CHANGES = (_drop, _rename, _rename, _copy, _swap, _number, _number, _reshape, _reshape, _dtype, _value, _metadata)
