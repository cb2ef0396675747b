"""Two hundred adapters from disk, ready to run: time in all, time per adapter, memory."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import models
import torch
from peft_side import peft_config, peft_model
from registry import Check, Measured, Point, Settings, case
from timing import Timing

import compose
from cases import _bank_probe
from compose.adapter import Adapter, LowRank
from compose.bank import Bank

PROBE = Path(__file__).with_name("_bank_probe.py")


@case(
    "bank_loading",
    description="rank-8 adapters over an 8.4M Llama (7 targets, 8 layers), from PEFT folders to an attached model",
    baseline="PEFT load_adapter, adapter by adapter (40 of them; 200 with --full)",
    targets="200 adapters opened and stacked in <= 2 s CPU; flat time per adapter; memory <= 1.1x the bytes on disk",
)
def bank_loading(settings: Settings) -> Iterator[Point]:
    """Yield one point per number of adapters; every measurement is a fresh process."""
    name, rank, total = ("llama-tiny", 2, 6) if settings.quick else ("llama-8m", 8, 200)
    with tempfile.TemporaryDirectory(prefix="compose-bench-bank-") as folder:
        model = models.build(name)
        adapters = write_folders(Path(folder), model, name, total, rank)
        few = 3 if settings.quick else 40
        gate = partial(_gate, Path(folder), name, adapters[: min(few, 4)])
        yield Point(f"{few} adapters, ours and PEFT", gate, partial(_against_peft, folder, name, few, settings))
        yield Point(f"{total} adapters, ours", gate, partial(_at_scale, folder, name, total, settings))
        if settings.full:
            yield Point(f"{total} adapters, PEFT too", gate, partial(_against_peft, folder, name, total, settings))


def write_folders(folder: Path, model: Any, name: str, count: int, rank: int) -> list[Adapter]:
    """Write PEFT folders with other values in each, and return the first adapters as values."""
    from safetensors.torch import save_file

    (template,) = models.random_adapters(model, name, 1, rank)
    config = peft_config(template)
    config.inference_mode = True
    adapters = []
    for number in range(count):
        generator = torch.Generator().manual_seed(number)
        targets: dict[str, LowRank] = {}
        state: dict[str, torch.Tensor] = {}
        for path, update in template.targets.items():
            a = torch.empty_like(update.a).normal_(0.0, 0.2, generator=generator)
            b = torch.empty_like(update.b).normal_(0.0, 0.02, generator=generator)
            state |= {f"base_model.model.{path}.lora_A.weight": a, f"base_model.model.{path}.lora_B.weight": b}
            targets[path] = LowRank(a, b, update.scaling)
        one = folder / f"adapter-{number}"
        config.save_pretrained(str(one))
        save_file(state, str(one / "adapter_model.safetensors"), metadata={"format": "pt"})
        if number < 4:
            adapters.append(Adapter(f"adapter-{number}", "", targets))
    return adapters


def _gate(folder: Path, name: str, adapters: list[Adapter]) -> None:
    """The bank read from disk must give PEFT's logits for every one of the first adapters."""
    tokens = torch.randint(3, models.MODELS[name].config["vocab_size"], (2, 7))
    peft = peft_model(models.build(name), adapters)
    bank = Bank.open([folder / adapter.name for adapter in adapters], base="benchmark")
    with torch.no_grad(), compose.attach(models.build(name), bank) as attached:
        for adapter in adapters:
            peft.set_adapter(adapter.name)
            attached.set(adapter.name)
            ours = attached.model(input_ids=tokens).logits
            torch.testing.assert_close(ours, peft(input_ids=tokens).logits, atol=1e-5, rtol=1e-5)


def probe(side: str, folder: str, name: str, count: int, settings: Settings) -> dict[str, float]:
    """Load ``count`` adapters in a fresh process with one thread; see ``_bank_probe.py`` for the fields.

    In the quick form it is this process.
    """
    if settings.quick:
        return _bank_probe.measure(side, folder, name, count)
    command = [sys.executable, str(PROBE), side, folder, name, str(count)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"{side} probe failed: {done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _repeat(side: str, folder: str, name: str, count: int, settings: Settings) -> list[dict[str, float]]:
    rounds = settings.rounds or (1 if settings.quick else 3)
    return [probe(side, folder, name, count, settings) for _ in range(rounds)]


def _against_peft(folder: str, name: str, count: int, settings: Settings) -> Measured:
    theirs = probe("peft", folder, name, count, settings)
    ours = _repeat("ours", folder, name, count, settings)
    mine = Timing(tuple(one["open_s"] + one["stack_s"] + one["attach_s"] for one in ours))
    checks = [
        Check("speed-up, disk to runnable model", theirs["total_s"] / mine.best, "", unit="x"),
        Check("PEFT: last adapter / first ten (mean)", theirs["last_s"] / theirs["first_s"], unit="x"),
        Check("PEFT: memory growth / bytes on disk", theirs["rss_growth"] / theirs["bytes"], unit="x"),
    ]
    return Measured(checks, mine, Timing((theirs["total_s"],)), note="CPU seconds; PEFT measured once")


def _at_scale(folder: str, name: str, count: int, settings: Settings) -> Measured:
    whole = _repeat("ours", folder, name, count, settings)
    half = _repeat("ours", folder, name, count // 2, settings)
    tenth = _repeat("ours", folder, name, max(1, count // 20), settings)
    total, at_half, at_tenth = (min(one["open_s"] + one["stack_s"] for one in runs) for runs in (whole, half, tenth))
    early = (at_half - at_tenth) / (count // 2 - max(1, count // 20))
    late = (total - at_half) / (count - count // 2)
    growth = min(one["rss_growth"] for one in whole) / whole[0]["bytes"]
    strict: dict[str, Any] = {} if settings.quick else {"relation": "<="}
    checks = [
        Check("open + stack, CPU seconds", total, target=2.0, unit="s", **strict),
        Check("attach, CPU seconds", min(one["attach_s"] for one in whole), unit="s"),
        Check("per adapter, second half / first half", late / max(early, 1e-9), target=1.25, unit="x", **strict),
        Check("memory growth / bytes on disk", growth, target=1.1, unit="x", **strict),
        Check("peak memory growth / bytes on disk", min(one["peak_growth"] for one in whole) / whole[0]["bytes"],
              unit="x"),
    ]  # fmt: skip
    return Measured(checks, Timing(tuple(one["open_s"] + one["stack_s"] for one in whole)), note="CPU seconds")
