"""Tables of measured block sizes: JSON shipped with the package, and JSON that ``compose.kernels.tune`` wrote here.

A table belongs to one model of GPU. The user's own (in the user's cache folder) comes before the shipped one, and
each is read once per process. A file that cannot be used is passed over with a warning.
"""

from __future__ import annotations

import json
import logging
import math
import os
import re
import tempfile
from collections.abc import Iterable, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch

FORMAT = 1
SHIPPED = Path(__file__).resolve().parent / "tuned"
_REACH = 2.0  # a size may be a quarter to four times the measured one
_SAME_WIDTH = {"float16": "bfloat16"}
_COUNTS = {"splits": 64, "shrink_stages": 12, "expand_stages": 12, "programs": 1 << 16}

logger = logging.getLogger(__name__)

Entry = dict[str, Any]


def cache_folder() -> Path:
    """Where tables of this user lie: below ``XDG_CACHE_HOME``, or ``~/.cache`` without it."""
    home = os.environ.get("XDG_CACHE_HOME")
    return (Path(home) if home else Path.home() / ".cache") / "adapter-compose" / "kernels"


def file_name(device: str) -> str:
    """Of the table of a GPU called ``device``."""
    return re.sub(r"[^a-z0-9]+", "_", device.lower()).strip("_") + ".json"


@lru_cache(maxsize=16)
def load(device: str) -> tuple[Entry, ...]:
    """Entries for a GPU, the user's own first."""
    folders = [SHIPPED]
    try:
        folders.insert(0, cache_folder())
    except RuntimeError as error:  # there is no home folder
        logger.warning("the user's block sizes are not used: %s", error)
    return tuple(entry for folder in folders for entry in read(folder / file_name(device), device))


def read(path: Path, device: str) -> list[Entry]:
    """Entries of one file; none, with a warning, where it does not hold a table for ``device``."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        return []
    except (OSError, UnicodeDecodeError) as error:
        logger.warning("block sizes in %s are not used: %s", path, error)
        return []
    try:
        return _checked(json.loads(text), device)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        logger.warning("block sizes in %s are not used: %s; delete the file or tune again", path, error)
        return []


def _checked(table: Any, device: str) -> list[Entry]:
    """The entries of a parsed file; raises `ValueError` or its like with what is wrong."""
    if table["format"] != FORMAT or table["device"] != device:
        raise ValueError(
            f"it is format {table['format']} for {table['device']!r}, wanted format {FORMAT} for {device!r}"
        )
    if table["triton"] != triton_version():
        logger.info("block sizes for %s were measured with triton %s, this is %s", device, table["triton"],
                    triton_version())  # fmt: skip
    for entry in table["entries"]:
        _check_entry(entry)
    return list(table["entries"])


def _check_entry(entry: Any) -> None:
    """Raise `ValueError` or its like unless an entry can be used for look-ups and its blocks by the kernels."""
    from compose.kernels.packed.tuning import CONFIGS, NUMBERS

    kind, config = entry["kind"], entry["config"]
    fields = CONFIGS[kind].__annotations__
    few = kind == "dense few"
    if set(config) != set(fields) or not all(_is_block(name, value, few) for name, value in config.items()):
        raise ValueError(
            f"an entry of kind {kind!r} has the blocks {config}, wanted {', '.join(fields)} in their ranges"
        )
    given = (entry["exact"], entry["sizes"])
    whole = all(type(one) is int and 0 <= one < 1 << 31 for numbers in given for one in numbers)
    if not whole or 0 in entry["sizes"] or tuple(map(len, given)) != NUMBERS[kind] or type(entry["dtype"]) is not str:
        raise ValueError(f"an entry of kind {kind!r} has the sizes {entry['sizes']} and {entry['exact']}")


def _is_block(name: str, value: Any, few: bool) -> bool:
    """Whether kernels can run with a number; ``few``: numbers of tokens that may decide no order of a sum."""
    if name == "columns_first":
        return type(value) is bool
    if type(value) is not int or value < 1:
        return False
    if name in _COUNTS:
        return value <= _COUNTS[name]
    if value & (value - 1):
        return False
    if name.endswith("_warps"):
        return value <= 16
    return 16 <= value <= (32 if few and name in ("bm", "bm_out") else 1024)


def nearest(
    entries: Iterable[Entry], kind: str, dtype: torch.dtype, exact: tuple[int, ...], sizes: tuple[int, ...]
) -> Mapping[str, Any] | None:
    """The blocks of the entry nearest in size, on a logarithmic scale; None where none is near.

    Args:
        entries: Of `load`; of equally near ones the first counts.
        kind: Must be the entry's.
        dtype: Must be the entry's; float16 takes what bfloat16 has.
        exact: Numbers that must be the entry's.
        sizes: Numbers of which every one must lie within a quarter to four times the entry's.
    """
    name = str(dtype).removeprefix("torch.")
    names = {name, _SAME_WIDTH.get(name, name)}
    best, least = None, math.inf
    for entry in entries:
        if entry["kind"] != kind or entry["dtype"] not in names or tuple(entry["exact"]) != exact:
            continue
        apart = [abs(math.log2(own / given)) for own, given in zip(entry["sizes"], sizes, strict=True)]
        distance = sum(one * one for one in apart)
        if max(apart) <= _REACH and distance < least:
            best, least = entry["config"], distance
    return best


def save(device: str, entries: list[Entry], path: Path | None = None) -> Path:
    """Write entries over those of the same kind, dtype and sizes in a table, the user's own by default; all at once.

    Args:
        device: Name of the GPU.
        entries: Each with ``kind``, ``dtype``, ``exact``, ``sizes``, ``config``, ``us`` and ``candidates``.
        path: Of the file.
    """
    path = cache_folder() / file_name(device) if path is None else path
    kept = {_key(entry): entry for entry in read(path, device)}
    kept.update({_key(entry): entry for entry in entries})
    table = {"format": FORMAT, "device": device, "triton": triton_version(), "torch": torch.__version__}
    lines = ",\n".join("  " + json.dumps(entry) for entry in kept.values())
    text = json.dumps(table)[:-1] + ', "entries": [\n' + lines + "\n]}\n"
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    return path


def _key(entry: Entry) -> tuple[Any, ...]:
    return entry["kind"], entry["dtype"], tuple(entry["exact"]), tuple(entry["sizes"])


@lru_cache(maxsize=1)
def triton_version() -> str:
    """Of the installed Triton; empty without one."""
    from importlib.metadata import PackageNotFoundError, version

    try:
        return version("triton")
    except PackageNotFoundError:
        return ""
