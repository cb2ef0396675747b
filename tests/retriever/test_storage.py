import json
import re

import numpy as np
import pytest

from compose.errors import AdapterFormatError, DuplicateNameError, IncompatibleError
from compose.retriever.embeddings import ADAPTER_EMBEDDINGS
from compose.retriever.embeddings.lda import Lda
from compose.retriever.retriever import Retriever
from compose.retriever.storage import FACTS_FILE, VECTORS_FILE

METHODS = [name for name in ADAPTER_EMBEDDINGS if ADAPTER_EMBEDDINGS[name].reads != "factors"]


@pytest.mark.parametrize("method", METHODS)
def test_a_saved_retriever_scores_the_same_to_the_bit(method, words, tasks, tmp_path) -> None:
    retriever = Retriever.fit(words, tasks, method).calibrated(["rain", "bread"], keep=0.5)
    again = Retriever.load(retriever.save(tmp_path / "r"), words)
    np.testing.assert_array_equal(again.scores(["rain", "a bill"]), retriever.scores(["rain", "a bill"]))
    assert (again.names, again.method, again.backend, again.scope) == (
        retriever.names, retriever.method, retriever.backend, retriever.scope,
    )  # fmt: skip
    np.testing.assert_array_equal(again.top(["zebra"]).rejected, retriever.top(["zebra"]).rejected)
    assert sorted(path.name for path in (tmp_path / "r").iterdir()) == [FACTS_FILE, VECTORS_FILE]


def test_options_are_saved(words, tasks, tmp_path) -> None:
    folder = Retriever.fit(words, tasks, Lda(shrinkage=0.5)).save(tmp_path / "r")
    assert Retriever.load(folder, words).method == Lda(shrinkage=0.5)


@pytest.mark.parametrize(
    ("prompt", "fingerprint", "message"),
    [("task: ", "words-1", "prompt '', given 'task: '"), ("", "words-2", "fingerprint 'words-1', given 'words-2'")],
)
def test_another_encoder_or_prompt_is_an_error(prompt, fingerprint, message, words, tasks, tmp_path) -> None:
    folder = Retriever.fit(words, tasks).save(tmp_path / "r")
    with pytest.raises(IncompatibleError, match=re.escape(message)):
        Retriever.load(folder, type(words)(prompt, fingerprint))


def test_a_folder_is_replaced_only_when_asked(words, tasks, tmp_path) -> None:
    folder = Retriever.fit(words, tasks).save(tmp_path / "r")
    with pytest.raises(DuplicateNameError):
        Retriever.fit(words, tasks).save(folder)
    Retriever.fit(words, {"a": ["rain"]}).save(folder, overwrite=True)
    assert Retriever.load(folder, words).names == ("a",)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "version 2, this release reads 1"),
        ({"names": ["a", "a", "b", "c"]}, "distinct"),
        ({"counts": [1, 1, 1]}, "one positive count each"),
        ({"counts": [1, 1, 1, 0]}, "one positive count each"),
        ({"counts": [1, 1, 1, 2]}, "wanted float32"),
        ({"names": []}, "names"),
        ({"method": "ldaa"}, "unknown adapter embedding"),
        ({"options": {"shrinkage": 7}}, "shrinkage must lie in"),
        ({"options": {"other": 7}}, "other"),
        ({"scope": {"kind": "score"}}, "threshold"),
    ],
)
def test_damaged_facts_are_refused(change, message, words, tasks, tmp_path) -> None:
    folder = Retriever.fit(words, tasks).save(tmp_path / "r")
    facts = json.loads((folder / FACTS_FILE).read_text())
    (folder / FACTS_FILE).write_text(json.dumps(facts | change))
    with pytest.raises(AdapterFormatError, match=message):
        Retriever.load(folder, words)


@pytest.mark.parametrize("name", [FACTS_FILE, VECTORS_FILE])
def test_missing_and_truncated_files_are_refused(name, words, tasks, tmp_path) -> None:
    folder = Retriever.fit(words, tasks).save(tmp_path / "r")
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(AdapterFormatError, match=name):
        Retriever.load(folder, words)
    (folder / name).unlink()
    with pytest.raises(AdapterFormatError, match=name):
        Retriever.load(folder, words)


def test_a_missing_field_is_named(words, tasks, tmp_path) -> None:
    folder = Retriever.fit(words, tasks).save(tmp_path / "r")
    facts = json.loads((folder / FACTS_FILE).read_text())
    del facts["encoder"]
    (folder / FACTS_FILE).write_text(json.dumps(facts))
    with pytest.raises(AdapterFormatError, match="encoder"):
        Retriever.load(folder, words)
