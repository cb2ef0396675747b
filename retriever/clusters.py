"""Clusters of texts, through scikit-learn: k-means as MoCLE (arXiv:2312.12379), Gaussian mixtures as AdapterSoup.

Shape letters: ``N`` texts, ``D`` entries of a vector, ``P`` clusters, ``E`` adapters, ``S`` principal components.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

import numpy as np

from compose.errors import (
    AdapterFormatError,
    BackendUnavailableError,
    IncompatibleError,
    UnknownNameError,
    unknown_name,
)
from compose.files import safetensors_file
from compose.files.publish import publish_folder
from compose.files.strict_json import parse_object
from compose.retriever.composition import allowed, first_of
from compose.retriever.retriever import Exclude, Retrieved
from compose.retriever.storage import check_encoder, describe

if TYPE_CHECKING:
    from compose.retriever.encoders import Encoder

Method = Literal["kmeans", "gmm"]
METHODS: tuple[Method, ...] = ("kmeans", "gmm")
FORMAT, VERSION = "compose-clusters", 1
JSON_FILE, TENSOR_FILE = "clusters.json", "clusters.safetensors"

Record = TypeVar("Record")


class Centres(NamedTuple):
    """k-means: a vector belongs to the nearest centre, of equals to the first.

    Attributes:
        centres: ``(P, D)`` float32.
    """

    centres: np.ndarray

    @property
    def num_clusters(self) -> int:
        """``P``."""
        return len(self.centres)

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        """``(N, D)`` -> ``(N,)`` int64."""
        x, centres = vectors.astype(np.float64), self.centres.astype(np.float64)
        return np.argmin((centres**2).sum(1) - 2 * x @ centres.T, axis=1)


class Gaussians(NamedTuple):
    """A mixture of Gaussians over principal components: a vector belongs to the likeliest one.

    Attributes:
        mean: ``(D,)`` float32, subtracted first.
        components: ``(S, D)`` float32.
        means: ``(P, S)`` float32.
        factors: ``(P, S, S)`` float32: Cholesky factors ``F`` of the precisions ``F F'``.
        logs: ``(P,)`` float32: logarithm of weight and of the density's constant.
    """

    mean: np.ndarray
    components: np.ndarray
    means: np.ndarray
    factors: np.ndarray
    logs: np.ndarray

    @property
    def num_clusters(self) -> int:
        """``P``."""
        return len(self.means)

    def assign(self, vectors: np.ndarray) -> np.ndarray:
        """``(N, D)`` -> ``(N,)`` int64."""
        x = (vectors.astype(np.float64) - self.mean) @ self.components.astype(np.float64).T
        away = np.einsum("nps,pst->npt", x[:, None] - self.means, self.factors.astype(np.float64))
        return np.argmax(self.logs - 0.5 * (away**2).sum(-1), axis=1)


@dataclass(frozen=True, eq=False)
class TextClusters:
    """Which cluster a text belongs to.

    A MoCLE router (preset ``mocle`` of ``compose.routers``) reads these numbers: `number` writes them into training
    records, and the same clusters, saved beside the router, number the texts that it serves.

    Attributes:
        encoder: Of the texts.
        clusters: k-means centres or Gaussians.
    """

    encoder: Encoder
    clusters: Centres | Gaussians

    @classmethod
    def fit(
        cls,
        encoder: Encoder,
        texts: Sequence[str],
        *,
        num_clusters: int = 64,
        method: Method = "kmeans",
        components: int = 50,
        seed: int = 0,
    ) -> TextClusters:
        """Cluster texts.

        Args:
            encoder: MoCLE uses all-MiniLM-L6-v2 without an instruction.
            texts: ``N``, at least as many different ones as clusters.
            num_clusters: ``P``; MoCLE uses 16 or 64.
            method: ``"kmeans"``, or ``"gmm"``: principal components, then a mixture of Gaussians.
            components: Of ``"gmm"``: ``S`` at most.
            seed: Of the method's starting points.

        Raises:
            BackendUnavailableError: scikit-learn is not installed.
            IncompatibleError: More clusters than different texts.
        """
        vectors = encoder.encode(texts)
        if method == "kmeans":
            return cls(encoder, Centres(kmeans(vectors, num_clusters, seed=seed)))
        if method == "gmm":
            return cls(encoder, gaussians(vectors, num_clusters, components=components, seed=seed))
        raise UnknownNameError(unknown_name("clustering method", str(method), METHODS))

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """Numbers ``(N,)`` int64 of the texts' clusters."""
        return self.clusters.assign(self.encoder.encode(texts))

    def number(self, records: Sequence[Record]) -> list[Record]:
        """Return mixed-task records (``compose.routers.MixedExample``) with the clusters of their inputs."""
        given: Sequence[Any] = records
        found = self.of([record.example.input for record in given])
        return [replace(record, cluster=int(cluster)) for record, cluster in zip(given, found, strict=True)]

    def save(self, folder: str | Path) -> Path:
        """Write ``clusters.json`` and ``clusters.safetensors``.

        Raises:
            DuplicateNameError: The folder exists.
        """
        from safetensors.numpy import save

        kind = "kmeans" if isinstance(self.clusters, Centres) else "gmm"
        about = {
            "format": FORMAT, "version": VERSION, "method": kind, "clusters": self.clusters.num_clusters,
            "encoder": describe(self.encoder),
        }  # fmt: skip
        arrays = {name: np.ascontiguousarray(value) for name, value in self.clusters._asdict().items()}
        return publish_folder({JSON_FILE: _json(about), TENSOR_FILE: save(arrays)}, Path(folder))

    @classmethod
    def load(cls, folder: str | Path, encoder: Encoder) -> TextClusters:
        """Read what `save` wrote.

        Args:
            folder: The folder.
            encoder: The one the clusters were made with.

        Raises:
            AdapterFormatError: Files are missing, damaged, or of a newer version.
            IncompatibleError: The encoder or its prompt is another.
        """
        about = _about(Path(folder) / JSON_FILE)
        check_encoder(about["encoder"], encoder, Path(folder))
        file = Path(folder) / TENSOR_FILE
        arrays = {name: tensor.numpy() for name, tensor in safetensors_file.load(file).tensors.items()}
        kind = Centres if about["method"] == "kmeans" else Gaussians
        found = {name: array.shape for name, array in arrays.items() if array.dtype == np.float32}
        wanted: dict[str, tuple[int, ...]] = {"centres": (about["clusters"], encoder.dim)}
        if kind is Gaussians:
            count, width = about["clusters"], found.get("components", (0, 0))[0]
            wanted = {
                "mean": (encoder.dim,), "components": (width, encoder.dim), "means": (count, width),
                "factors": (count, width, width), "logs": (count,),
            }  # fmt: skip
        if found != wanted or len(arrays) != len(found):
            raise AdapterFormatError(f"{file}: holds {found}, wanted float32 {wanted}")
        return cls(encoder, kind(*(arrays[name] for name in kind._fields)))


