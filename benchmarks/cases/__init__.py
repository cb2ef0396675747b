"""One file per case; every file registers itself."""
