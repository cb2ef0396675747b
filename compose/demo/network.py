"""The demo's Llama as one function of its parameters, so that many adapters can be trained or searched in one batch.

Parameter names are those of ``transformers.LlamaForCausalLM``; the test suite compares the two.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

PAD_ID, END_ID = 256, 257
TARGETS = (
    "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj",
    "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
)  # fmt: skip

# (layer, target, input of the linear) -> what is added to its output, or None
Delta = Callable[[int, str, Tensor], Tensor | None]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of the base model."""

    hidden: int = 192
    layers: int = 6
    heads: int = 6
    mlp: int = 512
    vocabulary: int = 258
    rope_theta: float = 10000.0
    norm_epsilon: float = 1e-5

    def dimensions(self, target: str) -> tuple[int, int]:
        """(in, out) of a target."""
        inner = {"mlp.gate_proj": (self.hidden, self.mlp), "mlp.up_proj": (self.hidden, self.mlp)}
        return inner.get(target, (self.mlp, self.hidden) if target == "mlp.down_proj" else (self.hidden, self.hidden))


def initial_parameters(shape: Shape, seed: int) -> dict[str, Tensor]:
    """Random float32 parameters under their Hugging Face names (the output matrix is the embedding)."""
    generator = torch.Generator().manual_seed(seed)
    parameters = {"model.embed_tokens.weight": torch.randn(shape.vocabulary, shape.hidden, generator=generator) * 0.05}
    for layer in range(shape.layers):
        for target in TARGETS:
            wide, out = shape.dimensions(target)
            depth = (2 * shape.layers) ** -0.5 if target.endswith(("o_proj", "down_proj")) else 1.0
            weight = torch.randn(out, wide, generator=generator) * wide**-0.5 * depth
            parameters[f"model.layers.{layer}.{target}.weight"] = weight
        for norm in ("input_layernorm", "post_attention_layernorm"):
            parameters[f"model.layers.{layer}.{norm}.weight"] = torch.ones(shape.hidden)
    parameters["model.norm.weight"] = torch.ones(shape.hidden)
    return parameters


def hidden_states(shape: Shape, parameters: dict[str, Tensor], x: Tensor, delta: Delta | None = None) -> Tensor:
    """Final hidden states ``(*, T, D)`` of embedded inputs ``(*, T, D)`` under causal attention."""
    rotary = _rotary(shape, x.shape[-2], x.device, x.dtype)
    for layer in range(shape.layers):
        x = x + _attention(shape, parameters, layer, x, rotary, delta)
        prefix = f"model.layers.{layer}."
        inner = _norm(x, parameters[prefix + "post_attention_layernorm.weight"], shape.norm_epsilon)
        gate = _linear(parameters, layer, "mlp.gate_proj", inner, delta)
        up = _linear(parameters, layer, "mlp.up_proj", inner, delta)
        x = x + _linear(parameters, layer, "mlp.down_proj", functional.silu(gate) * up, delta)
    return _norm(x, parameters["model.norm.weight"], shape.norm_epsilon)


def response_loss(hidden: Tensor, embedding: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Cross-entropy and correctness of every response token of ``tokens (*, T)``; zero and true elsewhere.

    The response is what follows the first newline, up to and including the end token.
    """
    targets = tokens[..., 1:]
    mask = ((tokens == 10).cumsum(-1)[..., :-1] > 0) & (targets != PAD_ID)
    logits = functional.linear(hidden[..., :-1, :][mask], embedding).float()
    loss = torch.zeros(mask.shape, device=tokens.device)
    loss[mask] = functional.cross_entropy(logits, targets[mask], reduction="none")
    correct = torch.ones_like(mask)
    correct[mask] = logits.argmax(-1) == targets[mask]
    return loss, correct


def _attention(
    shape: Shape,
    parameters: dict[str, Tensor],
    layer: int,
    x: Tensor,
    rotary: tuple[Tensor, Tensor],
    delta: Delta | None,
) -> Tensor:
    inner = _norm(x, parameters[f"model.layers.{layer}.input_layernorm.weight"], shape.norm_epsilon)
    q, k, v = (
        _linear(parameters, layer, f"self_attn.{name}_proj", inner, delta)
        .unflatten(-1, (shape.heads, shape.hidden // shape.heads))
        .transpose(-3, -2)
        for name in "qkv"
    )
    leading = q.shape[:-3]
    q, k, v = (part.flatten(0, -4) for part in (_rotate(q, rotary), _rotate(k, rotary), v))
    mixed = functional.scaled_dot_product_attention(q, k, v, is_causal=True).unflatten(0, leading)
    return _linear(parameters, layer, "self_attn.o_proj", mixed.transpose(-3, -2).flatten(-2), delta)


def _linear(parameters: dict[str, Tensor], layer: int, target: str, x: Tensor, delta: Delta | None) -> Tensor:
    out = functional.linear(x, parameters[f"model.layers.{layer}.{target}.weight"])
    change = None if delta is None else delta(layer, target, x)
    return out if change is None else out + change


def _norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    return functional.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), epsilon)


def _rotary(shape: Shape, length: int, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    size = shape.hidden // shape.heads
    frequency = shape.rope_theta ** (-torch.arange(0, size, 2, device=device).float() / size)
    angle = torch.outer(torch.arange(length, device=device).float(), frequency).repeat(1, 2)
    return angle.cos().to(dtype), angle.sin().to(dtype)


def _rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * rotary[0] + torch.cat((-second, first), -1) * rotary[1]
