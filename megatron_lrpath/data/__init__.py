"""Version slices of indexed datasets, and the datasets that training reads them through."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron_lrpath.data.slice import Slice
    from megatron_lrpath.plan import Plan, Run


def slices_of(plan: Plan, run: Run) -> list[Slice]:
    """The slices that a run trains on, proved disjoint; their sources are verified in one process of a node.

    Raises:
        UserError: as `open_slices`.
    """
    from megatron_lrpath.data.index_cache import local_rank
    from megatron_lrpath.data.slice import open_slices

    return open_slices(plan.data, run.slices, verify=local_rank() == 0)
