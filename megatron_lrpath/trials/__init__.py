"""Trials: short branches off one checkpoint that differ in the rate or the data, and their measurements."""
