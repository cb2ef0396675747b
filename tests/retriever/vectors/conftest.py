"""Empty backends of every kind; the Qdrant server is a real one where there is one."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from compose.retriever.vectors import VECTOR_BACKENDS, VectorBackend
from compose.retriever.vectors.opening import open_vectors
from compose.retriever.vectors.qdrant import QdrantVectors

Make = Callable[[int], VectorBackend]
Reopen = Callable[[Path], VectorBackend]
_QDRANT = "qdrant"
CONTENDERS = [name for name in VECTOR_BACKENDS if name != _QDRANT] + [
    "faiss-ivf", "faiss-hnsw", "qdrant-protocol", "qdrant-server",
]  # fmt: skip
EXACT = [name for name in CONTENDERS if name not in ("faiss-ivf", "faiss-hnsw")]


def makers(name: str, request: pytest.FixtureRequest) -> tuple[Make, Reopen]:
    """Return what makes an empty backend, and what brings a persisted one back."""
    if not name.startswith(_QDRANT):
        kind, _, index = name.partition("-")
        options = {"kind": index, "probes": 10**6} if index == "ivf" else {"kind": index} if index else {}
        return lambda dim: VECTOR_BACKENDS[kind](dim, **options), open_vectors
    from qdrant_client import QdrantClient

    local = name == "qdrant-protocol"
    client = QdrantClient(location=":memory:") if local else QdrantClient(url=request.getfixturevalue("qdrant_url"))
    request.addfinalizer(client.close)

    def make(dim: int) -> VectorBackend:
        collection = f"test-{uuid.uuid4().hex}"
        request.addfinalizer(lambda: client.delete_collection(collection))  # runs before the client is closed
        return QdrantVectors(dim, collection=collection, client=client, allow_local=local)

    return make, lambda folder: QdrantVectors.restore(folder, client=client, allow_local=local)


@pytest.fixture(params=CONTENDERS)
def contender(request: pytest.FixtureRequest) -> tuple[Make, Reopen]:
    return makers(request.param, request)


@pytest.fixture(params=EXACT)
def exact_contender(request: pytest.FixtureRequest) -> tuple[Make, Reopen]:
    return makers(request.param, request)


@pytest.fixture(scope="session")
def qdrant_url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The server at QDRANT_URL, or one of the installed program ``qdrant``, or a skip."""
    if url := os.environ.get("QDRANT_URL"):
        yield url
        return
    program = shutil.which("qdrant")
    if program is None:
        pytest.skip("no Qdrant server: QDRANT_URL is not set and there is no program qdrant")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {**os.environ, "QDRANT__SERVICE__HTTP_PORT": str(port), "QDRANT__SERVICE__GRPC_PORT": "0"}
    folder = tmp_path_factory.mktemp("qdrant")
    server = subprocess.Popen([program], cwd=folder, env=environment, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait(url)
        yield url
    finally:
        server.terminate()
        server.wait(timeout=20)


def _wait(url: str) -> None:
    for _ in range(100):
        try:
            with urllib.request.urlopen(f"{url}/readyz", timeout=1):
                return
        except (urllib.error.URLError, ConnectionError):
            time.sleep(0.2)
    raise RuntimeError(f"the Qdrant server at {url} did not answer within 20 s")
