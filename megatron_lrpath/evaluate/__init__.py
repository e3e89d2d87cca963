"""Evaluation of every version's model: perplexity on a fixed validation set, completions and benchmarks."""
