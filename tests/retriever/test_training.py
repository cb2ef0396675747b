"""Training on a small random encoder: what is learnt carries over to tasks that were not trained on."""

import json
import random
import re

import numpy as np
import pytest
import torch

from compose.errors import ComposeError, DuplicateNameError
from compose.retriever.encoders import SentenceEncoder
from compose.retriever.training import REPORT_FILE, TrainingSettings, train_retriever

SETTINGS = {"prompt": "task: ", "unseen": ("colours", "metals"), "rounds": 12, "batch_size": 8, "learning_rate": 3e-3}
WORDS = {
    "animals": "cat dog horse cow sheep goat", "colours": "red blue green pink brown white",
    "metals": "iron gold silver copper lead tin", "fruits": "apple pear plum cherry lemon grape",
    "cities": "paris rome london berlin madrid vienna", "tools": "hammer saw drill screw nail plane",
    "body": "hand foot head arm leg nose", "weather": "rain snow wind sun storm fog",
}  # fmt: skip
FRAMES = (
    "tell me about {}", "what is {}", "{} please", "i like {} very much", "show {}", "a story of {}", "find {} now",
    "where is the {}", "the {} and the {}", "no {}",
)  # fmt: skip


def texts() -> dict[str, list[str]]:
    generator = random.Random(0)
    return {
        task: list(dict.fromkeys(frame.format(*generator.sample(words.split(), 2)) for frame in FRAMES * 2))
        for task, words in WORDS.items()
    }


@pytest.fixture(scope="module")
def untrained(minilm, tmp_path_factory) -> str:
    """MiniLM's tokenizer over a random BERT of one narrow layer."""
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.base.modules import Transformer
    from sentence_transformers.sentence_transformer.modules import Pooling
    from transformers import BertConfig, BertModel
    from transformers.utils import logging

    folder = tmp_path_factory.mktemp("encoder")
    config = BertConfig(
        vocab_size=30522, hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(0)
    logging.disable_progress_bar()
    BertModel(config).save_pretrained(folder / "bert")
    minilm.model.tokenizer.save_pretrained(folder / "bert")
    transformer = Transformer(str(folder / "bert"), max_seq_length=16)
    SentenceTransformer(modules=[transformer, Pooling(32)], device="cpu").save_pretrained(
        str(folder / "encoder"), create_model_card=False
    )
    return str(folder / "encoder")


@pytest.fixture(scope="module")
def trained(untrained, tmp_path_factory):
    out = tmp_path_factory.mktemp("trained") / "encoder"
    return out, train_retriever(texts(), TrainingSettings(model=untrained, **SETTINGS), out=out)


def test_recall_rises_on_seen_tasks_and_the_loss_falls(trained) -> None:
    _, (_, report) = trained
    assert report["after"]["seen"]["mean"]["top1"] > report["before"]["seen"]["mean"]["top1"] + 0.15
    losses = report["losses"]
    assert len(losses) == report["steps"]
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])


def test_unseen_tasks_are_measured_apart_and_never_trained_on(trained) -> None:
    _, (_, report) = trained
    assert report["tasks"]["unseen"] == ["colours", "metals"]
    assert not set(report["tasks"]["seen"]) & set(report["tasks"]["unseen"])
    for when in ("before", "after"):
        assert set(report[when]) == {"seen", "unseen"}
        for group in report[when].values():
            assert group["queries"] > 0
            for method in ("mean", "lda"):
                assert 0 <= group[method]["top1"] <= group[method]["top3"] <= group[method]["top5"] <= 1


def test_the_saved_encoder_is_the_trained_one_with_its_prompt(trained) -> None:
    out, (encoder, report) = trained
    loaded = SentenceEncoder(out)
    assert loaded.prompt == encoder.prompt == "task: "
    assert loaded.id == encoder.id == str(out)
    np.testing.assert_allclose(loaded.encode(["a red cat"]), encoder.encode(["a red cat"]), atol=1e-6)
    assert loaded.fingerprint == encoder.fingerprint == report["fingerprint"]["after"]
    assert report["fingerprint"]["before"] != report["fingerprint"]["after"]
    assert json.loads((out / REPORT_FILE).read_text()) == json.loads(json.dumps(report))


def test_a_seed_decides_everything_and_no_global_state_is_touched(trained, untrained, tmp_path, capfd) -> None:
    _, (encoder, report) = trained
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    expected = random.random(), np.random.random(), float(torch.rand(1))
    random.seed(3), np.random.seed(3), torch.manual_seed(3)
    again = train_retriever(texts(), TrainingSettings(model=untrained, **SETTINGS), out=tmp_path / "again")
    assert (random.random(), np.random.random(), float(torch.rand(1))) == expected
    assert again.report["losses"] == report["losses"]
    assert again.encoder.fingerprint == encoder.fingerprint
    assert capfd.readouterr() == ("", "")


def test_what_is_there_is_replaced_only_when_asked(untrained, tmp_path) -> None:
    (tmp_path / "old").mkdir()
    with pytest.raises(DuplicateNameError, match="overwrite=True"):
        train_retriever(texts(), out=tmp_path / "old")
    settings = TrainingSettings(model=untrained, rounds=1, unseen=0.0)
    lines: list[str] = []
    train_retriever(texts(), settings, out=tmp_path / "old", overwrite=True, progress=lines.append)
    assert (tmp_path / "old" / REPORT_FILE).is_file()
    assert [path.name for path in tmp_path.iterdir()] == ["old"]
    assert "pairs of 8 tasks" in lines[1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"batch_size": 1}, "batch_size must be at least 2, got 1"),
        ({"rounds": 0, "seed": -1}, "rounds must be at least 1, got 0; seed must be at least 0"),
        ({"temperature": 0.0}, "temperature must be above 0"),
        ({"max_length": 0}, "max_length must be at least 1"),
    ],
)
def test_settings_have_ranges(options, message) -> None:
    with pytest.raises(ComposeError, match=re.escape(message)):
        TrainingSettings(**options)
