"""Tests of megatron_lrpath/upkeep."""
