"""Presets by the names of the papers: found by a scan of this folder."""
