"""Run a plan: dependencies between runs, one process group for each run, progress and state on disk."""
