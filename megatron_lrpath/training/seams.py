"""All names of Megatron (and of torch and TensorBoard below it) that this project replaces, with the reasons.

No other module of the project assigns to a name of `megatron`. A row has the parameters that its
replacement reads or sets; all others are passed through. `apply` raises an error if one of these has
changed, and a test fails first; a row that only saves time is skipped with a warning instead.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from megatron_lrpath.console import warn
from megatron_lrpath.errors import UserError
from megatron_lrpath.training.session import Session

MEGATRON = ">=0.19,<0.20"


@dataclass(frozen=True)
class Seam:
    """One replaced name.

    Attributes:
        target: `module:name` (or `module:Class.name`) as seen by the calling code of Megatron.
        replacement: `module:name` of the function that is called instead. It takes the session, if its first parameter
            has that name, then the original, then the caller's arguments.
        parameters: the leading parameters of the original that the replacement reads or sets, in order.
        why: the failure or the missing feature without it.
        device: `any`, or `cpu` or `cuda` for rows that only one of them needs.
        speed: whether the row only saves time; if upstream has changed it is skipped with a warning.
        since: first version of megatron-core that the row was needed and checked for.
    """

    target: str
    replacement: str
    parameters: tuple[str, ...]
    why: str
    device: str = "any"
    speed: bool = False
    since: str = "0.19.2"

    def original(self) -> Callable[..., Any]:
        """Return the function of Megatron that `target` currently names."""
        return resolve(self.target)

    def made(self, session: Session) -> Any:
        """Return the replacement in the process of `session`."""
        original, replacement = self.original(), resolve(self.replacement)
        takes_session = next(iter(inspect.signature(replacement).parameters)) == "session"
        given = (session, original) if takes_session else (original,)

        @functools.wraps(original)
        def call(*args: Any, **named: Any) -> Any:
            return replacement(*given, *args, **named)

        owner, name = owner_and_name(self.target)
        is_static = isinstance(inspect.getattr_static(owner, name), staticmethod)
        return staticmethod(call) if is_static else call


SEAMS = (
    Seam(
        "megatron.training.training:get_optimizer_param_scheduler",
        "megatron_lrpath.training.hooks:scheduler_builder",
        ("optimizer",),
        "the rate of a run is a path (main, branch, whole) that Megatron's scheduler cannot express",
    ),
    Seam(
        "megatron.training.training:training_log",
        "megatron_lrpath.training.hooks:training_log",
        (
            "loss_dict",
            "total_loss_dict",
            "learning_rate",
            "iteration",
            "loss_scale",
            "report_memory_flag",
            "skipped_iter",
            "grad_norm",
        ),
        "Megatron logs the next step's rate, and the mean of two losses for the second step after a start",
    ),
    Seam(
        "megatron.training.training:checkpoint_and_decide_exit",
        "megatron_lrpath.training.hooks:checkpoint_and_decide_exit",
        (
            "model",
            "optimizer",
            "opt_param_scheduler",
            "iteration",
            "num_floating_point_operations_so_far",
            "checkpointing_context",
            "train_data_iterator",
        ),
        "branch points and version ends are saved for any save interval",
    ),
    Seam(
        "megatron.training.training:build_train_valid_test_data_iterators",
        "megatron_lrpath.training.datasets:build_data_iterators",
        (),
        "it draws from the random state that a checkpoint has just restored",
    ),
    Seam(
        "megatron.training.training:save_checkpoint",
        "megatron_lrpath.training.hooks:save_checkpoint",
        ("iteration",),
        "a save that fails (a full disk) ends the training; a step may be saved twice, in the same folder",
    ),
    Seam(
        "megatron.training.training:maybe_finalize_async_save",
        "megatron_lrpath.training.hooks:maybe_finalize_async_save",
        (),
        "the same for asynchronous saves",
    ),
    Seam(
        "megatron.core.dist_checkpointing:save",
        "megatron_lrpath.training.hooks:dist_save",
        ("sharded_state_dict", "checkpoint_dir"),
        "it writes in place, so that a killed save leaves what looks like a checkpoint",
    ),
    Seam(
        "megatron.core.dist_checkpointing:load",
        "megatron_lrpath.training.checkpoints.dist_checkpointing:load",
        ("sharded_state_dict", "checkpoint_dir"),
        "a model of Transformer Engine's layers asks for a state of its last norm, which a checkpoint of other "
        "layers does not hold",
    ),
    Seam(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:FileSystemWriterAsync.finish",
        "megatron_lrpath.training.hooks:first_rank_write",
        (),
        "rank 0 writes the metadata while the others wait: on a full disk it raises alone, which ends "
        "the training",
    ),
    Seam(
        "megatron.core.dist_checkpointing.serialization:save_config",
        "megatron_lrpath.training.hooks:first_rank_write",
        (),
        "the same for the file with the format of the checkpoint",
    ),
    Seam(
        "megatron.training.checkpointing:print_rank_0",
        "megatron_lrpath.training.hooks:note_print",
        ("message",),
        "a checkpoint that cannot be loaded ends the process with status 0, and the reason is only printed",
    ),
    Seam(
        "megatron.training.checkpointing:ensure_directory_exists",
        "megatron_lrpath.training.hooks:ensure_directory",
        ("filename", "check_parent"),
        "it makes the checkpoint's final folder before writing: on a full disk that ends the training, "
        "and a killed save leaves it behind",
    ),
    Seam(
        "megatron.training.checkpointing:get_checkpoint_tracker_filename",
        "megatron_lrpath.training.hooks:tracker_filename",
        ("checkpoints_path",),
        "the tracker is written in place, before others may trust it, and a damaged one ends the process",
    ),
    Seam(
        "megatron.training.wandb_utils:on_save_checkpoint_success",
        "megatron_lrpath.training.hooks:wandb_save",
        ("checkpoint_path", "tracker_filename", "save_dir"),
        "it uploads the tracker, whose name the row above hides",
    ),
    Seam(
        "tensorboard.summary.writer.event_file_writer:RecordWriter",
        "megatron_lrpath.full_disk:record_writer",
        ("writer",),
        "its thread ends at a full disk, and with the next value it is given the training",
    ),
    Seam(
        "megatron.training.arguments:_print_args",
        "megatron_lrpath.training.hooks:print_args",
        ("title", "args"),
        "it prints the values of all arguments, a script's own secrets among them",
    ),
    Seam(
        "torch.distributed.checkpoint.filesystem:FileSystemReader.read_metadata",
        "megatron_lrpath.training.checkpoints.dist_checkpointing:read_metadata",
        ("self",),
        "it unpickles a checkpoint's metadata, and so executes code in an untrusted file",
    ),
    Seam(
        "torch.distributed.checkpoint.filesystem:FileSystemReader.read_data",
        "megatron_lrpath.training.checkpoints.dist_checkpointing:read_data",
        ("self", "plan", "planner"),
        "weights-only loading still changes members of enumerations, and hands Transformer Engine what it "
        "unpickles",
    ),
    Seam(
        "torch.distributed.checkpoint.default_planner:DefaultLoadPlanner.load_bytes",
        "megatron_lrpath.training.checkpoints.dist_checkpointing:load_bytes",
        ("self", "read_item", "value"),
        "it unpickles a checkpoint's objects (arguments, random states) with weights_only=False",
    ),
    Seam(
        "megatron.core.models.gpt.gpt_model:GPTModel.__init__",
        "megatron_lrpath.training.hooks:build_model",
        ("self",),
        "each pipeline stage draws its first weights from a seed of its own, so that another layout trains "
        "another model",
    ),
    Seam(
        "megatron.core.models.common.language_module.language_module:LanguageModule."
        "setup_embeddings_and_output_layer",
        "megatron_lrpath.training.hooks:share_embeddings",
        ("self",),
        "while it builds the model, the first stage waits in it for the last, which draws its weights after it",
    ),
    Seam(
        "megatron.core.transformer.moe.experts:SequentialMLP.__init__",
        "megatron_lrpath.training.hooks:build_experts",
        ("self",),
        "where weights are drawn on the CPU, all expert-parallel ranks draw the same, so that experts are copies",
    ),
    Seam(
        "megatron.core.optimizer.optimizer:ChainedOptimizer.prepare_grads",
        "megatron_lrpath.training.hooks:prepare_grads",
        ("self",),
        "a step whose gradients overflow (fp16) makes no update, and signals are answered in it as well",
    ),
    Seam(
        "megatron.core.optimizer.optimizer:ChainedOptimizer.get_grad_norm",
        "megatron_lrpath.training.hooks:get_grad_norm",
        ("self",),
        "a norm that is not finite is not looked at before the update",
    ),
    Seam(
        "megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer.get_grad_norm",
        "megatron_lrpath.training.hooks:get_grad_norm",
        (),
        "the same where each rank keeps the state of some matrices (dist_muon)",
    ),
    Seam(
        "megatron.core.optimizer.optimizer:ChainedOptimizer.step_with_ready_grads",
        "megatron_lrpath.training.hooks:step_with_ready_grads",
        ("self",),
        "numbers that are not finite, loss spikes and signals are answered before the update, on all ranks",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_state_dict",
        "megatron_lrpath.training.optimizer:sharded_state_dict",
        ("self", "model_sharded_state_dict", "is_loading"),
        "without Transformer Engine and Apex it asserts that torch's Adam has made a step already: not before "
        "loading, nor while the loss scale of fp16 comes down",
    ),
    Seam(
        "megatron.core.optimizer.optimizer:Float16OptimizerWithFloat16Params.sharded_state_dict",
        "megatron_lrpath.training.optimizer:sharded_state_dict_fp16",
        ("self", "model_sharded_state_dict", "is_loading"),
        "the same where the optimizer is not distributed: what it saves before the first update cannot be loaded",
    ),
    Seam(
        "megatron.core.dist_checkpointing.optimizer:make_sharded_optimizer_tensor",
        "megatron_lrpath.training.optimizer:sharded_tensor",
        ("model_param", "optim_param", "prefix"),
        "it takes every state for one of its parameter's shape, which SOAP's preconditioners are not",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.sharded_param_state_fully_reshardable",
        "megatron_lrpath.training.checkpoints.optimizer_state:sharded_param_state",
        ("self", "model_sharded_state_dict", "is_loading", "metadata"),
        "a save and a load put the optimizer's whole state (12 bytes a parameter) into the host memory of every "
        "data-parallel rank; and with several buckets whose sizes are padded it saves shifted states",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer._set_main_param_and_optimizer_states",
        "megatron_lrpath.training.optimizer:set_states",
        ("self", "model_param", "tensors"),
        "it expects the step count of torch's Adam among the loaded tensors, where its loader leaves it out",
    ),
    Seam(
        "megatron.core.optimizer.distrib_optimizer:DistributedOptimizer.load_state_dict",
        "megatron_lrpath.training.hooks:load_state_dict",
        ("self", "state_dict"),
        "it finds a stored parameter group by its rates, so that a run with another maximal rate (or rate of the "
        "embeddings) could not load it; it takes the stored betas over; and it gives all parameters one "
        "step-count tensor, which torch's Adam counts up for each",
    ),
    Seam(
        "megatron.core.optimizer.optimizer:MegatronOptimizer._filter_and_reorder_param_groups",
        "megatron_lrpath.training.hooks:filter_and_reorder",
        ("current_groups", "state_dict_groups"),
        "the same in the other optimizers",
    ),
    Seam(
        "megatron.core.dist_checkpointing.strategies.filesystem_async:get_write_results_queue",
        "megatron_lrpath.training.checkpoints.dist_checkpointing:get_write_results_queue",
        ("mp_mode",),
        "it starts a process that imports torch (seconds, on every rank) for a queue; a synchronous save "
        "fills and reads it in one process, and for the others a forked one serves as well",
        speed=True,
    ),
    Seam(
        "megatron.core.datasets.utils:compile_helpers",
        "megatron_lrpath.training.hooks:compile_helpers",
        (),
        "it calls make in the installed package, which has no Makefile; the wheel brings them compiled",
    ),
    Seam(
        "megatron.training.training:initialize_megatron",
        "megatron_lrpath.training.hooks:initialize_megatron",
        ("allow_no_cuda",),
        "without allow_no_cuda it asserts a GPU",
        device="cpu",
    ),
    Seam(
        "megatron.training.training:set_jit_fusion_options",
        "megatron_lrpath.training.hooks:set_jit_fusion_options",
        (),
        "it warms up GPU kernels with bias and dropout, 5 to 15 s (on the CPU 26 s) for nothing where a model has none",
        speed=True,
    ),
    Seam(
        "torch.distributed.checkpoint.default_planner:DefaultSavePlanner.resolve_data",
        "megatron_lrpath.training.checkpoints.dist_checkpointing:resolve_data",
        ("self", "write_item"),
        "Megatron's writer copies every tensor that is a part of a larger buffer, as all weights are",
        device="cpu",
        speed=True,
    ),
    Seam(
        "megatron.core.tensor_parallel:vocab_parallel_cross_entropy",
        "megatron_lrpath.training.cpu.kernels:cross_entropy",
        ("vocab_parallel_logits", "target", "label_smoothing", "tp_group"),
        "on the CPU its passes over fp32 copies of all logits take longer than the output layer's product",
        device="cpu",
        speed=True,
    ),
    Seam(
        "megatron.core.transformer.mlp:bias_swiglu_impl",
        "megatron_lrpath.training.cpu.kernels:swiglu",
        ("input", "bias"),
        "its fusion needs a compiler; uncompiled it makes nine passes over the activations",
        device="cpu",
        speed=True,
    ),
    Seam(
        "megatron.core.transformer.attention:apply_rotary_pos_emb",
        "megatron_lrpath.training.cpu.kernels:rotary",
        ("t", "freqs", "config"),
        "without a fused kernel it copies queries and keys twice in each direction",
        device="cpu",
        speed=True,
    ),
    Seam(
        "megatron.core.tensor_parallel:vocab_parallel_cross_entropy",
        "megatron_lrpath.training.gpu.kernels:cross_entropy",
        ("vocab_parallel_logits", "target", "label_smoothing", "tp_group"),
        "it makes fp32 copies of all logits; liger's kernel works on the bf16 logits in place",
        device="cuda",
        speed=True,
    ),
    Seam(
        "megatron.core.transformer.attention:apply_rotary_pos_emb",
        "megatron_lrpath.training.gpu.kernels:rotary",
        ("t", "freqs", "config"),
        "without Transformer Engine's it starts a kernel for each operation; ours is one in each direction",
        device="cuda",
        speed=True,
    ),
    Seam(
        "torch.optim.adam:Adam._init_group",
        "megatron_lrpath.training.gpu.kernels:init_group",
        ("self", "group"),
        "Megatron does not ask torch's Adam for its fused kernel, and the other passes over the state several times",
        device="cuda",
        speed=True,
    ),
    Seam(
        "megatron.core.optimizer.clip_grads:l2_norm_impl",
        "megatron_lrpath.training.gpu.kernels:l2_norm",
        (),  # Transformer Engine's and Apex's, which are called unchanged, have other names
        "without Transformer Engine and Apex it waits for the GPU once for each tensor",
        device="cuda",
        speed=True,
    ),
    Seam(
        "megatron.core.optimizer.layer_wise_optimizer:LayerWiseDistributedOptimizer.allgather_params",
        "megatron_lrpath.training.optimizer:spread_parameters",
        (),
        "ranks that update some matrices each (dist_muon) gather parts of different sizes, which gloo cannot",
        device="cpu",
    ),
    Seam(
        "megatron.core.distributed.param_and_grad_buffer:dist_all_gather_func",
        "megatron_lrpath.training.cpu.kernels:all_gather",
        ("output_tensor", "input_tensor"),
        "gloo copies all weights to itself and back where one rank holds them",
        device="cpu",
        speed=True,
    ),
    Seam(
        "megatron.core.distributed.param_and_grad_buffer:dist_reduce_scatter_func",
        "megatron_lrpath.training.cpu.kernels:reduce_scatter",
        ("output", "input"),
        "the same for the gradients",
        device="cpu",
        speed=True,
    ),
)


def owner_and_name(path: str) -> tuple[Any, str]:
    """Return the module or class that contains `module:name` or `module:Class.name`, and the name in it."""
    module, _, name = path.partition(":")
    *classes, last = name.split(".")
    return functools.reduce(getattr, classes, importlib.import_module(module)), last


def resolve(path: str) -> Any:
    """Return the object named by `module:name` or `module:Class.name`."""
    owner, name = owner_and_name(path)
    return getattr(owner, name)


def rows(device: str) -> tuple[Seam, ...]:
    """Return the seams for training on `device`."""
    return tuple(seam for seam in SEAMS if seam.device in ("any", device))


def check(seam: Seam) -> str | None:
    """Return the upstream change that affects this row, or None: the parameters that the replacement uses
    come first.
    """
    try:
        original = seam.original()
    except (ImportError, AttributeError) as error:
        return f"{seam.target} is gone ({error})"
    try:
        found = tuple(inspect.signature(original).parameters)
    except ValueError:  # compiled, as Transformer Engine's and Apex's: all arguments are passed on
        return None
    touched = found[: len(seam.parameters)]
    if touched != seam.parameters:
        return f"{seam.target} takes {found}, expected {seam.parameters} first"
    return None


def import_rows(device: str) -> None:
    """Import the modules that the rows of `device` name, so that a forked process need not import them."""
    for seam in rows(device):
        resolve(seam.replacement)
        seam.original()


def apply(session: Session) -> None:
    """Replace the names for training on the session's device, once for each process.

    Raises:
        UserError: rows do not match the installed Megatron.
    """
    pending = [seam for seam in rows(session.device) if not is_replaced(seam)]
    problems = {seam: problem for seam in pending if (problem := check(seam))}
    if any(not seam.speed for seam in problems):
        raise UserError(
            "the installed megatron-core differs from the one this version supports: "
            + "; ".join(problem for seam, problem in problems.items() if not seam.speed)
            + f". Install a supported one: pip install 'megatron-core{MEGATRON}'."
        )
    for problem in problems.values():
        warn(f"{problem}; this only costs time. megatron-core{MEGATRON} has the fast way.")
    for seam in pending:
        if seam not in problems:
            owner, name = owner_and_name(seam.target)
            setattr(owner, name, seam.made(session))
            resolve(seam.target).is_ours = True


def is_replaced(seam: Seam) -> bool:
    """Return whether this process has already replaced the name."""
    try:
        return getattr(seam.original(), "is_ours", False) is True
    except (ImportError, AttributeError):
        return False
