"""Path switching in a pretrain script of your own: Megatron's `parse_and_validate_args` and `pretrain`, extended.

A script built like Megatron-LM's `pretrain_gpt.py` takes these two names from here instead of from
`megatron.training`, above its other imports of Megatron (see docs/coming-from-megatron.md). It then knows --plan
and --lr-path with their companions; without them it is the script it was.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

from megatron_lrpath import full_disk
from megatron_lrpath.errors import UserError
from megatron_lrpath.training import device as backend
from megatron_lrpath.training import pretrain as own
from megatron_lrpath.training.checkpoints import ahead
from megatron_lrpath.training.guards import signals
from megatron_lrpath.training.options import arguments as early

with own.told():
    _said = early.read(sys.argv[1:])
    ahead.begin(_said)
    _device = backend.choose_device(_said.device)
    backend.activate(_device)  # the CPU's must stand before Megatron is imported

import torch
from megatron.training import arguments as megatron_arguments
from megatron.training import training as megatron_training

from megatron_lrpath.training import datasets, seams, setup
from megatron_lrpath.training.checkpoints import unpickle
from megatron_lrpath.training.context import RunContext, get_context
from megatron_lrpath.training.guards.guard import current_guard
from megatron_lrpath.training.guards.peers import own_store
from megatron_lrpath.training.options import arguments, from_arguments

_start: tuple[int, torch.distributed.Store | None] = (0, None)


def parse_and_validate_args(
    extra_args_provider: arguments.ArgumentsProvider | None = None,
    ignore_unknown_args: bool = False,
    args_defaults: Mapping[str, Any] | None = None,
) -> Any:
    """Megatron's arguments, read and validated, with the group "learning-rate path switching" among them.

    For a run with a path this is also where its checkpoint to start from is chosen and its lineage written;
    bad input ends the process with one message and status 2.
    """
    global _start
    with own.told():
        own.set_single_process_environment()
        seams.apply(_device)
        arguments.use_own_arguments(extra_args_provider)
        words, defaults = sys.argv[1:], dict(args_defaults or {})
        if is_plain(words) and _device != "cpu":
            return megatron_arguments.parse_and_validate_args(
                arguments.add_all_own_arguments, ignore_unknown_args, defaults
            )
        signals.watch()
        full_disk.keep_printing()
        args, context = setup.arguments(words, _device, defaults)
        if context is None:
            signals.let_go()
        else:
            refuse_unsupported(args)
            _start = setup.begin(args, context, _device)
        return args


def is_plain(words: list[str]) -> bool:
    """Whether the command line is for Megatron alone.

    Raises:
        UserError: it has companions of --plan or --lr-path without them.
    """
    named = {word.partition("=")[0] for word in words}
    if named & {"--plan", "--lr-path"}:
        return False
    group = arguments.add_lrpath_arguments(arguments.OneLineParser(allow_abbrev=False, add_help=False))
    known = {option: action.dest for action in group._actions for option in action.option_strings}
    from_arguments.refuse_companions({known[name]: "" for name in known if name in named})
    return True


def refuse_unsupported(args: Any) -> None:
    """Stop at what restarts or configures a run behind its lineage's back."""
    for name in ("inprocess_restart", "yaml_cfg", "use_checkpoint_args"):
        if getattr(args, name, None):
            raise UserError(
                f"{from_arguments.flag(name)} cannot be given with --plan or --lr-path: a run's arguments and "
                "starts are recorded and compared. Leave it out."
            )


@functools.wraps(megatron_training.pretrain)
def pretrain(
    cfg_container: Any,
    train_valid_test_dataset_provider: Callable[..., Any],
    model_type: Any,
    forward_step_func: Callable[..., Any],
    model_provider: Any = None,
    *positional: Any,
    store: Any = None,
    **options: Any,
) -> None:
    """Megatron's `pretrain` on the run's path; under a plan the datasets are the plan's version slices."""
    context = get_context()

    def train(provider: Any, forward_step: Any, store: Any) -> None:
        rest = (model_type, forward_step, model_provider, *positional)
        megatron_training.pretrain(cfg_container, provider, *rest, store=store, **options)

    if context is None:
        return train(train_valid_test_dataset_provider, forward_step_func, store or own_store())
    with own.told():
        args = setup_layers(cfg_container, model_provider)
        first_step, store = _start
        provider = dataset_provider(context, train_valid_test_dataset_provider)

        def loop() -> None:
            with unpickle.load_failures(args.load):
                train(provider, watched(forward_step_func), store)

        own.carry_out(args, context, first_step, loop)


def setup_layers(cfg_container: Any, model_provider: Any) -> Any:
    """Give the model layers for where Transformer Engine is missing, unless the script has its own; the arguments."""
    from megatron.training import get_args

    args, model = get_args(), cfg_container.model
    own_layers = model_provider is not None or getattr(model, "transformer_layer_spec", args) is not None
    if args.transformer_impl == "local" and not own_layers:
        from megatron_lrpath.training.layers import local_layers

        model.transformer_layer_spec = local_layers
    return args


def dataset_provider(context: RunContext, scripts: Callable[..., Any]) -> Callable[..., Any]:
    """The plan's datasets, or the script's where there is no plan."""
    return datasets.provide_datasets if context.plan is not None else scripts


def watched(forward_step: Callable[..., Any]) -> Callable[..., Any]:
    """The script's forward step, whose losses the guard hears of (it stops at NaN and at spikes)."""

    @functools.wraps(forward_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        output, loss_function = forward_step(*args, **kwargs)

        def loss(*values: Any, **options: Any) -> Any:
            result = loss_function(*values, **options)
            # (sum, tokens, report), or (mean, report) of older scripts
            if (guard := current_guard()) is not None and len(result) in (2, 3):
                count = result[1] if len(result) == 3 else torch.ones_like(result[0])
                guard.note(result[0], count)
            return result

        return output, loss

    return step
