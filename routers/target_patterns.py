"""Regular expressions for `MixtureSpec.targets`: the attention part or the feed-forward part of every layer.

They hold for the names of Llama, Mistral, Qwen (``self_attn``, ``mlp``), T5 (``SelfAttention``, ``EncDecAttention``,
``DenseReluDense``), BERT (``attention.self``, ``attention.output``, ``intermediate``, ``output``) and GPT-2 (``attn``,
``mlp``), and cut targets as `compose.routers.sites.is_attention` does.
"""

from __future__ import annotations

ATTENTION = r"(?i)attn|attention"
FEED_FORWARD = r"(?i)^(?!.*(?:attn|attention))"
