"""Problems of the packed kernels at real sizes, their float64 twin, error measures, poisoned memory, a watchdog.

Shape letters: ``M`` tokens, ``N`` entries of ids or gates, ``K`` adapters per entry, ``E`` adapters, ``R`` rank rows
of all adapters, ``D`` input and ``O`` output width.
"""

from __future__ import annotations

import faulthandler
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch

from compose.kernels.grouped_lora.op import grouped_lora
from compose.kernels.mixture_lora.op import mixture_lora
from compose.kernels.stack import LoraStack


@dataclass(frozen=True)
class Case:
    """One shape of operands.

    Attributes:
        x: Leading dimensions of ``x``.
        ranks: Of the adapters.
        entries: Leading dimensions of ids and gates.
        top: ``K``; 0: plain ids (``grouped_lora``); -1: dense gates.
        launch: The launch shape meant: rows, dense or tiles, large blocks (``long``) or not, sorted tokens or not.
        width: ``D``.
        out: ``O``.
    """

    x: tuple[int, ...]
    ranks: tuple[int, ...]
    entries: tuple[int, ...]
    top: int
    launch: tuple[str, bool, bool]
    width: int = 4096
    out: int = 1024


@dataclass(frozen=True, eq=False)
class Problem:
    """Operands of one call; ``gates`` None: `grouped_lora`, ``ids`` None: dense gates."""

    x: torch.Tensor
    stack: LoraStack
    ids: torch.Tensor | None
    gates: torch.Tensor | None
    base: torch.Tensor | None

    def run(self, **options) -> torch.Tensor:
        """The op under test; ``options`` may also replace ``x``, ``base`` and ``gates``."""
        options = {"x": self.x, "backend": "triton", "base": self.base, **options}
        if self.gates is None:
            return grouped_lora(stack=self.stack, ids=self.ids, **options)
        return mixture_lora(stack=self.stack, indices=self.ids, **{"gates": self.gates, **options})

    def leaves(self) -> dict[str, torch.Tensor]:
        """Everything a gradient may reach."""
        stack = self.stack
        named = {"x": self.x, "a": stack.a_RD, "b": stack.b_RO, "scaling": stack.scaling_E, "gates": self.gates,
                 "base": self.base}  # fmt: skip
        return {name: leaf for name, leaf in named.items() if leaf is not None}

    def trained(self) -> Problem:
        """The same values as leaves that want gradients."""
        return self.with_leaves({name: leaf.detach().clone().requires_grad_() for name, leaf in self.leaves().items()})

    def exact(self) -> Problem:
        """The same values in float64."""
        return self.with_leaves(
            {name: leaf.detach().double().requires_grad_() for name, leaf in self.leaves().items()}
        )

    def rows(self, rows: slice) -> Problem:
        """Some examples of the batch, with their entries."""
        shared = self.gates is not None and self.gates.dim() == 1
        ids, gates = ((one if one is None or shared else one[rows]) for one in (self.ids, self.gates))
        return replace(self, x=self.x[rows], ids=ids, gates=gates, base=self.base[rows])

    def with_leaves(self, leaves: dict[str, torch.Tensor]) -> Problem:
        """The same ids and ranks with other tensors, by the names of `leaves`."""
        old = self.stack
        stack = LoraStack(leaves["a"], leaves["b"], leaves["scaling"], old.ranks, old.index)
        return replace(self, x=leaves["x"], stack=stack, gates=leaves.get("gates"), base=leaves.get("base"))


def float64_twin(problem: Problem) -> torch.Tensor:
    """``base + ((x Aᵀ) ∘ c) B`` over every rank row of the stack, nothing left out; operands as they are."""
    x, stack = problem.x, problem.stack
    flat_MD = x.reshape(-1, x.shape[-1])
    num_adapters = stack.num_adapters
    if problem.ids is None:
        c_NE = problem.gates.reshape(-1, num_adapters)
    else:
        width = 1 if problem.gates is None else problem.gates.shape[-1]
        ids_NK = problem.ids.reshape(-1, width)
        gates_NK = (
            torch.ones_like(ids_NK, dtype=x.dtype) if problem.gates is None else problem.gates.reshape(-1, width)
        )
        chosen = torch.nn.functional.one_hot(torch.where(ids_NK < 0, num_adapters, ids_NK), num_adapters + 1)
        c_NE = (chosen * gates_NK[..., None]).sum(1)[:, :num_adapters]
    c_NR = (c_NE * stack.scaling_E)[:, stack.index.adapter_R]
    c_MR = c_NR.repeat_interleave(flat_MD.shape[0] // c_NR.shape[0], 0)
    y = ((flat_MD @ stack.a_RD.T) * c_MR) @ stack.b_RO
    y = y.view(*x.shape[:-1], -1)
    return y if problem.base is None else y + problem.base


def make_problem(case: Case, dtype: torch.dtype, *, device: str = "cuda", seed: int = 0) -> Problem:
    """Random operands: every update as large as its base, some ids -1, some gates 0, one negative scaling."""
    generator = torch.Generator(device).manual_seed(seed)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, device=device)

    rows, num_adapters = sum(case.ranks), len(case.ranks)
    a = (normal(rows, case.width) / case.width**0.5).to(dtype)
    b = (normal(rows, case.out) / max(1.0, rows / num_adapters) ** 0.5).to(dtype)
    scaling = torch.linspace(-0.7, 2.0, num_adapters, device=device)
    stack = LoraStack(a, b, scaling, case.ranks)
    shape = case.entries if case.top == 0 else (*case.entries, case.top if case.top > 0 else num_adapters)
    ids = torch.randint(-1, num_adapters, shape, generator=generator, device=device) if case.top >= 0 else None
    gates = normal(*shape) if case.top != 0 else None
    if gates is not None:
        gates.flatten()[::7] = 0.0
    base = normal(*case.x, case.out).to(dtype)
    return Problem(normal(*case.x, case.width).to(dtype), stack, ids, gates, base)


