"""``compose retriever``: describing a saved one, and training its encoder through the real program."""

import json
from pathlib import Path

import numpy as np
import pytest
from typer.testing import CliRunner

from compose.cli.main import build_app
from compose.retriever.retriever import Retriever

TASKS = {
    "animals": "cat dog horse cow sheep goat", "metals": "iron gold silver copper lead tin",
    "fruits": "apple pear plum cherry lemon grape", "cities": "paris rome london berlin madrid vienna",
}  # fmt: skip


def run(*arguments: object):
    return CliRunner().invoke(build_app(), list(map(str, arguments)), env={"COLUMNS": "200"})


class Letters:
    """An encoder of letters."""

    id, fingerprint, prompt, dim = "letters", "f" * 64, "in: ", 26

    def encode(self, texts) -> np.ndarray:
        counts = np.array([[1e-3 + text.count(chr(97 + n)) for n in range(26)] for text in texts], np.float32)
        return counts / np.linalg.norm(counts, axis=1, keepdims=True)


@pytest.fixture(scope="module")
def small_encoder(tmp_path_factory) -> Path:
    """A random BERT of one narrow layer over the words of the tasks, as a sentence-transformers folder."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
    from transformers.utils import logging

    folder = tmp_path_factory.mktemp("encoder")
    words = ["[PAD]", "[UNK]", *" ".join(TASKS.values()).split()]
    core = Tokenizer(models.WordLevel({word: number for number, word in enumerate(words)}, unk_token="[UNK]"))
    core.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]").save_pretrained(
        folder / "bert"
    )
    config = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16,
        max_position_embeddings=32,
    )  # fmt: skip
    logging.disable_progress_bar()
    BertModel(config).save_pretrained(folder / "bert")
    modules = [Transformer(str(folder / "bert"), max_seq_length=16), Pooling(16)]
    SentenceTransformer(modules=modules, device="cpu").save_pretrained(str(folder / "st"), create_model_card=False)
    return folder / "st"


@pytest.fixture(scope="module")
def examples(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("examples") / "tasks.jsonl"
    generator = np.random.default_rng(0)
    rows = [
        {"task": task, "prompt": " ".join(generator.choice(words.split(), 2, replace=False))}
        for task, words in TASKS.items()
        for _ in range(15)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def trained(small_encoder, examples, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "encoder"
    options = ("--encoder", small_encoder, "--prompt", "task: ", "--unseen", "metals", "--rounds", 3, "--lr", 1e-2)
    return out, run("retriever", "train", "--examples", examples, *options, "--out", out)


def test_training_writes_an_encoder_and_prints_recall_of_seen_and_unseen_tasks(trained) -> None:
    out, result = trained
    assert result.exit_code == 0, result.output
    report = json.loads((out / "report.json").read_text())
    assert report["tasks"] == {"seen": ["animals", "cities", "fruits"], "unseen": ["metals"]}
    assert "unseen (" in result.stdout
    assert "seen (" in result.stdout
    after = report["after"]["seen"]["mean"]["top1"]
    assert f"-> {100 * after:.1f}" in result.stdout
    assert "pairs of 3 tasks" in result.stderr


def test_the_encoder_is_there_for_retrieve_with_its_prompt(trained, examples, tmp_path) -> None:
    out, _ = trained
    labelled = tmp_path / "labelled.jsonl"
    lines = [json.loads(line) for line in examples.read_text().splitlines()]
    labelled.write_text("".join(json.dumps(line) + "\n" for line in lines))
    result = run("retrieve", "apple pear", "--examples", labelled, "--encoder", out, "--json")
    assert result.exit_code == 0, result.output
    answer = json.loads(result.stdout)
    assert answer["encoder"]["prompt"] == "task: "
    assert answer["results"][0]["adapters"][0]["name"] == "fruits"


def test_a_saved_retriever_is_described(tmp_path) -> None:
    made = Retriever.fit(Letters(), {"a": ["aaa", "aab"], "z": ["zzz", "zzy"]}, "mean").calibrated(["aa"])
    made.save(tmp_path / "r")
    shown = run("retriever", "--retriever", tmp_path / "r")
    assert shown.exit_code == 0, shown.output
    for words in ("letters", "'in: '", "f" * 64, "a, z", "refused"):
        assert words in shown.stdout
    facts = json.loads(run("retriever", "--retriever", tmp_path / "r", "--json").stdout)
    assert (facts["adapters"], facts["method"], facts["vectors"], facts["names"]) == (2, "mean", 2, ["a", "z"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["retriever"], "--retriever FOLDER"),
        (["retriever", "--retriever", "/nowhere"], "/nowhere"),
        (["retriever", "train"], "missing --examples FILE and --out DIR"),
        (["retriever", "train", "--examples", "{file}", "--out", "{folder}"], "--force"),
        (["retriever", "train", "--examples", "/nowhere.jsonl", "--out", "{new}"], "no such file"),
        (["retriever", "train", "--examples", "{file}", "--out", "{new}", "--batch-size", "1"], "batch_size"),
        (
            ["retriever", "train", "--examples", "{file}", "--out", "{new}", "--unseen", "metls"],
            "did you mean 'metals'",
        ),
    ],
)
def test_wrong_calls_are_refused(arguments, message, examples, tmp_path) -> None:
    places = {"file": examples, "folder": tmp_path, "new": tmp_path / "new"}
    result = run(*(word.format(**places) for word in arguments))
    assert result.exit_code == 2, result.output
    assert message in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "new").exists()
