"""Ranks that join a process group; each prints its rank, the number of ranks, and its argument."""

from __future__ import annotations


def main(argv: list[str]) -> None:
    """Join the process group under gloo."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    print(f"rank {dist.get_rank()} of {dist.get_world_size()}: {argv[0]}")
    dist.destroy_process_group()
