"""The origin of a run's first step: a parent's checkpoint or given weights, and the checks on them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from megatron_lrpath.checkpoints.reader import CARRIED, load_common
from megatron_lrpath.errors import UserError
from megatron_lrpath.models import trained_rope_factor
from megatron_lrpath.plan import Plan
from megatron_lrpath.runs.checkpoints import (
    checkpoint_folder,
    content_files,
    files_fingerprint,
    weights_folder,
)

# Arguments that determine a model: a checkpoint with others cannot be continued.
MODEL_ARGUMENTS = (
    "num_layers", "hidden_size", "ffn_hidden_size", "num_attention_heads", "kv_channels",
    "seq_length", "position_embedding_type", "rotary_base", "rotary_percent", "normalization", "swiglu",
    "add_bias_linear", "add_qkv_bias", "untie_embeddings_and_output_weights", "vocab_size",
    "global_batch_size",
)  # fmt: skip
FREE = ("seq_length", "global_batch_size")  # weights alone fit any batch and length

IGNORED_FACTOR = " (Megatron 0.19 ignores the argument; `lrpath adopt` continues it under a plan with 8)"


def require_adopted(plan: Plan, own: Path, step: int) -> None:
    """Raise UserError if a plan's main path would begin without the checkpoint that the plan has adopted.

    Raises:
        UserError: with the command to copy it.
    """
    assert plan.adopted is not None
    if step < plan.adopted.step:
        raise UserError(
            f"{own}: the adopted checkpoint of step {plan.adopted.step:,} is not there. Copy it: "
            f"lrpath adopt {plan.path} --checkpoint {Path(plan.adopted.checkpoint).parent} --step {plan.adopted.step}"
        )


def check_model(args: Any, folder: Path, step: int, weights_only: bool = False) -> dict[str, Any]:
    """Refuse a checkpoint of another model before any weight is read; weights alone fit any batch and length.

    Returns:
        The content of the checkpoint without its tensors: `args` has the Megatron arguments of the save.

    Raises:
        UserError: lists the arguments that differ.
    """
    common = load_common(checkpoint_folder(folder, step))
    stored = model_arguments(common, folder)
    if wrong := differences(stored, args, FREE if weights_only else ()):
        raise UserError(
            f"{folder}: the checkpoint of step {step} belongs to another model: {'; '.join(wrong)}. "
            "Use the model settings it was trained with."
        )
    if not weights_only:
        check_optimizer(args, stored, f"{folder}: the checkpoint of step {step}")
    return dict(common)


def check_optimizer(args: Any, stored: Any, what: str) -> None:
    """Refuse a checkpoint whose optimizer state this run cannot use; `what` names it.

    Raises:
        UserError: it has no optimizer state, or one of another optimizer or format.
    """
    if getattr(stored, "no_save_optim", False):
        raise UserError(
            f"{what} was saved without the optimizer's state (--no-save-optim), which a run continues from. Train the "
            "parent again without that argument."
        )
    if getattr(stored, "optimizer", args.optimizer) != args.optimizer:
        raise UserError(
            f"{what} was saved with --optimizer {stored.optimizer} and this run is with {args.optimizer}: each keeps "
            "a state of its own. Use the same for both."
        )
    if is_distributed(stored) != is_distributed(args):
        how = ("with", "without") if is_distributed(stored) else ("without", "with")
        raise UserError(
            f"{what} was saved {how[0]} --use-distributed-optimizer and "
            f"this run is {how[1]}: the two keep the optimizer's state in different formats. Use the same "
            "for both."
        )
    with_own = [getattr(one, "decoupled_lr", None) is not None for one in (stored, args)]
    if with_own[0] != with_own[1] and not args.use_distributed_optimizer:
        how = ("with", "without") if with_own[0] else ("without", "with")
        raise UserError(
            f"{what} was saved {how[0]} --decoupled-lr and this run is {how[1]}: without --use-distributed-optimizer "
            "Megatron keeps a state for each rate. Use it for both or for none; the rates themselves may differ."
        )


def is_distributed(args: Any) -> bool:
    """Return whether the optimizer state is distributed over the ranks; Megatron renames the argument for
    some optimizers.
    """
    by_layers = getattr(args, "use_layer_wise_distributed_optimizer", False)
    return bool(args.use_distributed_optimizer or by_layers)


def stored_arguments(folder: Path) -> Any:
    """Return the Megatron arguments that the checkpoint in `folder`, of one step, was saved with; raises
    UserError.
    """
    return model_arguments(load_common(folder), folder)


def model_arguments(common: Mapping[str, Any], folder: Path) -> Any:
    """Return the Megatron arguments in the non-tensor content of the checkpoint in `folder`; raises
    UserError.
    """
    stored = common.get("args")
    if stored is None:
        raise UserError(f"{folder}: the checkpoint does not name its model.")
    return stored


def differences(stored: Any, args: Any, free: tuple[str, ...], more: tuple[str, ...] = ()) -> list[str]:
    """Return the model arguments that differ between a checkpoint and this run, except those in `free`."""
    wrong = [
        f"{name} is {getattr(stored, name)} there and {getattr(args, name)} here"
        for name in MODEL_ARGUMENTS + more
        if name not in free and hasattr(stored, name) and getattr(args, name, None) != getattr(stored, name)
    ]
    # Groups of heads that share keys and values; Megatron uses the argument only with grouped queries.
    there, here = (
        int(one.num_query_groups if one.group_query_attention else one.num_attention_heads)
        for one in (stored, args)
    )
    wrong += [f"it has {there} query groups, this run {here}"] if there != here else []
    trained = trained_rope_factor(stored)
    if trained is not None and args.use_rope_scaling and trained != args.rope_scaling_factor:
        wrong.append(
            f"it was trained with a rope_scaling_factor of {trained:g}, this run has {args.rope_scaling_factor:g}"
            f"{IGNORED_FACTOR if trained != stored.rope_scaling_factor else ''}"
        )
    return wrong


def expect_iteration(args: Any, first_step: int, samples: int) -> None:
    """Check, after loading, that training continues at `first_step` with `samples` consumed before it.

    Raises:
        UserError: Megatron loaded a different checkpoint.
    """
    if (args.iteration, args.consumed_train_samples) != (first_step, samples):
        raise UserError(
            f"{args.load or 'random weights'}: loaded step {args.iteration} with "
            f"{args.consumed_train_samples} consumed samples, expected step {first_step} with {samples}. "
            "Was it trained with another --global-batch-size?"
        )


def is_pretrained(root: str) -> bool:
    """Return whether `root` is the folder of the weights that this process's run starts from."""
    from megatron.training import get_args

    given = get_args().pretrained_checkpoint
    return given is not None and Path(given) == Path(root)


