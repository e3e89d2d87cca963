"""Every name of Megatron (and of torch and TensorBoard below it) that this project replaces: what, why, since when.

Nothing else in the project assigns to a name of `megatron`. A row holds the parameters that the replaced
function had when the row was written; `apply` refuses to go on when they have changed, and a test says so
first.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_lrpath.errors import UserError

MEGATRON = ">=0.19,<0.20"


@dataclass(frozen=True)
class Seam:
    """One replaced name.

    Attributes:
        target: `module:name` (or `module:Class.name`) as the calling code of Megatron sees it.
        replacement: `module:name` of ours; a `wrap_…` function is called with the original and returns the
            new one.
        parameters: parameter names of the original.
        why: what fails or is missing without it.
        device: `any`, or `cpu` for rows that only the CPU backend needs.
        since: first version of megatron-core that the row was needed and checked for.
    """

    target: str
    replacement: str
    parameters: tuple[str, ...]
    why: str
    device: str = "any"
    since: str = "0.19.2"

    def original(self) -> Callable[..., Any]:
        """The function of Megatron that stands under `target` now."""
        return resolve(self.target)


SEAMS = (
    Seam(
        "megatron.training.training:get_optimizer_param_scheduler",
        "megatron_lrpath.training.scheduler:wrap_scheduler_builder",
        ("optimizer",),
        "the rate of a run is a path (main, branch, whole) that Megatron's scheduler cannot express",
    ),
    Seam(
        "megatron.training.training:training_log",
        "megatron_lrpath.training.history:wrap_training_log",
        (
            "loss_dict",
            "total_loss_dict",
            "learning_rate",
            "iteration",
            "loss_scale",
            "report_memory_flag",
            "skipped_iter",
            "grad_norm",
            "params_norm",
            "num_zeros_in_grad",
            "max_attention_logit",
            "pg_collection",
            "is_first_iteration",
            "seqlen_squared_sum_in_batch",
            "total_real_tokens_in_batch",
        ),
        "Megatron logs the next step's rate, and the mean of two losses for the second step after a start",
    ),
    Seam(
        "megatron.training.training:checkpoint_and_decide_exit",
        "megatron_lrpath.training.checkpoints.saves:wrap_checkpoint_and_decide_exit",
        (
            "model",
            "optimizer",
            "opt_param_scheduler",
            "iteration",
            "num_floating_point_operations_so_far",
            "checkpointing_context",
            "train_data_iterator",
        ),
        "branch points and version ends are saved whatever the save interval is",
    ),
    Seam(
        "megatron.training.training:build_train_valid_test_data_iterators",
        "megatron_lrpath.training.datasets:wrap_build_data_iterators",
        ("build_train_valid_test_datasets_provider",),
        "it draws from the random state that a checkpoint has just restored",
    ),
    Seam(
        "megatron.training.training:save_checkpoint",
        "megatron_lrpath.training.checkpoints.saves:wrap_save_checkpoint",
        (
            "iteration",
            "model",
            "optimizer",
            "opt_param_scheduler",
            "num_floating_point_operations_so_far",
            "checkpointing_context",
            "pipeline_rank",
            "expert_rank",
            "tensor_rank",
            "pipeline_parallel",
            "expert_parallel",
            "non_persistent_ckpt",
            "train_data_iterator",
            "preprocess_common_state_dict_fn",
            "release",
            "tp_group",
            "pp_group",
            "dp_cp_group",
            "dp_group",
            "expt_dp_group",
            "rng_state_key_prefix",
        ),
        "a save that fails (a full disk) ends the training; a step may be saved twice, in the same folder",
    ),
    Seam(
        "megatron.training.training:maybe_finalize_async_save",
        "megatron_lrpath.training.checkpoints.saves:wrap_maybe_finalize_async_save",
        ("blocking", "terminate"),
        "the same for asynchronous saves",
    ),
    Seam(
        "megatron.core.dist_checkpointing:save",
        "megatron_lrpath.training.checkpoints.commit:wrap_dist_save",
        (
            "sharded_state_dict",
            "checkpoint_dir",
            "sharded_strategy",
            "validate_access_integrity",
            "async_sharded_save",
            "preprocess_common_before_consistancy_check",
            "content_metadata",
            "async_strategy",
            "verify_integrity",
        ),
        "it writes in place, so that a killed save leaves what looks like a checkpoint",
    ),
    Seam(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.finish",
        "megatron_lrpath.training.checkpoints.commit:wrap_first_rank_write",
        ("self", "metadata", "results"),
        "rank 0 writes the metadata while the others wait: on a full disk it raises alone, which ends the training",
    ),
    Seam(
        "megatron.core.dist_checkpointing.serialization:save_config",
        "megatron_lrpath.training.checkpoints.commit:wrap_first_rank_write",
        ("config", "checkpoint_dir"),
        "the same for the file that says how the checkpoint is stored",
    ),
    Seam(
        "megatron.training.checkpointing:ensure_directory_exists",
        "megatron_lrpath.training.checkpoints.saves:wrap_ensure_directory",
        ("filename", "check_parent"),
        "it makes the checkpoint's final folder before writing: on a full disk that ends the training, "
        "and a killed save leaves it behind",
    ),
    Seam(
        "megatron.training.checkpointing:get_checkpoint_tracker_filename",
        "megatron_lrpath.training.checkpoints.saves:wrap_tracker_filename",
        ("checkpoints_path",),
        "the tracker is written in place, before others may trust it, and a damaged one ends the process",
    ),
    Seam(
        "megatron.training.wandb_utils:on_save_checkpoint_success",
        "megatron_lrpath.training.checkpoints.saves:wrap_wandb_save",
        ("checkpoint_path", "tracker_filename", "save_dir", "iteration"),
        "it uploads the tracker, whose name the row above hides",
    ),
    Seam(
        "tensorboard.summary.writer.event_file_writer:RecordWriter",
        "megatron_lrpath.full_disk:wrap_record_writer",
        ("writer",),
        "its thread ends at a full disk, and with the next value it is given the training",
    ),
    Seam(
        "torch.distributed.checkpoint.filesystem:FileSystemReader.read_metadata",
        "megatron_lrpath.training.checkpoints.unpickle:wrap_read_metadata",
        ("self", "args", "kwargs"),
        "it unpickles a checkpoint's metadata, and so runs what a stranger's file says",
    ),
    Seam(
        "torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes",
        "megatron_lrpath.training.checkpoints.unpickle:wrap_load_bytes",
        ("self", "read_item", "value"),
        "it unpickles a checkpoint's objects (arguments, random states) with weights_only=False",
    ),
    Seam(
        "megatron.core.optimizer.optimizer:ChainedOptimizer.get_grad_norm",
        "megatron_lrpath.training.guards.guard:wrap_get_grad_norm",
        ("self",),
        "a norm that is not finite is not looked at before the update",
    ),
    Seam(
        "megatron.core.optimizer.optimizer:ChainedOptimizer.step_with_ready_grads",
        "megatron_lrpath.training.guards.guard:wrap_step_with_ready_grads",
        ("self",),
        "numbers that are not finite, loss spikes and signals are answered before the update, on all ranks",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_state_dict",
        "megatron_lrpath.training.optimizer:wrap_sharded_state_dict",
        ("self", "model_sharded_state_dict", "is_loading", "sharding_type", "metadata"),
        "without Transformer Engine and Apex it asserts on loading that torch's Adam has made a step already",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
        "megatron_lrpath.training.optimizer:wrap_set_states",
        ("self", "model_param", "tensors"),
        "it expects the step count of torch's Adam among the loaded tensors, where its loader leaves it out",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
        "megatron_lrpath.training.optimizer:wrap_load_state_dict",
        ("self", "state_dict"),
        "it finds a stored parameter group by its rates, so that a run with another maximal rate could not "
        "load it; and it gives all parameters one step-count tensor, which torch's Adam counts up for each",
    ),
    Seam(
        "megatron.core.optimizer.optimizer:MegatronOptimizer._filter_and_reorder_param_groups",
        "megatron_lrpath.training.optimizer:wrap_filter_and_reorder",
        ("current_groups", "state_dict_groups"),
        "the same in the other optimizers",
    ),
    Seam(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
        "megatron_lrpath.training.environment:wrap_get_write_results_queue",
        ("mp_mode",),
        "it starts a process that imports torch (seconds, on every rank) for a queue; a synchronous save "
        "fills and reads it in one process, and for the others a forked one serves as well",
    ),
    Seam(
        "megatron.core.datasets.utils:compile_helpers",
        "megatron_lrpath.training.environment:wrap_compile_helpers",
        (),
        "it calls make in the installed package, which has no Makefile; the wheel brings them compiled",
    ),
    Seam(
        "megatron.training.training:initialize_megatron",
        "megatron_lrpath.training.environment:wrap_initialize_megatron",
        (
            "allow_no_cuda",
            "skip_mpu_initialization",
            "get_embedding_ranks",
            "get_position_embedding_ranks",
            "store",
            "skip_model_parallel_init",
            "seed_pp_group",
            "seed_dp_group",
            "seed_tp_group",
            "seed_ep_group",
            "seed_etp_group",
            "skip_random_seed",
        ),
        "without allow_no_cuda it asserts a GPU",
        device="cpu",
    ),
    Seam(
        "megatron.training.training:set_jit_fusion_options",
        "megatron_lrpath.training.environment:wrap_set_jit_fusion_options",
        ("tp_size",),
        "it warms up GPU kernels, 26 s on the CPU for nothing",
        device="cpu",
    ),
    Seam(
        "megatron.core.tensor_parallel.random:_get_cuda_rng_state",
        "megatron_lrpath.training.environment:wrap_get_cuda_rng_state",
        ("device", "clone", "graph_safe"),
        "it asks torch.cuda.random, which needs a GPU",
        device="cpu",
    ),
    Seam(
        "megatron.core.tensor_parallel.random:_set_cuda_rng_state",
        "megatron_lrpath.training.environment:wrap_set_cuda_rng_state",
        ("new_state", "device", "graph_safe"),
        "it sets a CUDA generator lazily, which never happens without a GPU",
        device="cpu",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.get_parameter_state_dp_zero",
        "megatron_lrpath.training.cpu.in_place:wrap_parameter_state",
        ("self", "use_gloo_comm", "empty_data", "return_on_all_ranks"),
        "it copies all weights and moments four times before a save, which stops the training for it",
        device="cpu",
    ),
    Seam(
        "torch.distributed.checkpoint.default_planner:DefaultSavePlanner.resolve_data",
        "megatron_lrpath.training.cpu.in_place:wrap_resolve_data",
        ("self", "write_item"),
        "Megatron's writer copies every tensor that is a part of a larger buffer, as all weights are",
        device="cpu",
    ),
    Seam(
        "megatron.core.tensor_parallel:vocab_parallel_cross_entropy",
        "megatron_lrpath.training.cpu.kernels:wrap_cross_entropy",
        ("vocab_parallel_logits", "target", "label_smoothing", "tp_group"),
        "on the CPU its passes over fp32 copies of all logits take longer than the output layer's product",
        device="cpu",
    ),
    Seam(
        "megatron.core.transformer.mlp:bias_swiglu_impl",
        "megatron_lrpath.training.cpu.kernels:wrap_swiglu",
        ("input", "bias", "fp8_input_store", "cpu_offload_input"),
        "its fusion needs a compiler; uncompiled it makes nine passes over the activations",
        device="cpu",
    ),
    Seam(
        "megatron.core.transformer.attention:apply_rotary_pos_emb",
        "megatron_lrpath.training.cpu.kernels:wrap_rotary",
        ("t", "freqs", "config", "cu_seqlens", "mscale", "cp_group", "mla_rotary_interleaved"),
        "without a fused kernel it copies queries and keys twice in each direction",
        device="cpu",
    ),
    Seam(
        "megatron.core.distributed.param_and_grad_buffer:dist_all_gather_func",
        "megatron_lrpath.training.cpu.kernels:wrap_all_gather",
        ("output_tensor", "input_tensor", "group", "async_op"),
        "gloo copies all weights to itself and back where one rank holds them",
        device="cpu",
    ),
    Seam(
        "megatron.core.distributed.param_and_grad_buffer:dist_reduce_scatter_func",
        "megatron_lrpath.training.cpu.kernels:wrap_reduce_scatter",
        ("output", "input", "op", "group", "async_op"),
        "the same for the gradients",
        device="cpu",
    ),
)


def owner_and_name(path: str) -> tuple[Any, str]:
    """The module or class that holds what `module:name` or `module:Class.name` names, and its name there."""
    module, _, name = path.partition(":")
    *classes, last = name.split(".")
    return functools.reduce(getattr, classes, importlib.import_module(module)), last


def resolve(path: str) -> Any:
    """The object that `module:name` or `module:Class.name` names."""
    owner, name = owner_and_name(path)
    return getattr(owner, name)


def rows(device: str) -> tuple[Seam, ...]:
    """The seams that training on `device` needs."""
    return tuple(seam for seam in SEAMS if seam.device in ("any", device))


def check(seam: Seam) -> str | None:
    """What has changed upstream for this row, in words, or None."""
    try:
        found = tuple(inspect.signature(seam.original()).parameters)
    except (ImportError, AttributeError) as error:
        return f"{seam.target} is gone ({error})"
    if found != seam.parameters:
        return f"{seam.target} takes {found}, expected {seam.parameters}"
    return None


_applied: set[str] = set()


def apply(device: str) -> None:
    """Replace the names that training on `device` needs, once a process.

    Raises:
        UserError: the installed Megatron is not the one these rows were written for.
    """
    pending = [seam for seam in rows(device) if seam.target not in _applied]
    changed = [problem for seam in pending if (problem := check(seam))]
    if changed:
        raise UserError(
            "the installed megatron-core differs from the one this version supports: "
            + "; ".join(changed)
            + f". Install a supported one: pip install 'megatron-core{MEGATRON}'."
        )
    for seam in pending:
        owner, name = owner_and_name(seam.target)
        setattr(owner, name, resolve(seam.replacement)(seam.original()))
        _applied.add(seam.target)
