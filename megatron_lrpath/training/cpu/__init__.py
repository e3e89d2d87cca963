"""Megatron on the CPU: replacements for names that expect a GPU, kernels, and saves without copies."""
