"""Small problems for every launch shape of the packed kernels, under Triton's interpreter; the float64 reference.

Letters: ``M`` tokens, ``K`` adapters per entry of ids, ``E`` adapters, ``D`` input and ``O`` output width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import pytest
import torch

from compose.kernels.grouped_lora.op import grouped_lora
from compose.kernels.mixture_lora.op import mixture_lora
from compose.kernels.packed import front, op, sliced_op
from compose.kernels.stack import LoraStack

RANKS = (3, 0, 17, 1, 128, 8, 64, 16, 32)
LAUNCHES = ("rows", "dense", "dense long", "tiles", "tiles sorted")
# x without D, entries of ids and gates
SHAPES = {
    "rows": ((5, 2), (5, 2)),
    "dense": ((4, 3), (4,)),
    "dense long": ((2, 19), (2, 19)),
    "tiles": ((3, 19), (3,)),
    "tiles sorted": ((2, 37), (2, 37)),
}


@dataclass(frozen=True, eq=False)
class Problem:
    """Operands of one call; ``gates`` None: `grouped_lora`, ``ids`` None: dense gates."""

    x: torch.Tensor
    stack: LoraStack
    ids: torch.Tensor | None
    gates: torch.Tensor | None
    base: torch.Tensor | None

    def run(self, backend: str = "triton", **options) -> torch.Tensor:
        """The op; ``options`` may also replace ``x``, ``base`` and ``gates``."""
        options = {"x": self.x, "backend": backend, "base": self.base, **options}
        if self.gates is None:
            return grouped_lora(stack=self.stack, ids=self.ids, **options)
        return mixture_lora(stack=self.stack, indices=self.ids, **{"gates": self.gates, **options})

    def leaves(self) -> dict[str, torch.Tensor]:
        """Everything a gradient may reach."""
        stack = self.stack
        named = {"x": self.x, "a": stack.a_RD, "b": stack.b_RO, "scaling": stack.scaling_E, "gates": self.gates,
                 "base": self.base}  # fmt: skip
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    def with_leaves(self, leaves: dict[str, torch.Tensor]) -> Problem:
        """The same ids and ranks with other tensors, by the names of `leaves`."""
        old = self.stack
        stack = LoraStack(leaves["a"], leaves["b"], leaves["scaling"], old.ranks, old.index)
        return replace(self, x=leaves["x"], stack=stack, gates=leaves.get("gates"), base=leaves.get("base"))

    def trained(self, *names: str) -> Problem:
        """The same values as leaves; those of ``names``, by default all, want gradients."""
        leaves = self.leaves()
        names = names or tuple(leaves)
        return self.with_leaves({n: leaf.detach().clone().requires_grad_(n in names) for n, leaf in leaves.items()})

    def exact(self) -> Problem:
        """The same values in float64, for the reference backend."""
        return self.with_leaves({n: leaf.detach().double().requires_grad_() for n, leaf in self.leaves().items()})

    def rows(self, rows: slice) -> Problem:
        """Some examples of the batch, with their entries."""
        ids, gates, base = (None if one is None else one[rows] for one in (self.ids, self.gates, self.base))
        return replace(self, x=self.x[rows], ids=ids, gates=gates, base=base)


@pytest.fixture
def force(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], list[str]]:
    """Return a function that makes small problems take a launch shape, and returns the list of those taken."""
    taken: list[str] = []
    original = op.low_rank

    def spy(x, first, second, packed, route, *rest, **options):
        more = (" long" if route.long else "") if route.shape == "dense" else (" sorted" if route.table else "")
        taken.append(route.shape + more)
        return original(x, first, second, packed, route, *rest, **options)

    def choose(launch: str) -> list[str]:
        monkeypatch.setattr(front, "_DENSE_ROWS", 10_000 if launch.startswith("dense") else 0)
        if launch in ("dense long", "tiles sorted"):
            monkeypatch.setattr(front, "_FEW_TOKENS", 0)
        return taken

    monkeypatch.setattr(op, "low_rank", spy)
    monkeypatch.setattr(sliced_op, "low_rank", spy)
    return choose


@pytest.fixture
def make_problem() -> Callable[..., Problem]:
    """Return a factory; ``top`` is ``K``, 0 for plain ids, -1 for dense gates. Some ids are -1, some gates 0."""

    def make(
        launch: str,
        top: int = 0,
        dtype: torch.dtype = torch.float32,
        *,
        ranks: tuple[int, ...] = RANKS,
        shape: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
        width: int = 37,
        out: int = 21,
    ) -> Problem:
        lead, entries = shape or SHAPES[launch]
        num_adapters, rows = len(ranks), sum(ranks)
        a = torch.randn(rows, width).div(width**0.5).to(dtype)
        b = torch.randn(rows, out).div(max(1, rows) ** 0.5).to(dtype)
        stack = LoraStack(a, b, torch.linspace(-0.7, 2.0, num_adapters), ranks)
        places = entries if top == 0 else (*entries, top if top > 0 else num_adapters)
        ids = torch.randint(-1, num_adapters, places) if top >= 0 else None
        gates = torch.randn(places) if top != 0 else None
        if gates is not None:
            gates.view(-1)[::5] = 0.0
        return Problem(torch.randn(*lead, width).to(dtype), stack, ids, gates, torch.randn(*lead, out).to(dtype))

    return make


@pytest.fixture
def error() -> Callable[..., float]:
    """Return ``|actual - expected| / |expected|``, Frobenius; 0 / 0 is 0."""

    def relative(actual: torch.Tensor, expected: torch.Tensor) -> float:
        assert actual.shape == expected.shape
        assert torch.isfinite(actual).all()
        wrong = (actual.detach().double() - expected.detach().double()).norm().item()
        return wrong / expected.norm().item() if wrong else 0.0

    return relative
