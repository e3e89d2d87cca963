"""Version slices of indexed datasets, and the datasets that training reads them through."""
