"""Vectors of cards and examples: what is embedded, when again, and that another encoder is an error."""

import numpy as np
import pytest

from compose.errors import HubIndexError
from compose.hub_index import AdapterRecord, ExampleRecord, Index
from compose.hub_index.embed import card_text, embed, query_vector


class Letters:
    """Counts letters: an encoder whose vectors can be checked by hand."""

    id = "letters"
    fingerprint = "0" * 64
    prompt = ""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def encode(self, texts):
        self.seen += texts
        rows = np.array([[text.count("a"), text.count("b"), 1.0] for text in texts], np.float32)
        return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.fixture
def index(tmp_path):
    examples = (ExampleRecord(input="aaa"), ExampleRecord(input="b"))
    with Index.open(tmp_path / "adapters.db", create=True) as opened:
        opened.add(AdapterRecord(name="aa", source="description", summary="aaaa", examples=examples))
        opened.add(AdapterRecord(name="bb", source="description", title="bbb", status="quarantined"))
        opened.add(AdapterRecord(name="gone", source="description"))
        opened.remove(["gone"])
        yield opened


def test_the_text_of_a_card_is_its_fields() -> None:
    record = AdapterRecord(
        name="sort_words-v2",
        source="description",
        title="",
        summary="Sorts.",
        tags=("lora", "base:x"),
        datasets=("d",),
    )
    assert card_text(record) == "sort words v2. Sorts. lora. d"
    titled = AdapterRecord(name="sort_words", source="description", title="Sort Words well")
    assert card_text(titled) == "Sort Words well"


def test_everything_that_is_not_removed_gets_one_vector_of_its_card(index: Index) -> None:
    encoder = Letters()
    assert embed(index, encoder) == (("aa", "bb"), (), ())
    assert encoder.seen == ["aa. aaaa", "bbb"]
    assert embed(index, encoder) == ((), ("aa", "bb"), ())
    assert embed(index, encoder, again=True).written == ("aa", "bb")
    (hit,) = index.query(vector=query_vector("aaaa", encoder), k=1)
    assert hit.adapter.name == "aa"


def test_examples_are_the_unit_mean_of_unit_vectors(index: Index) -> None:
    assert embed(index, Letters(), "examples") == (("aa",), (), ("bb",))
    (vector,) = index.get("aa").embeddings
    rows = np.array([[3, 0, 1], [0, 1, 1]]) / np.sqrt([[10], [2]])
    mean = rows.mean(axis=0)
    np.testing.assert_allclose(vector.array(), mean / np.linalg.norm(mean), rtol=1e-6)
    assert vector.kind == "examples"


def test_another_encoder_of_the_name_is_an_error(index: Index) -> None:
    embed(index, Letters())
    other = Letters()
    other.fingerprint = "1" * 64
    with pytest.raises(HubIndexError):
        index.query(vector=query_vector("a", other))
    with pytest.raises(HubIndexError):
        embed(index, other, again=True)
    with pytest.raises(HubIndexError, match="empty text"):
        query_vector(" ", other)
