"""Megatron's `parse_and_validate_args` and `pretrain` for a custom pretrain script, with a session."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from megatron.training import arguments as megatron_arguments
from megatron.training import get_args
from megatron.training import training as megatron_training

from megatron_lrpath import full_disk
from megatron_lrpath.training import seams, setup
from megatron_lrpath.training.checkpoints.dist_checkpointing import load_failures
from megatron_lrpath.training.datasets import DatasetProvider
from megatron_lrpath.training.guards.guard import Guard
from megatron_lrpath.training.guards.peers import own_store
from megatron_lrpath.training.layers import local_layers, take_rope_factor
from megatron_lrpath.training.loop import carry_out
from megatron_lrpath.training.options import arguments, from_arguments
from megatron_lrpath.training.session import Session


class Script:
    """Megatron's two functions for one script, bound to the session of its process."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __iter__(self) -> Any:
        return iter((self.parse_and_validate_args, self.pretrain))

    def parse_and_validate_args(
        self,
        extra_args_provider: arguments.ArgumentsProvider | None = None,
        ignore_unknown_args: bool = False,
        args_defaults: Mapping[str, Any] | None = None,
    ) -> Any:
        """Return Megatron's arguments, parsed and validated, including the group "learning-rate path
        switching".

        For a run with a path this also chooses the checkpoint to start from and writes the lineage; bad
        input ends the process with one message and status 2.
        """
        session = self.session
        with session.exits.reported():
            seams.apply(session)
            session.own_arguments, session.builds_model = extra_args_provider, False
            argv, defaults = sys.argv[1:], dict(args_defaults or {})
            if is_plain(argv) and session.device != "cpu":
                provider = arguments.arguments_provider(extra_args_provider)
                return megatron_arguments.parse_and_validate_args(provider, ignore_unknown_args, defaults)
            session.signals.watch()
            full_disk.keep_printing()
            args = setup.arguments(session, argv, defaults)
            if session.context is None:
                session.signals.let_go()
            else:
                setup.begin(session, args)
            return args

    def pretrain(
        self,
        cfg_container: Any,
        train_valid_test_dataset_provider: Callable[..., Any],
        model_type: Any,
        forward_step_func: Callable[..., Any],
        model_provider: Any = None,
        *positional: Any,
        store: Any = None,
        **options: Any,
    ) -> None:
        """Run Megatron's `pretrain` on the run's path; under a plan the datasets are the plan's version
        slices.
        """
        session = self.session

        def train(provider: Any, forward_step: Any, store: Any) -> None:
            rest = (model_type, forward_step, model_provider, *positional)
            megatron_training.pretrain(cfg_container, provider, *rest, store=store, **options)

        if session.context is None:
            return train(train_valid_test_dataset_provider, forward_step_func, store or own_store())
        with session.exits.reported():
            args, model = get_args(), cfg_container.model
            own_layers = (
                model_provider is not None or getattr(model, "transformer_layer_spec", args) is not None
            )
            take_rope_factor(model, args)
            if args.transformer_impl == "local" and not own_layers:
                model.transformer_layer_spec = local_layers
            planned = session.context.plan is not None
            provider = DatasetProvider(session.context) if planned else train_valid_test_dataset_provider

            def loop() -> None:
                with load_failures(args.load):
                    train(provider, watched(forward_step_func, session.guard), session.store)

            carry_out(session, args, loop)


def is_plain(argv: list[str]) -> bool:
    """Return whether the command line is plain Megatron's.

    Raises:
        UserError: it has options related to --plan or --lr-path without them.
    """
    named = {word.partition("=")[0] for word in argv}
    if named & {"--plan", "--lr-path"}:
        return False
    group = arguments.add_lrpath_arguments(arguments.OneLineParser(allow_abbrev=False, add_help=False))
    known = {option: action.dest for action in group._actions for option in action.option_strings}
    from_arguments.refuse_companions({known[name]: "" for name in known if name in named})
    return True


def watched(forward_step: Callable[..., Any], guard: Guard | None) -> Callable[..., Any]:
    """Wrap the script's forward step, so that the guard sees its losses (it stops at NaN and at spikes)."""

    @functools.wraps(forward_step)
    def step(*args: Any, **kwargs: Any) -> Any:
        output, loss_function = forward_step(*args, **kwargs)

        def loss(*values: Any, **options: Any) -> Any:
            result = loss_function(*values, **options)
            # (sum, tokens, report), or (mean, report) of older scripts
            if guard is not None and len(result) in (2, 3):
                count = result[1] if len(result) == 3 else torch.ones_like(result[0])
                guard.note(result[0], count)
            return result

        return output, loss

    return step
