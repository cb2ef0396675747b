"""MiniLM from the installed package, and hidden states of tiny models with adapters attached."""

import json

import numpy as np
import pytest
import torch

import compose
from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.errors import ComposeError, IncompatibleError
from compose.retriever.encoders import HiddenStateEncoder, SentenceEncoder, load_sentence_transformer
from compose.retriever.retriever import Retriever

TEXTS = ["The weather is lovely today.", "It's so sunny outside!", "He drove to the stadium."]


class WordTokenizer:
    """Ids by the length of the word; what an encoder needs of a tokenizer."""

    def __call__(self, text: str):
        return type("Ids", (), {"input_ids": [1, *(3 + len(word) for word in text.split())]})()

    def get_vocab(self) -> dict[str, int]:
        return {"a": 4}


def test_minilm_gives_the_similarities_of_its_model_card(minilm) -> None:
    vectors = minilm.encode(TEXTS)
    assert (vectors.shape, vectors.dtype, minilm.dim) == ((3, 384), np.float32, 384)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    # Printed in the documentation of sentence-transformers (README, "Getting Started") for this model and texts.
    expected = [[1.0, 0.6660, 0.1046], [0.6660, 1.0, 0.1411], [0.1046, 0.1411, 1.0]]
    np.testing.assert_allclose(vectors @ vectors.T, expected, atol=1e-3)


def test_no_texts_give_no_rows(minilm) -> None:
    assert minilm.encode([]).shape == (0, 384)


def test_rows_do_not_depend_on_their_batch(minilm) -> None:
    alone = np.concatenate([minilm.encode([text]) for text in TEXTS])
    np.testing.assert_allclose(minilm.encode(TEXTS), alone, atol=1e-5)


def test_the_prompt_stands_before_every_text(minilm) -> None:
    prompted = SentenceEncoder.of_model(minilm.model, minilm.id, prompt="query: ")
    np.testing.assert_allclose(prompted.encode(TEXTS), minilm.encode(["query: " + text for text in TEXTS]), atol=1e-6)
    assert prompted.fingerprint == minilm.fingerprint


def test_a_fingerprint_is_the_same_before_and_after_use_and_changes_with_any_part(minilm) -> None:
    again = SentenceEncoder.of_model(minilm.model, "other name")
    assert again.fingerprint == minilm.fingerprint
    length = minilm.model.max_seq_length
    weight = next(minilm.model.parameters())
    try:
        minilm.model.max_seq_length = 17
        assert SentenceEncoder.of_model(minilm.model, "m").fingerprint != minilm.fingerprint
        minilm.model.max_seq_length = length
        with torch.no_grad():
            weight[0, 0] += 1e-3
        assert SentenceEncoder.of_model(minilm.model, "m").fingerprint != minilm.fingerprint
        with torch.no_grad():
            weight[0, 0] -= 1e-3
    finally:
        minilm.model.max_seq_length = length


def test_a_saved_retriever_knows_its_encoder(minilm, tmp_path) -> None:
    examples = {"weather": ["is it sunny", "rain today"], "cars": ["drive a car", "a fast car"]}
    folder = Retriever.fit(minilm, examples).save(tmp_path / "r")
    assert Retriever.load(folder, minilm).top(TEXTS, 1).names == (("weather",), ("weather",), ("cars",))
    with pytest.raises(IncompatibleError, match="prompt '', given 'query: '"):
        Retriever.load(folder, SentenceEncoder.of_model(minilm.model, minilm.id, prompt="query: "))


def test_models_that_are_not_here_are_refused_without_network(minilm, tmp_path) -> None:
    with pytest.raises(ComposeError, match="known without network: all-MiniLM-L6-v2"):
        load_sentence_transformer("nobody/no-such-model", local_files_only=True)
    with pytest.raises(ComposeError, match="cannot load the sentence encoder"):
        load_sentence_transformer(tmp_path)


def test_code_in_a_models_folder_never_runs(minilm, tmp_path) -> None:
    folder = tmp_path / "model"
    minilm.model.save_pretrained(str(folder), create_model_card=False)
    (folder / "modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Own: pass\n")
    modules = json.loads((folder / "modules.json").read_text())
    modules[2]["type"] = "modeling_own.Own"
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ComposeError, match=r"modeling_own\.Own"):
        SentenceEncoder(folder)
    assert not (tmp_path / "ran").exists()


