"""L1: one byte of one adapter changes; the lock refuses and names it."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path
from typing import Any

from compose.errors import HubIndexError
from compose.hub_index.lockfile import check_lock, lock_adapter, write_lock
from compose.hub_index.records import AdapterRecord
from compose.hub_index.store import Index

FILES = ("adapter_model.safetensors", "adapter_config.json")


def change_one_byte(folder: Path, adapters: int = 34, seed: int = 0) -> dict[str, Any]:
    """Pin ``adapters``, change one byte of one of them (weights or configuration in turn), check; for each of them."""
    draw = random.Random(seed)
    index = Index.open(folder / "locks.db", create=True)
    names = [f"adapter-{number}" for number in range(adapters)]
    for name in names:
        index.add(_write_adapter(folder, name, draw))
    lock = folder / "compose.lock"
    write_lock(lock, [lock_adapter(index.get(name), index.folder_of(index.get(name))) for name in names])
    counts = dict.fromkeys(("changes", "refused", "named", "others_named", "unchanged_refused"), 0)
    for number, name in enumerate(names):
        path = folder / name / FILES[number % 2]
        data = path.read_bytes()
        place = draw.randrange(len(data))
        path.write_bytes(data[:place] + bytes([data[place] ^ (1 << draw.randrange(8))]) + data[place + 1 :])
        told = _told(lock, index)
        counts["changes"] += 1
        counts["refused"] += told != ""
        counts["named"] += f"adapter {name!r}" in told
        counts["others_named"] += sum(f"adapter {other!r}" in told for other in names if other != name)
        path.write_bytes(data)
    counts["unchanged_refused"] += _told(lock, index) != ""
    index.close()
    return counts


def _told(lock: Path, index: Index) -> str:
    try:
        check_lock(lock, index)
    except HubIndexError as error:
        return str(error)
    return ""


def _write_adapter(folder: Path, name: str, draw: random.Random) -> AdapterRecord:
    (folder / name).mkdir()
    hashes = []
    for file in FILES:
        data = draw.randbytes(2000)
        (folder / name / file).write_bytes(data)
        hashes.append(hashlib.sha256(data).hexdigest())
    return AdapterRecord(name=name, sha256_weights=hashes[0], sha256_config=hashes[1], path=name)
