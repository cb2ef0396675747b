"""What the tuner tries: shapes, the candidates of each kind of configuration, and calls over cold operands.

Letters: ``T`` tokens, ``E`` adapters, ``K`` chosen per token, ``D`` input and ``O`` output width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from compose.kernels.packed import tuning
from compose.kernels.packed.front import forward
from compose.kernels.packed.search import Space
from compose.kernels.stack import LoraStack

Call = Callable[[], torch.Tensor]
_COLD_BYTES = 160 << 20  # a round through the copies passes twice the largest level-2 cache
_MIXED = (4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Trial:
    """One entry of a table to be measured.

    Attributes:
        name: What ``--trial`` takes.
        kind: Of the configuration.
        lead: Shapes of ``x`` without ``D``, all of which count alike.
        ranks: Of the adapters.
        top: ``K``; 0: an id per entry; -1: dense gates.
        per_example: Ids name one adapter per example instead of one per token.
        width: ``D``.
        out: ``O``.
        bare: Without a base.
    """

    name: str
    kind: str
    lead: tuple[tuple[int, ...], ...]
    ranks: tuple[int, ...]
    top: int = 0
    per_example: bool = False
    width: int = 4096
    out: int = 4096
    bare: bool = False

    @property
    def exact(self) -> tuple[int, ...]:
        """Numbers that a shape must share with the entry; see ``tuning``."""
        block = tuning.rank_block(self.ranks)
        if self.kind == "rows":
            return block, max(1, self.top)
        if self.kind == "dense many":
            return (int(self.bare),)
        return (block, int(not self.per_example)) if self.kind == "tiles" else ()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Numbers that a shape must be near to."""
        widths, rows = (self.width, self.out), sum(self.ranks)
        if self.kind == "rows":
            return (*widths, max(self.ranks))
        if self.kind == "tiles":
            return (*widths, self.lead[0][-1] if self.per_example else 1)
        return (*widths, rows, *self.lead[0]) if self.kind == "dense few" else (*widths, rows)

    def start(self, dtype: torch.dtype, device: torch.device) -> Any:
        """The configuration in use now."""
        block, rows = tuning.rank_block(self.ranks), sum(self.ranks)
        if self.kind == "rows":
            return tuning.rows_config(dtype, device, self.width, self.out, block, max(self.ranks), max(1, self.top))
        if self.kind == "tiles":
            tokens = self.lead[0][-1] if self.per_example else None
            return tuning.tiles_config(dtype, device, self.width, self.out, block, tokens)
        tokens = 0 if self.kind == "dense many" else self.lead[0][0]
        config = tuning.dense_config(dtype, device, self.width, rows, self.out, rows, tokens, bare=self.bare)
        if self.kind == "dense many":
            return config
        kind = tuning.CONFIGS[self.kind]
        return kind(**{name: getattr(config, name) for name in kind.__annotations__})


def _few(name: str, tokens: int, top: int = 0) -> Trial:
    return Trial(name, "dense few", ((tokens,),), (16,) * 8, top)


TRIALS = (
    Trial("rows-r16", "rows", ((1,), (32,), (128,)), (16,) * 128),
    Trial("rows-r16-top2", "rows", ((64,), (128,)), (16,) * 64, 2),
    Trial("rows-mixed", "rows", ((128,),), _MIXED * 25 + _MIXED[:3]),
    Trial("rows-r64", "rows", ((128,),), (64,) * 128),
    Trial("dense-sums", "dense sums", ((32,), (128,)), (16,) * 8),
    _few("dense-16", 16),
    _few("dense-32", 32, -1),
    _few("dense-64", 64),
    _few("dense-128", 128),
    _few("dense-512", 512),
    Trial("dense-many", "dense many", ((1, 16384),), (16,) * 8),
    Trial("dense-many-bare", "dense many", ((1, 16384),), (16,) * 8, bare=True),
    Trial("tiles-sorted", "tiles", ((1, 16384),), (16,) * 64, 2),
    Trial("tiles-512", "tiles", ((8, 512),), (16,) * 32, per_example=True),
    Trial("tiles-2048", "tiles", ((8, 2048),), (16,) * 32, per_example=True),
)


