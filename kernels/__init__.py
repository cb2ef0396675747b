"""Batched LoRA operations. This file stays a docstring: transformers may execute it under the name kernels."""
