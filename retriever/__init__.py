"""Retrieval: pick adapters for an input by embedding."""
