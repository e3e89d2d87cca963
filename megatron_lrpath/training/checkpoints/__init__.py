"""Checkpoints: committed whole, kept while others depend on them, verified on loading."""
