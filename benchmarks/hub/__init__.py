"""Durability of the hub index, measured: ``python benchmarks/hub/durability.py`` (see hub_index/README.md)."""
