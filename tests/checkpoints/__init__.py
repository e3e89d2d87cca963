"""Tests of megatron_lrpath.checkpoints."""
