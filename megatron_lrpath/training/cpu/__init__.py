"""Megatron on the CPU: replacements for names that expect a GPU, and kernels."""
