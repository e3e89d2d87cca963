"""Initial weights with several pipeline stages or expert-parallel ranks: the same as those of a single
process.

Megatron seeds every stage differently, and each stage draws its layers from its own seed. Here a stage
continues the random sequence of the stage before it; only the states of the generators are sent from stage
to stage.

If weights are drawn on the CPU, the expert-parallel ranks draw from one seed: each rank's experts would be
copies of the first rank's, and later draws would depend on the layout. There every rank draws the experts
of all ranks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import mpu
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

States = tuple[torch.Tensor, torch.Tensor, dict[str, torch.Tensor]]


@dataclass
class StageOrder:
    """The order in which the pipeline stages of this process's model draw their weights.

    Attributes:
        chunks: parts of the model on each stage (virtual pipeline); one if it is not virtual.
        built: parts that this stage has built.
    """

    chunks: int
    built: int = 0
    _building: bool = False
    _shares: list[Callable[[], None]] = field(default_factory=list)

    def build(self, build: Callable[[], None]) -> None:
        """Build the next part of this stage, after the part of the stage before it.

        The random numbers of the training (dropout) continue from the stage's own seed, except on the
        first stage, where they continue as on a single stage.
        """
        stage, stages = mpu.get_pipeline_model_parallel_rank(), mpu.get_pipeline_model_parallel_world_size()
        first = stage == 0 and self.built == 0
        own = random_states()
        if not first:
            set_random_states(receive((stage - 1) % stages))
        self._building = True
        build()
        self._building = False
        self.built += 1
        if stage < stages - 1 or self.built < self.chunks:
            send(random_states(), (stage + 1) % stages)
        if not first:
            set_random_states(own)
        if self.built == self.chunks:
            for share in self._shares:
                share()

    def when_built(self, share: Callable[[], None]) -> None:
        """Defer the sharing of embeddings between the last and the first stage until all parts are built.

        A model of another class is not built in this order, and shares them immediately.
        """
        if self._building:
            self._shares.append(share)
        else:
            share()


def drawn_at(args: Any) -> dict[str, Any]:
    """Return the part of the layout that the initial weights depend on, for the run's lineage.

    Drawn on the CPU they depend on no layout; on GPUs every tensor- and expert-parallel rank draws its own
    part.
    """
    if args.use_cpu_initialization:
        return {"device": "cpu"}
    sizes = ("tensor_model_parallel_size", "expert_model_parallel_size", "expert_tensor_parallel_size")
    return {"device": "gpu"} | {name: getattr(args, name) for name in sizes}


def draw_all_experts(build: Callable[[Any], None], own: Any) -> None:
    """Build the experts of every expert-parallel rank in turn, and keep those of this rank in `own`."""
    rank = mpu.get_expert_model_parallel_rank()
    for other in range(mpu.get_expert_model_parallel_world_size()):
        build(own if other == rank else object.__new__(type(own)))


def random_states() -> States:
    """Return copies of the states of the CPU, the device and Megatron's named generators."""
    named = get_cuda_rng_tracker().get_states()
    return torch.get_rng_state(), torch.cuda.get_rng_state(), {name: as_bytes(named[name]) for name in named}


def as_bytes(state: Any) -> torch.Tensor:
    """Return a copy of a state; Transformer Engine's tracker keeps generators."""
    return (state.get_state() if isinstance(state, torch.Generator) else state).clone()


def set_random_states(states: States) -> None:
    """Restore these states; the generator objects are not replaced."""
    cpu, device, named = states
    torch.cuda.set_rng_state(device)
    torch.set_rng_state(cpu)  # after the device's, which is the CPU's if there is no GPU
    tracker = get_cuda_rng_tracker()
    now = tracker.get_states()
    for name in now:
        if isinstance(now[name], torch.Generator):
            now[name].set_state(named[name])
        else:
            now[name] = named[name]
    tracker.set_states(now)


def send(states: States, stage: int) -> None:
    """Send states to a stage of this pipeline."""
    group = mpu.get_pipeline_model_parallel_group()
    dist.send_object_list([states], group=group, group_dst=stage, weights_only=True)


def receive(stage: int) -> States:
    """Receive the states from a stage of this pipeline."""
    found: list[Any] = [None]
    group = mpu.get_pipeline_model_parallel_group()
    dist.recv_object_list(found, group=group, group_src=stage, weights_only=True)
    states: States = found[0]
    return states
