"""Merging: many task vectors to one, in weight space."""
