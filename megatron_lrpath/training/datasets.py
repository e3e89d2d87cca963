"""The datasets of a run: version slices under a plan, Megatron's own blends without one."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from megatron.core import mpu
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset
from megatron.core.datasets.utils import Split
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training import get_args
from megatron.training.utils import get_blend_and_blend_per_split, is_first_or_last_pipeline_stage

from megatron_lrpath.data import versioned
from megatron_lrpath.data.slice import open_validation
from megatron_lrpath.data.versioned_index import replay_entries
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import SCRATCH
from megatron_lrpath.sft.dataset import build_packed, build_packed_validation
from megatron_lrpath.training.context import RunContext


def build_data_iterators(original: Callable[..., Any], *args: Any, **named: Any) -> Any:
    """Build the data iterators without changing the random states, which are already loaded.

    Torch's loader draws a seed for its workers from the default generator: an uninterrupted run once, a
    resumed one again. On the CPU dropout uses that generator, too, and the two runs would diverge.
    """
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    iterators = original(*args, **named)
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.set_rng_state(states[2])
    return iterators


def dataset_config(args: Any, versioned: bool) -> GPTDatasetConfig:
    """Return Megatron's dataset configuration from its arguments; version slices have their own documents."""
    blend, blend_per_split = (None, None) if versioned else get_blend_and_blend_per_split(args)
    return GPTDatasetConfig(
        random_seed=args.seed,
        sequence_length=args.seq_length,
        blend=blend,
        blend_per_split=blend_per_split,
        split="1,0,0" if versioned else args.split,
        multiple_validation_sets=args.multiple_validation_sets,
        full_validation=args.full_validation,
        num_dataset_builder_threads=args.num_dataset_builder_threads,
        path_to_cache=args.data_cache_path,
        mmap_bin_files=args.mmap_bin_files,
        tokenizer=build_tokenizer(args),
        reset_position_ids=args.reset_position_ids,
        reset_attention_mask=args.reset_attention_mask,
        eod_mask_loss=args.eod_mask_loss,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )


class DatasetProvider:
    """Megatron's dataset provider: training, validation and test sets.

    Called on every rank; under a plan all ranks take part in building the indices (one builds, the others
    wait).

    Args:
        context: the run; without a plan in it the data are Megatron's own blends.
    """

    is_distributed = True

    def __init__(self, context: RunContext | None) -> None:
        self.context = context

    def __call__(
        self, samples: tuple[int, int | None, int], vp_stage: int | None = None
    ) -> tuple[Any, Any, Any]:
        """Return the sets, with at least `samples` samples."""
        if self.context is not None and self.context.plan is not None:
            return plan_datasets(self.context, samples)
        args = get_args()
        config = dataset_config(args, versioned=False)
        kind = MockGPTDataset if args.mock_data else GPTDataset

        def needs_data() -> bool:
            return mpu.get_tensor_model_parallel_rank() == 0 and is_first_or_last_pipeline_stage(vp_stage)

        return BlendedMegatronDatasetBuilder(kind, list(samples), needs_data, config).build()


def plan_datasets(context: RunContext, samples: tuple[int, int | None, int]) -> tuple[Any, Any, None]:
    """Return the run's training set (a position is a consumed sample) and the fixed validation set.

    Raises:
        UserError: a version has fewer samples than its steps need, or a fine-tuning has no held-out examples.
    """
    args, prepared = get_args(), context.prepared
    validation: Any = None
    if prepared is not None:
        train = build_packed(prepared, args.train_iters * args.global_batch_size, args.data_cache_path)
        if args.eval_iters:
            validation = build_packed_validation(prepared, args.global_batch_size, args.data_cache_path)
            if validation is None:
                raise UserError(
                    f"--eval-iters: nothing is held out to evaluate on; set `valid` in {prepared.sft.place}"
                )
    else:
        config = dataset_config(args, versioned=True)
        train = training_set(context, config)
        if args.eval_iters:
            assert context.plan is not None
            held_out, batch = open_validation(context.plan.data), args.eval_global_batch_size
            validation = versioned.build_validation(held_out, config, multiple_of=batch)
    return train, Repeated(validation, samples[1]) if args.eval_iters else None, None


def training_set(context: RunContext, config: GPTDatasetConfig) -> Any:
    """Return the run's training set under its plan; a position is a consumed sample."""
    plan, run = context.plan, context.run
    assert plan is not None
    assert run is not None
    counts = [plan.samples_of(index) for index in range(len(context.slices))]
    if run.kind == SCRATCH.name:
        return versioned.build_shuffled(context.slices, plan.scratch_samples(run), config, plan.seed)
    replays = replay_entries(plan, len(counts))
    before = plan.adopted.samples if plan.adopted else 0
    dataset = versioned.build_chained(context.slices, counts, config, plan.seed, replays, before)
    if run.mix is None:
        return dataset
    batch = plan.batch_of(run).global_batch_size
    branch = (run.version, plan.batch_sizes.samples_at(run.first_step), batch, run.steps)
    return versioned.build_mixed(dataset, context.mix, run.mix, branch, config)


class Repeated:
    """Repeat a dataset from its start up to `length` samples (Megatron's loader does not wrap around)."""

    def __init__(self, dataset: Any, length: int | None) -> None:
        self.dataset = dataset
        self.length = max(length or 0, len(dataset))
        self.split = Split.valid

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> Any:
        return self.dataset[index % len(self.dataset)]
