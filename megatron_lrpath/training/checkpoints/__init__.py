"""Checkpoints: committed atomically, kept while other runs depend on them, verified when loaded."""