def check_pretrained(args: Any) -> Any:
    """Refuse weights of another model, before they are read, and a run that would write into their folder.

    Returns:
        The Megatron arguments of the save.

    Raises:
        UserError: lists the arguments that differ, or the folders are the same.
    """
    if args.save and Path(args.save).resolve() == Path(args.pretrained_checkpoint).resolve():
        raise UserError(
            f"--save {args.save} is the folder of the weights to start from, which a run only reads."
        )
    folder = weights_folder(Path(args.pretrained_checkpoint))
    stored = stored_arguments(folder)
    if wrong := weights_differences(stored, args):
        raise UserError(
            f"{folder}: the weights to start from belong to another model: {'; '.join(wrong)}. Take over the "
            "`model` settings that were written next to them (plan.yaml), or leave --pretrained-checkpoint "
            "out."
        )
    return stored


def weights_differences(stored: Any, args: Any) -> list[str]:
    """Return the model arguments that differ between imported weights and this run."""
    return differences(stored, args, (*FREE, "vocab_size"), ("layernorm_epsilon", "use_rope_scaling"))


def require_adopted_weights(plan: Plan) -> None:
    """Raise UserError if the plan's imported model has changed since `lrpath adopt`.

    Raises:
        UserError: names the folder, and what to do.
    """
    if plan.adopted is None or not plan.adopted.is_imported:
        return
    folder = weights_folder(Path(plan.adopted.checkpoint))
    if files_fingerprint(content_files(folder)) != plan.adopted.fingerprint:
        raise UserError(
            f"{folder}: its files have changed since {plan.path} adopted them; restore them, or remove `adopted` from "
            f"the plan and call `lrpath adopt {plan.path} --checkpoint {plan.adopted.checkpoint}` again"
        )


def carry(args: Any, stored: Any) -> None:
    """Keep the settings of an imported folder in the arguments `stored` for this run's checkpoints."""
    if (carried := getattr(stored, CARRIED, None)) is not None:
        setattr(args, CARRIED, carried)
