"""A small encoder of words for what needs vectors only, and MiniLM, loaded once, for what needs real ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import pytest


class WordEncoder:
    """The sum of one fixed random direction per word: texts that share words lie close together."""

    id = "words"
    dim = 24

    def __init__(self, prompt: str = "", fingerprint: str = "words-1") -> None:
        self.prompt = prompt
        self.fingerprint = fingerprint

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        rows = [sum(self._word(word) for word in (self.prompt + text).split()) for text in texts]
        vectors = np.array(rows, np.float64).reshape(len(texts), self.dim)
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)

    def _word(self, word: str) -> np.ndarray:
        seed = int.from_bytes(hashlib.sha256(word.encode()).digest()[:8], "big")
        return np.random.default_rng(seed).standard_normal(self.dim)


TASKS = {
    "weather": ["rain in paris", "sun in rome today", "will it rain", "snow or rain", "how hot is rome", "wind today"],
    "money": ["pay my bill", "send money", "my bank bill", "money on my account", "bank fees", "pay the bank"],
    "music": ["play a song", "loud song please", "play jazz", "next song", "stop the song", "play it loud"],
    "food": ["bread recipe", "cook rice", "bake bread", "rice or bread", "cook soup", "soup recipe"],
}


@pytest.fixture
def words() -> WordEncoder:
    return WordEncoder()


@pytest.fixture
def tasks() -> dict[str, list[str]]:
    return {name: list(texts) for name, texts in TASKS.items()}


@pytest.fixture(scope="session")
def minilm():
    from compose.retriever.encoders import SentenceEncoder

    return SentenceEncoder()
