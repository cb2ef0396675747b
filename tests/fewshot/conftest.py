"""A character tokenizer, a tiny random Llama, and a task that one adapter of a random bank solves exactly."""

import pytest
import torch

import compose
from compose.adapter import Adapter, LowRank
from compose.bank import Bank
from compose.engine.generate import generate_tokens
from compose.fewshot.loading import LoadedModel
from compose.text.encoding import PromptFormat
from compose.text.examples import Example

EOS = "<|end|>"


def tokenizer_of_letters():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = [*"abcdefghijklmnopqrstuvwxyz", "Ġ", "Ċ"]  # with space and newline as ByteLevel writes them
    vocabulary = {token: index for index, token in enumerate(["<|pad|>", EOS, *letters])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=EOS, pad_token="<|pad|>")


@pytest.fixture(scope="session")
def loaded() -> LoadedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=30, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
        max_position_embeddings=128, pad_token_id=0, bos_token_id=None, eos_token_id=1, initializer_range=0.2,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    return LoadedModel(model, tokenizer_of_letters(), PromptFormat("{input}\n"))


@pytest.fixture(scope="session")
def bank(loaded: LoadedModel) -> Bank:
    """Six adapters of mixed ranks; number 4 misses the attention of every layer."""
    return Bank.from_adapters([_adapter(loaded.model, index, 2 + index % 3) for index in range(6)])


def _adapter(model: torch.nn.Module, index: int, rank: int) -> Adapter:
    generator = torch.Generator().manual_seed(100 + index)
    targets = {}
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lm_head" not in path and not (index == 4 and "self_attn" in path):
            a = torch.randn(rank, module.in_features, generator=generator) / module.in_features**0.5
            b = torch.randn(module.out_features, rank, generator=generator) / rank**0.5
            targets[path] = LowRank(a, b, 1.0)
    return Adapter(f"skill-{index}", "tiny", targets)


@pytest.fixture(scope="session")
def task(loaded: LoadedModel, bank: Bank) -> list[Example]:
    """Twelve examples whose outputs are what the model writes with skill-2: nothing else explains them."""
    prompts = [
        f"say {word}" for word in ("oak", "elm", "ash", "fir", "yew", "bay", "fig", "box", "may", "ivy", "rye", "oat")
    ]
    ids = [loaded.tokenizer(f"{prompt}\n").input_ids for prompt in prompts]
    with compose.attach(loaded.model, bank) as attached, attached.using("skill-2"):
        rows = generate_tokens(loaded.model, ids, max_new_tokens=6, stop_ids=[1])
    outputs = [loaded.tokenizer.decode(row) for row in rows]
    return [Example(prompt, output) for prompt, output in zip(prompts, outputs, strict=True)]
