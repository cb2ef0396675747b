"""Descriptions: adapters without weights, words about adapters that are here, folders; all lines or none."""

import json
from pathlib import Path

import pytest

from compose.errors import ExamplesError
from compose.hub_index import EmbeddingRecord, Index
from compose.hub_index.descriptions import add_descriptions
from compose.hub_index.ingest import Options, add_tree
from tests.hub_index.folders import make


@pytest.fixture
def index(tmp_path: Path):
    with Index.open(tmp_path / "adapters.db", create=True) as opened:
        yield opened


def lines(path: Path, *records) -> Path:
    path.write_text("".join(json.dumps(one) + "\n" for one in records))
    return path


def test_an_adapter_without_weights_is_found_and_has_no_files(index: Index, tmp_path: Path) -> None:
    told = {
        "name": "sums", "base": "org/toy", "title": "Sums", "summary": "Adds numbers.", "license": "mit",
        "tags": ["arithmetic"], "language": "en", "task_type": "CAUSAL_LM", "hyper": {"lr": 0.1},
        "examples": ["1 + 1", {"input": "2 + 2", "target": "4"}, {"input": "3 + 3", "output": "6"}],
        "scores": [{"task": "gsm8k", "metric": "em", "value": 0.5}],
    }  # fmt: skip
    (outcome,) = add_descriptions(index, lines(tmp_path / "d.jsonl", told), Options())
    assert outcome[:3] == ("sums", "active", f"{tmp_path / 'd.jsonl'}:1")
    record = index.get("sums")
    assert (record.source, record.path, record.base_id) == ("description", "", "org/toy")
    assert [(one.input, one.target) for one in record.examples] == [("1 + 1", ""), ("2 + 2", "4"), ("3 + 3", "6")]
    (hit,) = index.query("numbers", base="org/toy", task="gsm8k", min_score=("gsm8k", "em", 0.4))
    assert hit.adapter.name == "sums"


def test_words_about_an_adapter_that_is_there_keep_its_files(index: Index, tmp_path: Path) -> None:
    add_tree(index, make(tmp_path / "sums"), Options())
    vectors = [
        EmbeddingRecord.from_array([1.0, 2.0], encoder_id="e", encoder_sha256="0" * 64, kind=kind)
        for kind in ("card", "examples")
    ]
    index.put_embeddings({"sums": vectors})
    before = index.get("sums")
    told = {"name": "sums", "summary": "Multiplies numbers.", "scores": [{"task": "t", "metric": "m", "value": 1}]}
    add_descriptions(index, lines(tmp_path / "d.jsonl", told), Options())
    record = index.get("sums")
    assert (record.summary, record.title, record.path) == ("Multiplies numbers.", "Sums", before.path)
    assert (record.sha256, record.modules) == (before.sha256, before.modules)
    assert [one.kind for one in record.embeddings] == ["examples"]  # the card's vector was of other words
    assert [hit.adapter.name for hit in index.query("multiplies")] == ["sums"]


def test_a_line_with_a_folder_takes_the_adapter_in(index: Index, tmp_path: Path) -> None:
    make(tmp_path / "bank" / "one")
    make(tmp_path / "bank" / "two", 1, r=5)
    told = [
        {"name": "first", "path": "bank/one", "summary": "In my words."},
        {"name": "second", "path": "bank/two"},
    ]
    outcomes = add_descriptions(index, lines(tmp_path / "d.jsonl", *told), Options())
    assert [(one.name, one.state) for one in outcomes] == [("first", "active"), ("second", "refused")]
    record = index.get("first")
    assert (record.summary, record.license, record.source) == ("In my words.", "mit", "dir")


def test_all_bad_lines_are_told_at_once_and_nothing_is_written(index: Index, tmp_path: Path) -> None:
    make(tmp_path / "outside" / "x")
    home = tmp_path / "home"
    home.mkdir()
    (home / "link").symlink_to(tmp_path / "outside" / "x", target_is_directory=True)
    bad = [
        ({"name": "fine"}, None),
        ({"nam": "x"}, "unknown field 'nam'; did you mean 'name'?"),
        ({"name": "../x"}, "adapter name must be"),
        ({"name": 3}, "'name' must be a text"),
        ({"name": "a", "summary": 5}, "summary must be text"),
        ({"name": "b", "tags": [1]}, "'tags' must be a list of texts"),
        ({"name": "c", "examples": [{"inputs": "x"}]}, "an example is a text"),
        ({"name": "d", "scores": [{"task": "t"}]}, "a score has task, metric, value"),
        ({"name": "e", "path": "../outside/x"}, "without '..'"),
        ({"name": "f", "path": str(tmp_path / "outside" / "x")}, "below that of this file"),
        ({"name": "g", "path": "link"}, "no such folder below"),
        ({"name": "fine"}, "is also in line 1"),
        ({"name": "h", "hyper": [1]}, "hyper must be"),
    ]
    path = lines(home / "d.jsonl", *(record for record, _ in bad))
    path.write_text(path.read_text() + "{not json\n")
    with pytest.raises(ExamplesError) as caught:
        add_descriptions(index, path, Options())
    told = str(caught.value).splitlines()
    assert len(told) == len(bad)  # all but the first line, and the last one
    for number, (_, message) in enumerate(bad[1:], start=2):
        assert told[number - 2].startswith(f"{path}:{number}: ")
        assert message in told[number - 2]
    assert len(index) == 0


def test_a_file_without_lines_is_told(index: Index, tmp_path: Path) -> None:
    (tmp_path / "d.jsonl").write_text("\n")
    with pytest.raises(ExamplesError, match="'name' and what it does"):
        add_descriptions(index, tmp_path / "d.jsonl", Options())
