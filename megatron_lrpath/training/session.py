"""The owner of a run in this process: everything that its parts share during training or evaluation."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch.distributed import Store

from megatron_lrpath.paradigms import SFT
from megatron_lrpath.training.checkpoints.ahead import ReadAhead
from megatron_lrpath.training.checkpoints.commit import Commits, Saves
from megatron_lrpath.training.context import RunContext
from megatron_lrpath.training.exits import Exits, Signals
from megatron_lrpath.training.first_weights import StageOrder
from megatron_lrpath.training.guards.guard import Guard
from megatron_lrpath.training.guards.peers import PeerWatch
from megatron_lrpath.training.guards.runlock import RunLock
from megatron_lrpath.training.guards.standstill import Standstill
from megatron_lrpath.training.options.arguments import ArgumentsProvider
from megatron_lrpath.training.scheduler import LRPathScheduler
from megatron_lrpath.training.steps import StepRecorder


@dataclass
class Session:
    """One run in one process. Parts that a process does not need stay None.

    Attributes:
        device: cpu or cuda.
        exits, signals, ahead: exist before Megatron is imported.
        kernels: the kernels of `--gpu-kernels` in use.
        own_arguments: adds the arguments of a user's script to the parser.
        builds_model: whether this package builds the model, from the arguments; False for a user's script.
        context: the run; None for plain Megatron.
        peers: the watch over the other ranks, after rendezvous.
        standstill: the clock of a training's steps.
        lock: the run's lock, on rank 0 of a training.
        saves, commits, guard, recorder: in a training of a run.
        scheduler: the learning-rate path in Megatron's loop, after Megatron has built its optimizer.
        first_weights: the order in which several pipeline stages draw them, in a run that starts from random weights.
        draws_all_experts: whether a rank draws the initial weights of all ranks' experts, to keep its own.
        first_step: the step that the training starts at.
        store: the rendezvous store, for `init_process_group`.
    """

    device: str
    exits: Exits = field(default_factory=Exits)
    signals: Signals = field(default_factory=Signals)
    ahead: ReadAhead = field(default_factory=ReadAhead)
    kernels: frozenset[str] = frozenset()
    own_arguments: ArgumentsProvider | None = None
    builds_model: bool = True
    context: RunContext | None = None
    peers: PeerWatch | None = None
    standstill: Standstill | None = None
    lock: RunLock | None = None
    saves: Saves | None = None
    commits: Commits | None = None
    guard: Guard | None = None
    recorder: StepRecorder | None = None
    scheduler: LRPathScheduler | None = None
    first_weights: StageOrder | None = None
    draws_all_experts: bool = False
    first_step: int = 0
    store: Store | None = None

    @property
    def is_packed(self) -> bool:
        """Return whether the run's batches are packed samples of a fine-tuning."""
        return self.context is not None and self.context.kind == SFT.name

    def step_ended(self, step: int, loss: Any, grad_norm: float | None, skipped: bool) -> float:
        """Record a finished step of the training; return the learning rate that it used.

        Args:
            step: counted from 1.
            loss: the loss of the step (nats per token), if this rank has it.
            grad_norm: the gradient's norm, if it is known.
            skipped: whether the update was skipped.
        """
        assert self.scheduler is not None
        rate = self.scheduler.step_ended(skipped)
        if self.recorder is not None:
            self.recorder.record(step, rate, loss, grad_norm, skipped)
            self.recorder.report_spike(step)
        if self.guard is not None:
            self.guard.step_ended()
        if self.peers is not None:
            self.peers.step = step
        if self.standstill is not None:
            self.standstill.step_ended()
        return rate
