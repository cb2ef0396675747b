"""Evaluation: a router beside what it has to beat, on the same items."""
