"""Selectors of experts: one file each, found by a scan of this folder."""
