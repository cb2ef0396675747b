"""mixture_lora: every row or token of a batch has its own gated sum of adapters."""
