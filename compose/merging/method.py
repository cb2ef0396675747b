"""The registry of merge methods, and what a method declares about itself."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, runtime_checkable

import torch

from compose.merging.options import build
from compose.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Mapping

    from compose.merging.deltas import Deltas, Factors, Streamed

Space = Literal["full", "knots", "core"]


@dataclass(frozen=True, kw_only=True)
class Contract:
    """What holds for a method; the law tests read it and check it.

    Attributes:
        summary: One line for ``compose merge --list``.
        paper: Where it is from.
        low_rank: The result is `Factors`; else it is `Streamed` in the full space.
        homogeneous: Weights times c give the result times c (c > 0).
        order_free: The order of the adapters does not matter.
        gauge_free: Writing an update with other factors (B G, G^-1 A) does not matter.
        one_is_identity: One adapter at weight 1 (with the law-neutral options) comes back as it is.
        exact_count: Number of adapters the method takes, None for any.
        twice: The same adapter twice at weight 1/2 gives the adapter times this number; None: something else.
        cancels: One adapter at weights 1 and -1 gives 0, or is refused. (Election of signs takes a tie as plus.)
        own_rank: The method makes its result at a rank: its option ``rank`` is the one that a merge is asked for.
        neutral: Options under which the laws are tested where the defaults prune or rescale (density 1 ...).
    """

    summary: str
    paper: str
    low_rank: bool = True
    homogeneous: bool = True
    order_free: bool = True
    gauge_free: bool = True
    one_is_identity: bool = True
    exact_count: int | None = None
    twice: float | None = 1.0
    cancels: bool = True
    own_rank: bool = False
    neutral: dict[str, Any] | None = None


@dataclass(frozen=True)
class Context:
    """What a method may use beside the deltas.

    Attributes:
        seed: Of all random choices; with adapter name, target and place it decides every draw.
        statistics: What was measured for this target, by name (input Gram matrices ...), ``(N, ...)`` each.
    """

    seed: int = 0
    statistics: Mapping[str, torch.Tensor] | None = None


@runtime_checkable
class Method(Protocol):
    """A merge method: a frozen, keyword-only dataclass of options, one target at a time.

    `merge` must not change its input and must give the same result whatever the machine's threads and the order of
    calls. It computes in the deltas' dtype and on their device, and returns tensors there.
    """

    contract: ClassVar[Contract]

    def merge(self, deltas: Deltas, context: Context) -> Factors | Streamed:
        """Return the merged delta of one target."""
        ...


METHODS: Registry[type[Method]] = Registry("merge method", package="compose.merging.methods")


def make_method(name: str, options: Mapping[str, Any]) -> Method:
    """Return a method with options.

    Raises:
        UnknownNameError: No such method.
        IncompatibleError: It has no such option, or a value of another type or out of range; the message lists them.
    """
    return build(name, METHODS[name], options)
