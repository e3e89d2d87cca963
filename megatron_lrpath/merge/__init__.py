"""Merge checkpoints of a main path to approximate a decay without training."""
