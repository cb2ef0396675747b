"""Plots and the self-contained HTML report: plain values in, one page of text out; no script, nothing loaded."""
