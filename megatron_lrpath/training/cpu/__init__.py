"""Megatron on the CPU: names that expect a GPU, kernels, and saving without copies."""
