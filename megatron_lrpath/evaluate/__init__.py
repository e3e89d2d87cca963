"""Perplexity of every version's model on the one fixed validation set."""
