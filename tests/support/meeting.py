"""Ranks that meet: each prints its number, how many there are, and its argument."""

from __future__ import annotations


def main(argv: list[str]) -> None:
    """Meet under gloo."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {argv[0]}")
    dist.destroy_process_group()
