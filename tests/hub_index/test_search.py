"""Queries: any text is safe, filters mean what they say, and the two rankings become one by the stated rule."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from compose.errors import HubIndexError
from compose.hub_index import search
from compose.hub_index.records import AdapterRecord, EmbeddingRecord, ScoreRecord
from compose.hub_index.search import Filters, fuse, match_expression
from compose.hub_index.store import Index


@pytest.fixture(scope="module")
def filled(tmp_path_factory: pytest.TempPathFactory, make_record):
    with Index.open(tmp_path_factory.mktemp("search") / "hub.db", create=True) as opened:
        opened.add_all(make_record(number) for number in range(200))
        yield opened


@pytest.fixture
def small(index):
    """Four adapters with little text, to rank by hand."""
    texts = {"a": "german news", "b": "translation to german", "c": "sums of numbers", "d": "german german german"}
    for number, (name, text) in enumerate(texts.items()):
        index.add(AdapterRecord(name=name, sha256_weights=str(number) * 64, summary=text))
    return index


def found(index: Index, *arguments: object, **options: object) -> list[str]:
    return [hit.adapter.name for hit in index.query(*arguments, **options)]


def test_words_are_found_in_any_form_and_any_order(small) -> None:
    assert found(small, "translate") == ["b"]
    assert found(small, "TRANSLATIONS") == ["b"]
    assert set(found(small, "numbers german")) == {"a", "b", "c", "d"}
    assert found(small, "numbers german")[0] == "c"
    assert found(small, "french") == []


def test_more_of_a_rare_word_ranks_higher_and_scores_do_not_increase(small) -> None:
    hits = small.query("german")
    assert hits[0].adapter.name == "d"
    assert [hit.score for hit in hits] == sorted((hit.score for hit in hits), reverse=True)
    assert [hit.score for hit in hits] == [-hit.bm25 for hit in hits]


def test_a_word_of_the_name_counts_more_than_one_of_the_summary(index) -> None:
    index.add(AdapterRecord(name="sql", sha256_weights="1" * 64, summary="queries for tables and more"))
    index.add(AdapterRecord(name="other", sha256_weights="2" * 64, summary="queries for sql tables, more"))
    index.add(AdapterRecord(name="third", sha256_weights="3" * 64, summary="nothing of the kind is in here"))
    assert found(index, "sql") == ["sql", "other"]


def test_the_tags_and_datasets_are_texts_too(index) -> None:
    index.add(AdapterRecord(name="a", sha256_weights="1" * 64, tags=("röntgen",), datasets=("org/flan_v2",)))
    assert found(index, "rontgen") == found(index, "flan") == ["a"]


@pytest.mark.parametrize(
    "text",
    ['"', "a AND", "a NOT b", "NEAR(a b)", "(", "a*", "^a", "name:a", "-a", "+", "{a b}:c", "\0", "a\0b", "' OR",
     "\U0001f600", "日本語", "x" * 100_000, "word " * 5_000, "", " ", "\ufeff", "a\u0301", '""', "a OR OR b"],
)  # fmt: skip
def test_nothing_a_person_types_is_an_operator(small, text: str) -> None:
    small.query(text)
    assert len(small) == 4


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.text(max_size=30))
def test_any_text_is_safe(filled, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        with pytest.raises(HubIndexError, match="valid Unicode"):
            filled.query(text)
        return
    assert len(filled.query(text, k=3)) <= 3


def test_operators_are_words(index) -> None:
    index.add(AdapterRecord(name="a", sha256_weights="1" * 64, summary="this not that"))
    assert found(index, "not") == ["a"]
    assert found(index, "that NOT this") == ["a"]
    assert match_expression('say "x" AND -y*') == '"say" OR "x" OR "AND" OR "-y*"'


def test_the_first_64_words_count() -> None:
    assert match_expression(" ".join(f"w{number}" for number in range(100))).count(" OR ") == 63
    assert match_expression("a a a") == '"a"'


def test_half_of_a_surrogate_pair_is_refused(small) -> None:
    with pytest.raises(HubIndexError, match="valid Unicode"):
        small.query("\ud800")
    with pytest.raises(HubIndexError, match="valid Unicode"):
        small.query(base="\ud800")


FILTERS = [
    ({"base": "organisation/base-3"}, lambda one: one.base_id == "organisation/base-3"),
    ({"task": "SQL"}, lambda one: "sql" in one.tags),
    ({"task": "data-7"}, lambda one: "data-7" in one.datasets),
    ({"task": "boolq"}, lambda one: any(score.task == "boolq" for score in one.scores)),
    ({"rank": (8, 16)}, lambda one: one.rank_min >= 8 and one.rank_max <= 16),
    ({"license": "MIT"}, lambda one: one.license == "mit"),
    ({"min_score": ("xsum", "accuracy", 0.5)},
     lambda one: any((score.task, score.value >= 0.5) == ("xsum", True) for score in one.scores)),
    ({"base": "organisation/base-1", "rank": (4, 8), "license": "apache-2.0"},
     lambda one: (one.base_id, one.license) == ("organisation/base-1", "apache-2.0") and one.rank_max <= 8),
    ({"base": "nobody/knows"}, lambda one: False),
]  # fmt: skip


@pytest.mark.parametrize("few", [20_000, 3], ids=["looked up", "asked row by row"])
@pytest.mark.parametrize(("filters", "passes"), FILTERS, ids=[str(filters) for filters, _ in FILTERS])
def test_a_filter_keeps_exactly_those_that_pass(
    filled, make_record, numbered, monkeypatch: pytest.MonkeyPatch, filters: dict, passes, few: int
) -> None:
    monkeypatch.setattr(search, "_FEW", few)
    wanted = {record.name for record in map(make_record, range(200)) if passes(record)}
    vector = numbered.vector("query")
    assert {one.name for one in filled.ls(Filters(**filters))} == wanted
    assert set(found(filled, k=200, **filters)) == wanted
    assert set(found(filled, vector=vector, k=200, **filters)) == wanted
    assert set(found(filled, "adapter", k=200, **filters)) == wanted
    everything = found(filled, vector=vector, k=200)
    assert found(filled, vector=vector, k=5, **filters) == [name for name in everything if name in wanted][:5]
    assert (
        found(filled, "sql french", k=5, **filters)
        == [name for name in found(filled, "sql french", k=200) if name in wanted][:5]
    )


def test_a_base_is_found_by_its_fingerprint(filled, make_record) -> None:
    record = make_record(5)
    assert found(filled, base=record.base_fingerprint, k=200) == found(filled, base=record.base_id, k=200)


def test_only_active_adapters_are_found_unless_asked_for(small) -> None:
    small.update("a", status="quarantined", reasons=["x"])
    small.remove(["b"])
    assert set(found(small, "german")) == {"d"}
    assert set(found(small, "german", status="quarantined")) == {"a"}
    assert set(found(small, "german", status="removed")) == {"b"}
    assert set(found(small, "german", status="any")) == {"a", "b", "d"}


def test_without_text_and_vector_the_order_is_by_name(filled) -> None:
    hits = filled.query(k=3)
    assert [hit.adapter.name for hit in hits] == ["adapter-0000000", "adapter-0000001", "adapter-0000002"]
    assert {(hit.score, hit.cosine, hit.bm25) for hit in hits} == {(0.0, None, None)}


def test_reciprocal_rank_fusion_by_hand() -> None:
    rows, scores = fuse([[1, 2, 3], [3, 4, 1]])
    assert rows == [1, 3, 2, 4]
    assert scores == pytest.approx([1 / 61 + 1 / 63, 1 / 63 + 1 / 61, 1 / 62, 1 / 62])
    assert fuse([[5, 2]]).rows == [5, 2]
    assert fuse([[], []]).rows == []


def test_a_text_and_a_vector_are_fused_by_rank(filled, numbered) -> None:
    vector = numbered.vector("query")
    depth = search.depth(5)
    by_text = found(filled, "translate sql", k=depth)
    by_vector = found(filled, vector=vector, k=depth)
    sums = {
        name: sum(1 / (60 + 1 + ranking.index(name)) for ranking in (by_text, by_vector) if name in ranking)
        for name in {*by_text, *by_vector}
    }
    hits = filled.query("translate sql", vector=vector, k=5)
    assert [hit.score for hit in hits] == pytest.approx(sorted(sums.values(), reverse=True)[:5])
    assert all(hit.score == pytest.approx(sums[hit.adapter.name]) for hit in hits)
    assert hits[0].cosine is not None or hits[0].bm25 is not None


def test_a_vector_of_another_encoder_is_an_error_never_a_score(filled, numbered) -> None:
    one = numbered.vector("query")
    changes = {
        "encoder_sha256": ("c" * 64, "sha256 'abab.*' in the index, 'cccc"),
        "prompt": ("Query: ", "prompt 'Represent: ' in the index, 'Query: ' given"),
        "vector": (one.vector * 2, "entries 16 in the index, 32 given"),
        "encoder_id": ("other", r"no vectors of encoder 'other' \(card\); known: benchmark-encoder \(card\)"),
        "kind": ("weights", r"no vectors of encoder 'benchmark-encoder' \(weights\)"),
    }
    for field, (value, message) in changes.items():
        with pytest.raises(HubIndexError, match=message):
            filled.query(vector=replace(one, **{field: value}))
        with pytest.raises(HubIndexError, match=message):
            filled.query("sql", vector=replace(one, **{field: value}))


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        ({"status": "gone"}, "status must be one of"),
        ({"rank": (8, 4)}, "rank must be"),
        ({"rank": (-1, 4)}, "rank must be"),
        ({"rank": ("4", "8")}, "rank must be"),
        ({"min_score": ("t", "m")}, "min_score must be"),
        ({"min_score": ("t", "m", math.nan)}, "min_score must be"),
        ({"min_score": ("t", "m", "high")}, "min_score must be"),
        ({"k": 0}, "k must be a whole number"),
        ({"k": True}, "k must be"),
        ({"k": 10**9}, "k must be"),
        ({"base": 3}, "a query is text"),
    ],
)
def test_a_filter_that_cannot_be_is_refused(filled, filters: dict, message: str) -> None:
    with pytest.raises(HubIndexError, match=message):
        filled.query(**filters)


def test_a_score_at_the_limit_passes(index) -> None:
    score = ScoreRecord(task="t", metric="m", value=0.75)
    index.add(AdapterRecord(name="a", sha256_weights="1" * 64, scores=(score,)))
    assert found(index, min_score=("t", "m", 0.75)) == ["a"]
    assert found(index, min_score=("t", "m", 0.7500001)) == []


def test_adapters_without_a_vector_are_found_by_text_in_a_fused_query(index) -> None:
    vector = EmbeddingRecord.from_array([1.0, 0.0], encoder_id="e", encoder_sha256="a" * 64, kind="card")
    index.add(AdapterRecord(name="text", sha256_weights="1" * 64, summary="german"))
    index.add(AdapterRecord(name="vector", sha256_weights="2" * 64, embeddings=(vector,)))
    hits = {hit.adapter.name: hit for hit in index.query("german", vector=vector)}
    assert hits["text"].cosine is None
    assert hits["vector"].bm25 is None
    assert hits["text"].score == hits["vector"].score == pytest.approx(1 / 61)
