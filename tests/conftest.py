"""Shared fixtures: a fixed seed per test, few threads, and tiny random models of every architecture."""

from __future__ import annotations

import gc
import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # read when a kernel's module is imported


def pytest_collection_finish() -> None:
    """Modules and collected tests stay: the garbage collector need not look through them again and again."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session", autouse=True)
def _threads() -> None:
    torch.set_num_threads(1)  # models here are too small for a second thread to pay


@pytest.fixture(scope="session")
def warm_python():
    """Processes that start with torch and transformers imported; see ``warm_python.py``."""
    from tests.warm_python import WarmPython

    python = WarmPython()
    yield python
    python.close()


def _tiny_llama() -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return LlamaForCausalLM(config)


def _tiny_gpt2() -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=67, n_embd=32, n_layer=2, n_head=4, n_positions=64, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    return GPT2LMHeadModel(config)


def _tiny_t5() -> torch.nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=67, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4, pad_token_id=0,
        eos_token_id=2, decoder_start_token_id=0,
    )  # fmt: skip
    return T5ForConditionalGeneration(config)


def _tiny_bert() -> torch.nn.Module:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=67, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=64, num_labels=3, pad_token_id=0,
    )  # fmt: skip
    return BertForSequenceClassification(config)


TINY_MODELS = {"llama": _tiny_llama, "gpt2": _tiny_gpt2, "t5": _tiny_t5, "bert": _tiny_bert}


@pytest.fixture(params=sorted(TINY_MODELS))
def any_model(request: pytest.FixtureRequest) -> torch.nn.Module:
    """Every architecture in turn, random weights, evaluation mode."""
    torch.manual_seed(0)
    return TINY_MODELS[request.param]().eval()


@pytest.fixture(scope="session")
def tiny_model():
    """Return a factory: ``tiny_model("llama")``."""

    def make(name: str) -> torch.nn.Module:
        torch.manual_seed(0)
        return TINY_MODELS[name]().eval()

    return make


@pytest.fixture
def run_model():
    """Return a function that runs any tiny model on a fixed batch and returns its logits."""

    def run(model: torch.nn.Module, rows: int = 3, tokens: int = 7, **more) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1)
        inputs = {"input_ids": torch.randint(3, 67, (rows, tokens), generator=generator), **more}
        if model.config.is_encoder_decoder:
            inputs["decoder_input_ids"] = torch.randint(3, 67, (rows, 5), generator=generator)
        return model(**inputs).logits

    return run
