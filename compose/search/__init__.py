"""Few-shot search over coefficients: ask/tell strategies, guards and the journal. Knows tensors and callables only."""