def space(trial: Trial, dtype: torch.dtype) -> Space:
    """Candidates for a trial."""
    wide = dtype.itemsize > 2
    if trial.kind == "rows":
        block = tuning.rank_block(trial.ranks)
        slots = 1 << (max(1, trial.top) - 1).bit_length()
        heights = tuple(sorted({16, block, min(64, tuning.power_of_two(max(trial.ranks)))}))
        return Space(
            (
                {"splits": (4, 8, 16), "bk": (128, 256, 512), "shrink_rows": heights, "shrink_warps": (1, 2, 4)},
                {"bn": (128, 256, 512, 1024), "expand_rows": heights, "expand_warps": (1, 2, 4)},
            ),
            ("splits",),
            lambda one: (
                one.splits * one.bk <= tuning.power_of_two(trial.width)
                and 512 <= one.bk * one.shrink_rows // one.shrink_warps <= 4096
                and 512 <= one.bn * one.expand_rows * slots // one.expand_warps <= 8192
            ),
        )
    if trial.kind == "dense sums":
        return Space(({"splits": (2, 4, 8), "bk": (64, 128, 256)},))
    if trial.kind == "dense few":
        return Space(
            (
                {"bm": (16, 32), "br": (16, 32, 64, 128), "shrink_stages": (3, 4, 6, 8), "shrink_warps": (4,)},
                {"bm_out": (16, 32), "bn": (32, 64, 128, 256), "expand_warps": (4, 8)},
            )
        )
    if trial.kind == "dense many":
        return Space(
            (
                {"bm": (64, 128), "bk": (32, 64) if wide else (64, 128), "shrink_stages": (3, 4, 5),
                 "shrink_warps": (4, 8)},
                {"bm_out": (16, 32, 64), "bn": (64, 128, 256), "expand_stages": (2, 3, 4), "expand_warps": (4, 8)},
                {"programs": (264, 384, 528, 1056)},
            )
        )  # fmt: skip
    shrink = {"bk": (64, 128, 256), "shrink_stages": (2, 3, 4), "shrink_warps": (4, 8)}
    expand = {"bm": (16, 32, 64), "bn": (64, 128, 256), "expand_warps": (4, 8), "columns_first": (False, True)}
    return Space((shrink, expand, shrink), ("bm",))


@dataclass
class Operands:
    """Operands of the calls of a trial on a device, made when first asked for and kept."""

    trial: Trial
    dtype: torch.dtype
    device: torch.device
    kept: dict[tuple[int, ...], list[Call]] = field(default_factory=dict)
    firsts: dict[tuple[int, ...], Call] = field(default_factory=dict)

    def first(self, lead: tuple[int, ...]) -> Call:
        """The first of `calls`."""
        if lead not in self.firsts:
            self.firsts[lead] = self._call(lead, 0)
        return self.firsts[lead]

    def calls(self, lead: tuple[int, ...]) -> Sequence[Call]:
        """A round of calls over cold operands: copies in memory of their own, at least two."""
        if lead not in self.kept:
            trial, size = self.trial, self.dtype.itemsize
            tokens = torch.Size(lead).numel()
            live = len(trial.ranks) if trial.top else min(len(trial.ranks), tokens)
            mean = sum(trial.ranks) / len(trial.ranks)
            moved = int((live * mean + tokens) * (trial.width + trial.out) * size)
            copies = max(2, min(512, -(-_COLD_BYTES // moved)))
            if self.device.type != "cuda":
                copies = 2
            self.kept[lead] = [self.first(lead), *(self._call(lead, seed) for seed in range(1, copies))]
        return self.kept[lead]

    def _call(self, lead: tuple[int, ...], seed: int) -> Call:
        trial, device = self.trial, self.device
        generator = torch.Generator(device).manual_seed(seed)

        def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
            return (torch.randn(shape, generator=generator, device=device) * scale).to(self.dtype)

        rows, num_adapters = sum(trial.ranks), len(trial.ranks)
        a, b = normal(rows, trial.width, scale=trial.width**-0.5), normal(rows, trial.out, scale=0.25)
        stack = LoraStack(a, b, torch.ones(num_adapters, device=device), trial.ranks)
        x, base = normal(*lead, trial.width), None if trial.bare else normal(*lead, trial.out)
        entries = lead[0] if trial.per_example else torch.Size(lead).numel()
        scores = torch.randn(entries, num_adapters, generator=generator, device=device)
        if trial.top < 0:
            ids, gates = None, scores.softmax(-1)
        elif trial.top:
            values, ids = scores.topk(trial.top)
            gates = values.softmax(-1)
        else:  # as many tokens of every adapter, shuffled
            order = torch.randperm(entries, generator=generator, device=device)
            ids, gates = (order % num_adapters)[:, None], None
        return lambda: forward(
            x, stack, ids, gates, base=base, reuse_base=False, precision="ieee", batch_invariant=True
        )
