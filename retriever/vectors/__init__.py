"""Vector search behind one protocol, one file per backend."""
