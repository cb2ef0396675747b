"""Child process of the bank loading case: ``_bank_probe.py ours|peft FOLDER MODEL COUNT``; prints one JSON object.

Fields: CPU seconds (``open_s``, ``stack_s``, ``attach_s``; for PEFT ``total_s``, ``first_s`` mean of the first ten
loads, ``last_s`` the last), ``rss_growth`` and ``peak_growth`` in bytes since the base model stood, ``bytes`` of the
weights on disk. As a script it first has to put the benchmarks on the path, so imports stand inside the functions.
"""

from __future__ import annotations

import gc
import json
import sys
import time
import warnings
from pathlib import Path
from typing import Any


def memory(field: str) -> int:
    """Return ``VmRSS`` or ``VmHWM`` of this process in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))


def ours(model: Any, folders: list[Path]) -> dict[str, float]:
    """Open, stack, attach; a tiny bank goes first, so that imports and first calls are not counted."""
    import models

    import compose
    from compose.bank import Bank

    Bank.from_adapters(models.random_adapters(models.build("llama-tiny"), "llama-tiny", 1, 2)).stacks()
    gc.collect()
    before = memory("VmRSS")
    start = time.process_time()
    bank = Bank.open(folders, base="benchmark")
    opened = time.process_time()
    bank.stacks()
    stacked = time.process_time()
    attached = compose.attach(model, bank)
    end = time.process_time()
    attached.set("adapter-0")
    seconds = {"open_s": opened - start, "stack_s": stacked - opened, "attach_s": end - stacked}
    return {**seconds, "rss_growth": memory("VmRSS") - before, "peak_growth": memory("VmHWM") - before}


def peft(model: Any, folders: list[Path]) -> dict[str, float]:
    """``PeftModel.from_pretrained`` for the first adapter, ``load_adapter`` for the others."""
    from peft import PeftModel

    warnings.simplefilter("ignore")
    before = memory("VmRSS")
    times = []
    wrapped: Any = None
    for folder in folders:
        start = time.process_time()
        if wrapped is None:
            wrapped = PeftModel.from_pretrained(model, str(folder), adapter_name=folder.name)
        else:
            wrapped.load_adapter(str(folder), adapter_name=folder.name)
        times.append(time.process_time() - start)
    first = times[:10]
    return {
        "total_s": sum(times),
        "first_s": sum(first) / len(first),
        "last_s": times[-1],
        "rss_growth": memory("VmRSS") - before,
        "peak_growth": memory("VmHWM") - before,
    }


def measure(side: str, folder: str, name: str, count: int) -> dict[str, float]:
    """Build the base model and measure one side in this process."""
    import models

    folders = [Path(folder) / f"adapter-{number}" for number in range(count)]
    measured = (ours if side == "ours" else peft)(models.build(name), folders)
    on_disk = sum((one / "adapter_model.safetensors").stat().st_size for one in folders)
    return {**measured, "bytes": on_disk}


def main(side: str, folder: str, name: str, count: str) -> None:
    """Run one side and print what was measured."""
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from run import make_compose_importable

    make_compose_importable()
    import torch

    torch.set_num_threads(1)
    print(json.dumps(measure(side, folder, name, int(count))))


if __name__ == "__main__":
    main(*sys.argv[1:])
