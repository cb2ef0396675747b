"""``weights``: the adapter's own deltas, for "which adapters are like this one"; queries are adapters, not texts."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, ClassVar, NoReturn

import numpy as np

from compose.errors import ComposeError, IncompatibleError
from compose.retriever.embeddings import ADAPTER_EMBEDDINGS, AdapterVectors, Reads, Samples, cosine_vectors

if TYPE_CHECKING:
    from compose.adapter import LowRank

Targets = Mapping[str, "LowRank"]
"""One adapter: module path -> update."""


@ADAPTER_EMBEDDINGS.register("weights")
@dataclass(frozen=True, kw_only=True)
class Weights:
    """The cosine with the vectors of a `WeightEncoder`."""

    reads: ClassVar[Reads] = "factors"

    def fit(self, samples: Samples) -> AdapterVectors:
        """Return one unit vector per adapter."""
        means = samples.means()
        return cosine_vectors(means, np.arange(len(means)))


@dataclass(frozen=True, kw_only=True)
class WeightEncoder:
    """Adapters to unit vectors of one fixed space, so that adapters embedded at different times compare.

    The delta of every target is taken apart by its singular values, ``U S V^T`` (through QR of the factors, never
    dense), put together again with ``S**power``, sketched from both sides by seeded Gaussian matrices of the target,
    ``P_o U S**power V^T P_i^T`` ``(width, width)``, and summed over the targets. It is a function of the delta alone:
    other factors with the same product (a rotated rank space, a scale moved from A to B or into the scaling) give the
    same vector. For ``power=1`` the expected inner product is that of the deltas, targets that one adapter lacks
    contributing zero; the error of a cosine shrinks with ``1 / sqrt(width * targets * rank)``. ``power=0`` compares
    the subspaces alone.

    The sketch instead of a longer vector is ours; MBC (arXiv:2405.11157) flattens the factors themselves, which two
    equal deltas need not share.

    Attributes:
        width: Of a target's sketch; vectors have ``width**2`` entries.
        power: Exponent of the singular values, at least 0.
        seed: Of the sketches.
    """

    width: int = 32
    power: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.width < 1 or not 0 <= self.power < float("inf"):
            raise ComposeError(f"width must be at least 1 and power at least 0, got {self.width} and {self.power}")

    @property
    def id(self) -> str:
        """``weights:`` with the options."""
        return f"weights:width={self.width}:power={self.power:g}:seed={self.seed}"

    @property
    def fingerprint(self) -> str:
        """SHA-256 over the options: they are all that decides a vector."""
        return hashlib.sha256(json.dumps(["weights", 1, asdict(self)], sort_keys=True).encode()).hexdigest()

    @property
    def prompt(self) -> str:
        """None."""
        return ""

    @property
    def dim(self) -> int:
        """``D``."""
        return self.width**2

    def encode(self, texts: Sequence[str]) -> NoReturn:
        """Raise: there are no texts here.

        Raises:
            ComposeError: Always.
        """
        raise ComposeError(
            "method 'weights' embeds adapters, not texts: pass encode_adapters([...]) to top_vectors, or fit the "
            "retriever from examples"
        )

    def encode_adapters(self, adapters: Sequence[Targets]) -> np.ndarray:
        """Return ``(N, D)`` float32 with rows of length 1.

        Raises:
            IncompatibleError: An adapter without targets or with a delta of zero, or a target of two shapes.
        """
        vectors = np.zeros((len(adapters), self.width, self.width))
        for target in sorted({target for targets in adapters for target in targets}):
            self._add(target, adapters, vectors)
        flat = vectors.reshape(len(adapters), -1)
        lengths = np.linalg.norm(flat, axis=1, keepdims=True)
        zero = np.flatnonzero(~(np.isfinite(lengths[:, 0]) & (lengths[:, 0] > 0)))
        if zero.size:
            raise IncompatibleError(f"adapter {zero[0] + 1} has no direction: its delta is zero or not finite")
        return (flat / lengths).astype(np.float32)

    def _add(self, target: str, adapters: Sequence[Targets], vectors: np.ndarray) -> None:
        having = [(row, targets[target]) for row, targets in enumerate(adapters) if target in targets]
        shapes = sorted({(update.out_features, update.in_features) for _, update in having})
        if len(shapes) > 1:
            raise IncompatibleError(f"target {target!r} has shapes {shapes}; compare adapters of one base model")
        ((out, in_),) = shapes
        left, right = self._sketch(target, "out", out), self._sketch(target, "in", in_)
        for row, update in having:
            u, s, v = delta_svd(update)
            vectors[row] += (left @ u * _power(s, self.power)) @ (v.T @ right.T)

    def _sketch(self, target: str, side: str, size: int) -> np.ndarray:
        """Gaussian ``(width, size)`` of variance ``1 / width``, from seed, target and side alone."""
        words = hashlib.sha256(f"{self.seed}\0{target}\0{side}".encode()).digest()
        drawn = np.random.default_rng(int.from_bytes(words[:16], "big")).standard_normal((self.width, size))
        return drawn / np.sqrt(self.width)


def delta_svd(update: LowRank) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the thin singular value decomposition of the delta, ``u (O, R)``, ``s (R,)``, ``v (I, R)`` float64.

    Through QR of both factors: ``b = Q_b R_b``, ``a^T = Q_a R_a``, and the SVD of ``scaling R_b R_a^T`` ``(R, R)``.
    """
    import torch

    b, a = (part.detach().to("cpu", torch.float64).numpy() for part in (update.b, update.a))
    q_b, r_b = np.linalg.qr(b)
    q_a, r_a = np.linalg.qr(a.T)
    u, s, v = np.linalg.svd(update.scaling * (r_b @ r_a.T), full_matrices=False)
    return q_b @ u, s, q_a @ v.T


def _power(s: np.ndarray, power: float) -> np.ndarray:
    """``s ** power``; singular values that are rounding of zero stay zero."""
    real = s > s.max(initial=0.0) * 1e-10
    return np.where(real, np.where(real, s, 1.0) ** power, 0.0)
