"""Megatron's own training loop, with path-switching rates, branch checkpoints and version data."""
