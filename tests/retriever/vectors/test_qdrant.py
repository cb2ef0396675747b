import numpy as np
import pytest
from qdrant_client import QdrantClient, models

from compose.errors import BackendUnavailableError, IncompatibleError
from compose.retriever.vectors import VECTOR_BACKENDS
from compose.retriever.vectors.qdrant import QdrantVectors, is_local


@pytest.fixture
def client():
    made = QdrantClient(location=":memory:")
    yield made
    made.close()


def test_a_client_without_a_server_is_refused(client) -> None:
    with pytest.raises(BackendUnavailableError, match="no server"):
        QdrantVectors(4, client=client)


def test_without_a_server_in_the_environment_there_is_none(monkeypatch) -> None:
    monkeypatch.delenv("QDRANT_URL", raising=False)
    with pytest.raises(BackendUnavailableError, match="set QDRANT_URL"):
        VECTOR_BACKENDS["qdrant"](4)


def test_a_server_is_not_taken_for_a_local_client(client) -> None:
    remote = QdrantClient(url="http://127.0.0.1:9", check_compatibility=False)
    assert (is_local(remote), is_local(client)) == (False, True)
    remote.close()


def test_a_collection_of_another_width_or_distance_is_refused(client) -> None:
    QdrantVectors(4, collection="c", client=client, allow_local=True)
    with pytest.raises(IncompatibleError, match="wanted 5 entries"):
        QdrantVectors(5, collection="c", client=client, allow_local=True)
    vectors = models.VectorParams(size=4, distance=models.Distance.DOT)
    client.create_collection("d", vectors_config=vectors)
    with pytest.raises(IncompatibleError, match="cosine distance"):
        QdrantVectors(4, collection="d", client=client, allow_local=True)


def test_a_collection_that_is_gone_is_told(client, tmp_path) -> None:
    backend = QdrantVectors(4, collection="c", client=client, allow_local=True)
    backend.add(["a"], np.eye(4, dtype=np.float32)[:1])
    folder = backend.persist(tmp_path / "v")
    assert len(QdrantVectors.restore(folder, client=client, allow_local=True)) == 1
    client.delete_collection("c")
    with pytest.raises(IncompatibleError, match="no collection 'c'"):
        QdrantVectors.restore(folder, client=client, allow_local=True)
