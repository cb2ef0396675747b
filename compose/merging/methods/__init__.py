"""Merge methods, one file each; every file registers itself."""
