"""A real Slurm of two nodes on this machine, for the tests of job submission: `cluster` is the fixture."""

from tests.support.slurm_cluster.cluster import Cluster, running_cluster

__all__ = ["Cluster", "running_cluster"]
