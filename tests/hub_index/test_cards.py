"""Cards as people and tools write them, and cards written to do harm."""

import time
from pathlib import Path

import pytest

from compose.errors import AdapterFormatError
from compose.hub_index.cards import Card, parse_card, parse_eval_results, read_card

FULL = """---
base_model: meta-llama/Llama-3.2-1B
base_model_relation: adapter
library_name: peft
pipeline_tag: text-generation
license: apache-2.0
language: [en, no]
tags:
- lora
- "base_model:adapter:meta-llama/Llama-3.2-1B"
datasets: gsm8k
model-index:
- name: sums
  results:
  - task: {type: text-generation}
    dataset: {name: GSM8K, type: gsm8k, config: main, split: test}
    metrics:
    - {type: exact_match, value: 0.41, name: EM}
    - {type: f1, value: "0.5"}
    - {type: broken, value: {a: 1}}
---
<!-- generated -->

# Sums for [children](https://example.org) #

[![badge](https://img.example/x.svg)](https://example.org)

Answers **grade school** word problems
step by step.

Second paragraph.

## Training procedure

### Training hyperparameters

- learning_rate: 0.0002
- train_batch_size: 8
- seed: 42
- optimizer: Use adamw_torch with betas=(0.9,0.999)

### Framework versions

- PEFT 0.21.2
- seed: 7
"""


def test_a_full_card_is_read() -> None:
    card = parse_card(FULL.encode(), "card")
    assert card.title == "Sums for children"
    assert card.summary == "Answers grade school word problems step by step."
    assert card.base_models == ("meta-llama/Llama-3.2-1B",)
    assert (card.base_relation, card.license, card.datasets) == ("adapter", "apache-2.0", ("gsm8k",))
    assert card.language == ("en", "no")  # YAML reads a bare no as false
    assert card.tags == ("lora", "base_model:adapter:meta-llama/Llama-3.2-1B", "peft", "text-generation")
    assert [(one.task, one.split, one.metric, one.value, one.harness) for one in card.scores] == [
        ("gsm8k/main", "test", "exact_match", 0.41, "model-index"),
        ("gsm8k/main", "test", "f1", 0.5, "model-index"),
    ]
    assert card.notes == ("card: model-index: 1 results without data set, metric and numeric value left out",)
    assert (card.train_seed, card.hyper["learning_rate"], card.hyper["train_batch_size"]) == (42, 0.0002, 8)


def test_the_template_of_peft_says_nothing() -> None:
    from huggingface_hub import ModelCard, ModelCardData

    template = ModelCard.from_template(ModelCardData(base_model="org/base", library_name="peft"))
    card = parse_card(str(template).encode(), "card")
    assert (card.title, card.base_models, card.tags) == ("", ("org/base",), ("peft",))
    assert "Model ID" not in card.summary
    assert "More Information Needed" not in card.summary


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("---\nlicense: [\n---\n# T\n\nprose\n", "front matter not read"),
        ("---\nlicense: mit\nlicense: gpl\n---\n# T\n\nprose\n", "duplicate key"),
        ("---\na: &x [1]\nb: *x\n---\n# T\n\nprose\n", "aliases"),
        ("---\na: !!python/object/apply:os.system ['true']\n---\n# T\n\nprose\n", "tags (tag:yaml.org,2002:python"),
        ("---\n- a\n---\n# T\n\nprose\n", "keys and values are expected, got list"),
        ("---\na: " + "[" * 3000 + "\n---\n# T\n\nprose\n", "levels deep"),
        ("---\na: '" + "x" * 2**17 + "'\n---\n# T\n\nprose\n", "more than 131072"),
    ],
)
def test_bad_front_matter_is_a_note_and_the_prose_is_kept(text: str, message: str) -> None:
    card = parse_card(text.encode(), "card")
    assert (card.title, card.summary, card.license) == ("T", "prose", "")
    (note,) = card.notes
    assert message in note


@pytest.mark.parametrize(
    "line",
    [
        "[" * 200_000,
        "![" * 100_000,
        "[](" * 70_000,
        "# " + " #" * 100_000,
        "<!--" * 50_000,
        "- a" + "*" * 200_000,
        "---\n" * 50_000,
        "## hyperparameters\n" + "- a: b\n" * 30_000,
    ],
)
def test_no_text_takes_long(line: str) -> None:
    started = time.process_time()
    parse_card(line.encode(), "card")
    assert time.process_time() - started < 1.0


def test_a_card_of_no_use_is_empty() -> None:
    assert parse_card(b"", "card") == Card()
    assert parse_card(b"\xff\xfe\x00", "card").title == ""
    (note,) = parse_card(b"x" * (2**20 + 1), "card").notes
    assert "more than the limit" in note


def test_evaluation_results_are_read_and_bad_entries_named() -> None:
    text = """
- dataset: {id: cais/hle, task_id: default, revision: "5503"}
  value: 20.9
  date: 2025-01-15
  source: {url: "https://example.org", name: CAIS}
- dataset: {id: Idavidrein/gpqa, task_id: gpqa_diamond}
  value: 0.412
- dataset: {id: x}
  value: 1
- value: many
"""
    scores, notes = parse_eval_results(text.encode(), "results")
    assert [(one.task, one.value, one.harness, one.at) for one in scores] == [
        ("cais/hle", 20.9, "CAIS", "2025-01-15"),
        ("Idavidrein/gpqa/gpqa_diamond", 0.412, "eval-results", ""),
    ]
    assert [note.split(" has ")[0] for note in notes] == ["results: entry 3", "results: entry 4"]
    assert parse_eval_results(b"a: 1", "results")[1] == ["results: not read: a list of results is expected, got dict"]


def test_scores_of_a_folder_come_from_both_places(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(FULL)
    (tmp_path / ".eval_results").mkdir()
    (tmp_path / ".eval_results" / "hle.yaml").write_text("- dataset: {id: cais/hle, task_id: default}\n  value: 3\n")
    card = read_card(tmp_path, Path.read_bytes)
    assert [one.task for one in card.scores] == ["cais/hle", "gsm8k/main", "gsm8k/main"]


def test_a_file_that_may_not_be_read_is_a_note(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("# T")

    def refuse(path: Path) -> bytes:
        raise AdapterFormatError(f"{path}: leaves the folder")

    assert read_card(tmp_path, refuse).notes == (f"{tmp_path / 'README.md'}: leaves the folder",)
