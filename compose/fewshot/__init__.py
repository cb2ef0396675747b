"""Few-shot search on a live model: examples, population objective, controls, and the output folder."""