@dataclass(frozen=True, eq=False)
class ClusterRetriever:
    """Ranks adapters by the clusters in which their own texts lie: nothing is trained beyond the clusters.

    ``score(text, e)`` is the share of adapter ``e``'s texts that lie in the text's cluster. Averaged over the texts of
    a corpus (``mode="soup"``) that is AdapterSoup's choice by clustering (arXiv:2302.07027): adapters of the clusters
    that the corpus hits most. How the paper gives clusters to domains, its 100 texts per domain, at most 5 adapters
    and at least 10 % of the texts are recalled, not verified. MoCLE learns from a cluster to an expert instead.

    Attributes:
        clusters: Of texts.
        names: Adapters.
        shares: ``(P, E)`` float32; every column sums to 1.
    """

    clusters: TextClusters
    names: tuple[str, ...]
    shares: np.ndarray

    @classmethod
    def fit(
        cls,
        encoder: Encoder,
        examples: Mapping[str, Sequence[str]],
        *,
        num_clusters: int = 64,
        method: Method = "kmeans",
        components: int = 50,
        seed: int = 0,
    ) -> ClusterRetriever:
        """Cluster the texts of all adapters together; see `TextClusters.fit`.

        Args:
            encoder: Of texts.
            examples: Adapter -> inputs of its task.
            num_clusters: ``P``.
            method: ``"kmeans"`` or ``"gmm"``.
            components: Of ``"gmm"``.
            seed: Of the method's starting points.

        Raises:
            IncompatibleError: An adapter has no texts; or more clusters than different texts.
        """
        empty = [name for name, texts in examples.items() if not len(texts)]
        if empty or not examples:
            raise IncompatibleError(f"adapter {empty[0]!r} has no texts" if empty else "there are no adapters")
        texts = [text for own in examples.values() for text in own]
        clusters = TextClusters.fit(
            encoder, texts, num_clusters=num_clusters, method=method, components=components, seed=seed
        )
        owners = np.repeat(np.arange(len(examples)), [len(own) for own in examples.values()])
        counts = np.zeros((clusters.clusters.num_clusters, len(examples)))
        np.add.at(counts, (clusters.of(texts), owners), 1)
        return cls(clusters, tuple(examples), (counts / counts.sum(axis=0)).astype(np.float32))

    def scores(self, texts: Sequence[str]) -> np.ndarray:
        """``(B, E)`` float32."""
        return self.shares[self.clusters.of(texts)]

    def top(self, texts: Sequence[str], k: int = 3, exclude: Exclude | None = None) -> Retrieved:
        """The first ``k`` adapters of every text; see `compose.retriever.retriever.Retriever.top`."""
        scores = np.where(allowed(self.names, len(texts), exclude), self.scores(texts), -np.inf)
        indices, best = first_of(scores, k)
        names = tuple(tuple(self.names[index] for index in row if index >= 0) for row in indices)
        return Retrieved(names, indices, best, np.zeros(len(indices), dtype=bool))


