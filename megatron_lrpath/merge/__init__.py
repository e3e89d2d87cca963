"""Merges checkpoints of a main path into what a decay would have made of it, without training."""
