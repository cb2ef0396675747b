"""Pieces of a text per token join to the text."""

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from compose.text.pieces import token_texts


def byte_level() -> PreTrainedTokenizerFast:
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE({text: index for index, text in enumerate(alphabet)}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=core)


def metaspace() -> PreTrainedTokenizerFast:
    words = ["<unk>", "▁a", "▁bc", "d"]
    core = Tokenizer(models.WordLevel({text: index for index, text in enumerate(words)}, unk_token="<unk>"))
    core.decoder = decoders.Metaspace()
    return PreTrainedTokenizerFast(tokenizer_object=core, unk_token="<unk>")


@pytest.mark.parametrize("text", ["a bc", " two  spaces\n", ""])
def test_the_pieces_are_the_text(text: str) -> None:
    tokenizer = byte_level()
    pieces = token_texts(tokenizer, tokenizer(text).input_ids)
    assert "".join(pieces) == text
    assert len(pieces) == len(text)


def test_spaces_before_words_are_kept() -> None:
    assert token_texts(metaspace(), [1, 2, 3]) == ["a", " bc", "d"]


def test_a_character_of_several_tokens_has_a_piece_for_each() -> None:
    tokenizer = byte_level()
    pieces = token_texts(tokenizer, tokenizer("aéb").input_ids)
    assert (pieces[0], len(pieces), pieces[-1]) == ("a", 4, "b")