def frobenius_error(actual: torch.Tensor, expected: torch.Tensor) -> float:
    """``|actual - expected| / |expected|``; refuses one line that is much worse than the others."""
    assert actual.shape == expected.shape
    assert torch.isfinite(actual).all()
    wrong = (actual.double() - expected).reshape(-1, expected.shape[-1])
    error = wrong.norm().item()
    assert wrong.norm(dim=1).max().item() <= 30 * error / wrong.shape[0] ** 0.5
    return error / expected.norm().item()


@pytest.fixture(name="make_problem")
def _make_problem() -> Callable[..., Problem]:
    return make_problem


@pytest.fixture(name="make_case")
def _make_case() -> type[Case]:
    return Case


@pytest.fixture(name="float64_twin")
def _float64_twin() -> Callable[[Problem], torch.Tensor]:
    return float64_twin


@pytest.fixture(name="frobenius_error")
def _frobenius_error() -> Callable[..., float]:
    return frobenius_error


_MIXED = (3, 64, 8, 1, 128, 17, 16, 32, 0)  # R = 269
CASES = {
    # R > 256 K everywhere but in "dense", so that tokens look their own rank rows up
    "rows": Case((128,), (16,) * 128, (128,), 0, ("rows", False, False)),
    "rows, one token": Case((1,), (16,) * 17, (1,), 0, ("rows", False, False), 1024, 4096),
    "rows, top 2": Case((96,), (16,) * 64, (96,), 2, ("rows", False, False)),
    "rows, mixed ranks, odd widths": Case((37, 3), _MIXED, (37, 3), 0, ("rows", False, False), 515, 1001),
    "rows, rank 256": Case((9,), (256, 8, 130), (9,), 0, ("rows", False, False), 1024, 1024),
    "dense, ids": Case((128,), (16,) * 8, (128,), 0, ("dense", False, False)),
    "dense, gates": Case((32,), (16,) * 8, (32,), -1, ("dense", False, False), 4096, 4096),
    "dense, top 2, odd widths": Case((5, 4), _MIXED, (5,), 2, ("dense", False, False), 515, 1001),
    "dense, long, gates": Case((2, 2048), (16,) * 8, (2, 2048), -1, ("dense", True, False), 4096, 4096),
    "dense, long, R > 128": Case((3, 700), (3, 64, 8, 1, 100, 17, 16, 32, 0), (3,), 0, ("dense", True, False)),
    "dense, long, R > 256, top 2, odd widths": Case((2, 333), _MIXED, (2, 333), 2, ("dense", True, False), 515, 1001),
    "tiles, ids per example": Case((4, 1100), (16,) * 40, (4,), 0, ("tiles", True, False)),
    "tiles, few tokens, top 2, odd widths": Case(
        (6, 7), (*_MIXED, *_MIXED), (6,), 2, ("tiles", False, False), 515, 1001
    ),
    "tiles, one list of gates": Case((3, 50), (16,) * 64, (), 2, ("tiles", True, False), 1024, 1024),
    "tiles, sorted": Case((1, 4096), (16,) * 64, (1, 4096), 0, ("tiles", True, True)),
    "tiles, sorted, top 2": Case((2, 1024), (16,) * 64, (2, 1024), 2, ("tiles", True, True), 4096, 4096),
    "tiles, sorted, top 4, mixed ranks, odd widths": Case(
        (3, 217), _MIXED * 4, (3, 217), 4, ("tiles", True, True), 515, 1001
    ),
    "tiles, sorted, rank 256": Case((1, 600), (256, 8, 130), (1, 600), 0, ("tiles", True, True), 1024, 1024),
}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """``case`` is each of CASES in turn."""
    if "case" in metafunc.fixturenames:
        metafunc.parametrize("case", CASES.values(), ids=CASES.keys())


@pytest.fixture
def cases() -> dict[str, Case]:
    """By name."""
    return CASES


@pytest.fixture
def poisoned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory from ``torch.empty*`` starts as NaN (a huge number for integers), so reading it before writing shows."""

    def poison(allocate: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned(*args, **kwargs) -> torch.Tensor:
            tensor = allocate(*args, **kwargs)
            if tensor.device.type != "meta":
                with torch.no_grad():
                    tensor.fill_(float("nan") if tensor.is_floating_point() else 127)
            return tensor

        return poisoned

    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        monkeypatch.setattr(owner, name, poison(getattr(owner, name)))


@pytest.fixture
def watchdog() -> Iterator[None]:
    """End the whole run, with every thread's stack, when a test has not finished after a minute (a hung GPU)."""
    faulthandler.dump_traceback_later(60, exit=True, file=sys.__stderr__)
    yield
    faulthandler.cancel_dump_traceback_later()
