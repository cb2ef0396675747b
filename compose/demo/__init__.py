"""The embedded demo: a tiny base model, a bank of adapters, the tasks, and the script that made them."""