def test_wrong_texts_are_refused(minilm) -> None:
    with pytest.raises(ComposeError, match="a list of strings"):
        minilm.encode("one text")
    with pytest.raises(ComposeError, match="text 2 must be a string, got int"):
        minilm.encode(["a", 3])


def attached_to(model: torch.nn.Module, target: str):
    module = model.get_submodule(target)
    generator = torch.Generator().manual_seed(0)
    out, in_ = module.weight.shape
    update = LowRank(torch.randn(2, in_, generator=generator), torch.randn(out, 2, generator=generator), 1.0)
    return compose.attach(model, Bank.from_adapters([Adapter("strong", "", {target: update})]))


TARGETS = {
    "llama": "model.layers.0.self_attn.q_proj",
    "t5": "encoder.block.0.layer.0.SelfAttention.q",
    "bert": "bert.encoder.layer.0.attention.self.query",
}


@pytest.mark.parametrize("pooling", ["mean", "last"])
@pytest.mark.parametrize("name", sorted(TARGETS))
def test_hidden_states_are_those_of_the_bare_base_pooled(name, pooling, tiny_model) -> None:
    model = tiny_model(name)
    texts = ["a bb ccc", "dddd", "ee f gg h iii"]
    rows = []
    for text in texts:
        ids = torch.tensor([WordTokenizer()(text).input_ids])
        inner = model.get_encoder() if model.config.is_encoder_decoder else model.base_model
        states = inner(input_ids=ids, output_hidden_states=True).hidden_states[-1][0]
        row = states.mean(dim=0) if pooling == "mean" else states[-1]
        rows.append((row / row.norm()).detach().numpy())
    bare = HiddenStateEncoder(model, WordTokenizer(), pooling=pooling, id="tiny")
    np.testing.assert_allclose(bare.encode(texts), np.array(rows), atol=1e-5)
    assert bare.dim == bare.encode(texts).shape[1]
    fingerprint = bare.fingerprint
    with attached_to(model, TARGETS[name]) as attached:
        attached.set("strong")
        encoder = HiddenStateEncoder(attached, WordTokenizer(), pooling=pooling, id="tiny", batch_size=2)
        np.testing.assert_allclose(encoder.encode(texts), np.array(rows), atol=1e-5)
        assert encoder.fingerprint == fingerprint
        assert attached.active is not None
        with pytest.raises(IncompatibleError, match="carries adapters"):
            HiddenStateEncoder(model, WordTokenizer())


def test_adapters_of_peft_are_switched_off(tiny_model) -> None:
    from peft import LoraConfig, get_peft_model

    bare = HiddenStateEncoder(tiny_model("llama"), WordTokenizer(), id="tiny")
    peft = get_peft_model(tiny_model("llama"), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    encoder = HiddenStateEncoder(peft, WordTokenizer(), id="tiny")
    np.testing.assert_allclose(encoder.encode(["a bb"]), bare.encode(["a bb"]), atol=1e-6)
    assert encoder.fingerprint == bare.fingerprint


def test_layer_pooling_and_length_are_part_of_the_fingerprint(tiny_model) -> None:
    model = tiny_model("llama")
    variants = [{}, {"layer": 1}, {"pooling": "last"}, {"max_length": 3}]
    prints = {HiddenStateEncoder(model, WordTokenizer(), **options).fingerprint for options in variants}
    assert len(prints) == 4
    assert HiddenStateEncoder(model, WordTokenizer(), id="x").id == "hidden-states:x:layer=-1:pooling=mean"


def test_wrong_layers_poolings_and_empty_texts_are_refused(tiny_model) -> None:
    model = tiny_model("llama")
    with pytest.raises(ComposeError, match=r"layer must lie in \[-4, 3\], got 9"):
        HiddenStateEncoder(model, WordTokenizer(), layer=9).encode(["a"])
    with pytest.raises(ComposeError, match="'mean' or 'last'"):
        HiddenStateEncoder(model, WordTokenizer(), pooling="max")

    class Empty(WordTokenizer):
        def __call__(self, text: str):
            return type("Ids", (), {"input_ids": []})()

    with pytest.raises(ComposeError, match="text 1 has no tokens"):
        HiddenStateEncoder(model, Empty()).encode([""])