def kmeans(vectors: np.ndarray, count: int, *, seed: int = 0) -> np.ndarray:
    """Centres ``(P, D)`` float32 of k-means (k-means++, 10 starts) through scikit-learn.

    Raises:
        BackendUnavailableError: scikit-learn is not installed.
        IncompatibleError: More clusters than different vectors, or fewer than one.
    """
    _check_count(vectors, count)
    fitted = _sklearn("cluster").KMeans(count, n_init=10, random_state=seed).fit(vectors.astype(np.float64))
    return fitted.cluster_centers_.astype(np.float32)


def gaussians(vectors: np.ndarray, count: int, *, components: int, seed: int) -> Gaussians:
    """Principal components, then a mixture of Gaussians with full covariances, through scikit-learn.

    Raises:
        BackendUnavailableError: scikit-learn is not installed.
        IncompatibleError: More clusters than different vectors, or fewer than one.
    """
    _check_count(vectors, count)
    x = vectors.astype(np.float64)
    pca = _sklearn("decomposition").PCA(min(components, *x.shape), random_state=seed, svd_solver="full").fit(x)
    reduced = pca.transform(x)
    # Clusters of a few texts have no covariance of their own: a hundredth of the mean variance is added to each.
    ridge = max(1e-2 * float(reduced.var(axis=0).mean()), 1e-9)
    mixture = (
        _sklearn("mixture").GaussianMixture(count, reg_covar=ridge, max_iter=1000, random_state=seed).fit(reduced)
    )
    factors = mixture.precisions_cholesky_
    logs = np.log(mixture.weights_) + np.log(np.diagonal(factors, axis1=1, axis2=2)).sum(1)
    parts = (pca.mean_, pca.components_, mixture.means_, factors, logs)
    return Gaussians(*(part.astype(np.float32) for part in parts))


def _check_count(vectors: np.ndarray, count: int) -> None:
    different = len(np.unique(vectors, axis=0))
    if not 1 <= count <= different:
        raise IncompatibleError(
            f"the number of clusters must lie in [1, {different}], the number of different vectors; got {count}. "
            "Give more texts, or ask for fewer clusters"
        )


def _sklearn(part: str) -> Any:
    try:
        return importlib.import_module(f"sklearn.{part}")
    except ModuleNotFoundError as error:
        raise BackendUnavailableError(
            "clusters need scikit-learn: pip install 'adapter-compose[retriever]'"
        ) from error


def _json(about: Mapping[str, Any]) -> bytes:
    import json

    return (json.dumps(about, indent=2, ensure_ascii=False) + "\n").encode()


def _about(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise AdapterFormatError(f"{file.parent}: no {JSON_FILE}; give a folder of saved clusters")
    about = parse_object(safetensors_file.read_bytes(file, max_bytes=2**20), file)
    if about.get("format") != FORMAT or about.get("version") != VERSION or about.get("method") not in METHODS:
        raise AdapterFormatError(
            f"{file}: expected format {FORMAT!r} version {VERSION}, got {about.get('format')!r} version "
            f"{about.get('version')!r} of method {about.get('method')!r}"
        )
    if not isinstance(about.get("encoder"), dict) or type(about.get("clusters")) is not int:
        raise AdapterFormatError(f"{file}: needs 'encoder', an object, and 'clusters', a whole number")
    return about
