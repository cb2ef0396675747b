"""Models, adapters and examples of all cases, from one table; weights are random and seeded."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from compose.adapter import Adapter, LowRank
from compose.text.encoding import Encoded

ALL_LINEAR = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
T5_QV = ("q", "v")


@dataclass(frozen=True)
class Shape:
    """A line of the model table.

    Attributes:
        kind: ``"llama"`` or ``"t5"``.
        config: Arguments of the Transformers configuration.
        targets: Last parts of the module paths that adapters stand on.
    """

    kind: str
    config: Mapping[str, Any]
    targets: tuple[str, ...]


def _llama(hidden: int, layers: int, ffn: int, heads: int, vocab: int) -> Shape:
    config = {
        "vocab_size": vocab,
        "hidden_size": hidden,
        "intermediate_size": ffn,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 1024,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    return Shape("llama", config, ALL_LINEAR)


def _t5(width: int, layers: int, ffn: int, heads: int, vocab: int) -> Shape:
    config = {
        "vocab_size": vocab,
        "d_model": width,
        "d_kv": 64,
        "d_ff": ffn,
        "num_layers": layers,
        "num_decoder_layers": layers,
        "num_heads": heads,
        "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False,
        "dropout_rate": 0.0,
        "pad_token_id": 0,
        "eos_token_id": 1,
        "decoder_start_token_id": 0,
    }
    return Shape("t5", config, T5_QV)


MODELS: dict[str, Shape] = {
    "llama-tiny": _llama(32, 2, 48, 4, 64),
    "llama-8m": _llama(256, 8, 688, 8, 4096),
    "llama-20m": _llama(384, 8, 1024, 6, 8192),
    "llama-demo": _llama(192, 6, 512, 6, 258),
    "t5-tiny": _t5(32, 2, 48, 2, 64),
    "t5-35m": _t5(512, 6, 1024, 6, 2048),
    "t5-large": _t5(1024, 24, 2816, 16, 32128),
}


def build(name: str, *, device: str = "cpu", dtype: torch.dtype = torch.float32, seed: int = 0) -> Any:
    """Return the model of a table line in evaluation mode; equal seeds give equal weights."""
    from transformers import LlamaConfig, LlamaForCausalLM, T5Config, T5ForConditionalGeneration

    shape = MODELS[name]
    torch.manual_seed(seed)
    with torch.device(device):
        if shape.kind == "llama":
            model: Any = LlamaForCausalLM(LlamaConfig(**shape.config))
        else:
            model = T5ForConditionalGeneration(T5Config(**shape.config))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model.to(dtype).eval()


def adapter_targets(model: nn.Module, name: str) -> dict[str, nn.Linear]:
    """Return path -> linear layer of everything the table line's adapters stand on."""
    wanted = MODELS[name].targets
    return {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, nn.Linear) and path.split(".")[-1] in wanted
    }


def random_adapters(model: nn.Module, name: str, count: int, rank: int, *, strength: float = 0.2) -> list[Adapter]:
    """Return ``count`` float32 adapters of one rank with alpha = 2 * rank, on the CPU.

    An entry of a delta has ``strength`` times the standard deviation of an entry of its weight.
    """
    layers = adapter_targets(model, name)
    widths = {path: (layer.in_features, layer.out_features, _spread(layer)) for path, layer in layers.items()}
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "target_modules": list(MODELS[name].targets)}
    adapters = []
    for number in range(count):
        generator = torch.Generator().manual_seed(1000 + number)
        targets = {}
        for path, (width_in, width_out, spread) in widths.items():
            a = torch.randn(rank, width_in, generator=generator) / rank**0.5
            b = torch.randn(width_out, rank, generator=generator) * (strength * spread / 2.0)
            targets[path] = LowRank(a, b, 2.0)
        adapters.append(Adapter(f"adapter-{number}", "benchmark", targets, config))
    return adapters


def _spread(layer: nn.Linear) -> float:
    return float(layer.weight.detach().float().std())


def random_examples(vocab: int, prompts: Sequence[int], responses: Sequence[int], *, seed: int = 0) -> list[Encoded]:
    """Return examples of the given prompt and response lengths with random tokens above the special ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocab, (length,), generator=generator).tolist())

    return [Encoded(draw(prompt), draw(response)) for prompt, response in zip(prompts, responses, strict=True)]
