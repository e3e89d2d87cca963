"""The typed content of a plan file: batch, tokenizer, data, versions."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import PurePath
from typing import Any

from megatron_lrpath.plan.mix import Mix, Replay

SAVE_INTERVAL = 500  # steps, the plan's default; the newest two of these checkpoints are kept


@dataclass(frozen=True)
class Batch:
    """Sizes of a step: `global_batch_size` and `micro_batch_size` in samples, `seq_length` in tokens."""

    global_batch_size: int
    micro_batch_size: int
    seq_length: int
    rampup: None = None  # all steps of a plan have one size

    @property
    def tokens(self) -> int:
        """Tokens of one step."""
        return self.global_batch_size * self.seq_length


@dataclass(frozen=True)
class Tokenizer:
    """Megatron's tokenizer type, its model and, if that does not determine it, the vocabulary's size."""

    type: str
    model: str | None = None
    vocab_size: int | None = None


@dataclass(frozen=True)
class Data:
    """Paths as in the plan, relative to the working directory: the slices' folder, the validation slices.

    `valid` is the first validation slice, by which versions are compared; `more_valid` are those of later
    deliveries.
    """

    slices: str
    valid: str
    more_valid: tuple[str, ...] = ()

    @property
    def more_sets(self) -> tuple[str, ...]:
        """The names of the further validation slices."""
        return tuple(PurePath(path).name.removesuffix(".slice") for path in self.more_valid)


@dataclass(frozen=True)
class Version:
    """One version: its name, T_i in steps, and its own settings.

    `cycle_steps` maps "scratch", "continual", "branch" to a length in steps (math.inf: never decays); kinds
    that are missing in it take the length of the run. `mix` is the data that its branch reads in addition to the
    main path's samples (default: the plan's). `max_lr` is the rate to which the main path moves where the
    version begins, over `rate_steps` steps (None: as many as the warm-up has); None: the rate stays. Its branch has
    the Megatron arguments `branch_megatron` (names with underscores) on top of the plan's `megatron`. A step of its
    data has `global_batch_size` samples (None: as many as before). `replay` is the share of its steps' samples that
    earlier versions provide; `steps` includes them.
    """

    name: str
    steps: int
    alpha: float | None = None
    cycle_steps: dict[str, float] = field(default_factory=dict)
    mix: Mix | None = None
    max_lr: float | None = None
    rate_steps: int | None = None
    branch_megatron: dict[str, Any] = field(default_factory=dict)
    global_batch_size: int | None = None
    replay: Replay | None = None

    def new_samples(self, samples: int) -> int:
        """Return how many of its first `samples` samples are of its own slice."""
        return self.replay.new(samples) if self.replay else samples


@dataclass(frozen=True)
class Falling:
    """The falling rate of the main path: from step `begin` on, it is max_lr · (begin / step)^power."""

    power: float
    begin: int


@dataclass(frozen=True)
class Adopted:
    """The training before the main path by another program: `step` steps on `samples` samples.

    `checkpoint` is the folder that `lrpath adopt` copied, `fingerprint` that of its files. `data` are the
    slices that it had read; empty if unknown. The weights of an imported model have step 0, no samples, and
    stay in `checkpoint`, the plan's `pretrained_checkpoint`.
    """

    step: int
    samples: int
    checkpoint: str
    fingerprint: str
    data: tuple[str, ...] = ()

    @property
    def is_imported(self) -> bool:
        """Return whether these are weights only, with which every run without a parent begins at step 0."""
        return self.step == 0

    def facts(self) -> dict[str, Any]:
        """Return what a result depends on, JSON-serializable."""
        return {"step": self.step, "samples": self.samples, "fingerprint": self.fingerprint}


@dataclass(frozen=True)
class Parent:
    """The start of a run: another run of its paradigm and the step of the checkpoint."""

    run: str
    step: int
