"""Carrying out a plan: what waits for what, one process group per run, progress and state on disk."""
