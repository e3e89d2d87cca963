"""Trials: short branches off one checkpoint that differ in the rate or in the data, and what they measured."""
