"""Text: examples of a task and the token ids they become, for everything that trains or scores a model."""
