"""The retrieval study: its settings, its methods' rows, and that the README shows what its rows say."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from compose.retriever.composition import allowed, first_of
from compose.retriever.retriever import Retrieved

ROOT = Path(__file__).resolve().parents[2]
ROWS = ROOT / "benchmarks" / "retrieval_study_cpu.jsonl"
README = ROOT / "retriever" / "README.md"


@pytest.fixture(scope="module")
def study():
    spec = importlib.util.spec_from_file_location("retrieval_study", ROOT / "benchmarks" / "retrieval_study.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Known:
    """Scores the adapter that a dictionary names for a text 1, the others in falling order."""

    def __init__(self, names, owner) -> None:
        self.names, self.owner = tuple(names), owner

    def scores(self, texts):
        falling = -np.arange(len(self.names), dtype=np.float32)
        return np.stack([np.where(np.array(self.names) == self.owner[text], 1, falling) for text in texts])

    def top(self, texts, k=3, exclude=None):
        indices, best = first_of(np.where(allowed(self.names, len(texts), exclude), self.scores(texts), -np.inf), k)
        names = tuple(tuple(self.names[index] for index in row) for row in indices)
        return Retrieved(names, indices, best, np.zeros(len(texts), bool))


def test_settings_are_shuffled_and_samples_are_no_test_items(study) -> None:
    from compose.demo.tasks import TASKS

    items = {setting: study.items_of(setting, 2, 0) for setting in study.SETTINGS}
    assert [len(given.texts) for given in items.values()] == [72, 72, 24]
    assert items["IID"]._replace(exclude=items["OOD"].exclude) == items["OOD"]
    assert items["OOD"].exclude == items["OOD"].own
    assert items["IID"].exclude is items["new wording"].exclude is None
    assert items["IID"].tasks != sorted(items["IID"].tasks)
    assert set(items["new wording"].own) < set(items["IID"].own)
    assert study.items_of("IID", 2, 1).texts != items["IID"].texts
    samples = {item.input for name in items["IID"].own for item in TASKS[name].sample("retrieval 0", study.SAMPLES)}
    assert not samples & {text for given in items.values() for text in given.texts}


def test_methods_give_rows_of_the_right_adapters(study) -> None:
    items = study.Items(["x", "y", "z"], ["", "", ""], ["a", "b", "a"], ["a", "b", "a"], None)
    retriever = Known("abcd", {"x": "a", "y": "b", "z": "a"})
    rows = {name: study.composed(retriever, items, method) for name, method in study.methods(1.0).items()}
    assert rows["selection"] == ([{"a": 1.0}, {"b": 1.0}, {"a": 1.0}], "outputs")
    assert [list(row) for row in rows["mixture, k = 3"][0]] == [["a", "b", "c"], ["b", "a", "c"], ["a", "b", "c"]]
    assert rows["fusion, k = 3"][1] == rows["SMEAR-like: all, fusion by similarity"][1] == "parameters"
    assert all(len(row) == 4 for row in rows["SMEAR-like: all, fusion by similarity"][0])
    told, mixed = (rows[name][0] for name in rows if name.startswith("AdapterSoup"))
    assert [next(iter(row)) for row in told] == ["a", "b", "a"]
    assert [next(iter(row)) for row in mixed] == ["a", "a", "a"]
    out = items._replace(exclude=items.own)
    assert study.composed(retriever, out, study.methods(1.0)["selection"])[0] == [{"b": 1.0}, {"a": 1.0}, {"b": 1.0}]
    told = study.composed(retriever, out, study.methods(1.0)["AdapterSoup, a corpus per task (told)"])[0]
    assert [set(row) for row in told] == [set("bcd"), set("acd"), set("bcd")]


def test_recalls_count_the_own_adapter(study) -> None:
    items = study.Items(["x", "y"], ["", ""], ["d", "e"], ["d", "e"], None)
    assert study.recalls(Known("abcdef", {"x": "d", "y": "f"}), items) == {"1": 0.5, "3": 0.5, "5": 0.5}
    assert study.recalls(Known("aebcdf", {"x": "a", "y": "f"}), items) == {"1": 0.0, "3": 0.5, "5": 1.0}


def test_tables_hold_means_and_spreads_and_go_between_the_marks(study, tmp_path) -> None:
    config = next(iter(study.CONFIGS))
    rows = [
        {"config": config, "seed": seed, "method": "selection", "setting": "IID", "exact": exact}
        for seed, exact in enumerate((0.5, 1.0))
    ]
    recall = {
        "config": config,
        "seed": 0,
        "embedding": "lda",
        "setting": "IID",
        "recall": {"1": 0.25, "3": 0.5, "5": 1},
    }
    shown = study.tables([*rows, recall])
    assert f"| {config} | selection | 0.75 ± 0.35 | - | - |" in shown
    assert "| MiniLM | lda | 0.25 | 0.50 | 1.00 | - | - | - |" in shown
    file = tmp_path / "page.md"
    file.write_text(f"before\n{study.MARKS[0]}\nold\n{study.MARKS[1]}\nafter\n")
    for _ in range(2):
        study.write_between_marks(file, shown)
        assert file.read_text() == f"before\n{study.MARKS[0]}\n\n{shown}\n\n{study.MARKS[1]}\nafter\n"


def test_the_readme_shows_what_the_rows_say(study) -> None:
    """Where rows are kept, their tables stand between the marks; where none are, nothing does."""
    between = README.read_text().split(study.MARKS[0])[1].split(study.MARKS[1])[0].strip()
    rows = [json.loads(line) for line in ROWS.read_text().splitlines()] if ROWS.exists() else []
    assert between == (study.tables(rows) if rows else "")
