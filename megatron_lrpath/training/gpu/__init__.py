"""Kernels that need fewer passes over memory on a GPU, and their conditions; the CPU never imports them."""
