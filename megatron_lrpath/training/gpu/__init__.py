"""What is computed in fewer passes over memory on a GPU, and when; the CPU never imports the kernels."""
