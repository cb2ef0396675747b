"""Search strategies, one file each, found by the registry."""
