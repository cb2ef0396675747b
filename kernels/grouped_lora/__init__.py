"""grouped_lora: every row or token of a batch has its own adapter."""
