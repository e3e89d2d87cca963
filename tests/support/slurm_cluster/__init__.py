"""A real Slurm of two nodes on this machine, for the tests of job submission: `running_cluster` starts it."""

from tests.support.slurm_cluster.cluster import Cluster, running_cluster

__all__ = ["Cluster", "running_cluster"]
