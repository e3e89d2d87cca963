"""Predicts from the losses so far what a branch will reach, to choose alpha and the decay from data."""
