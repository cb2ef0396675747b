"""The index of known adapters."""
