"""Version slices of indexed datasets, and the datasets that a training reads."""
