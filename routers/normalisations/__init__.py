"""Normalisations of scores: one file each, found by a scan of this folder."""
