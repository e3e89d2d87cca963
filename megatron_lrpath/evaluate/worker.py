"""Evaluates trained runs of a plan in one process group: one model, into which their weights are loaded."""

from __future__ import annotations

import argparse
import os
import sys
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.runs import failure
from megatron_lrpath.runs.checkpoints import MANIFEST, checkpoint_folder, present_fingerprint
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.runs.results import Target, add_evaluation
from megatron_lrpath.training import device as backend


@dataclass
class Sets:
    """The plan's fixed validation set; for fine-tunings the held-out answers, too, where there are any.

    `fingerprint` is that of the validation slice; `answers_length` is the answers' length; `args` are Megatron's
    arguments, which carry the length in use.
    """

    args: Any
    validation: Any
    fingerprint: str
    answers: Any = None
    answers_length: int = 0

    def evaluate(self, model: list[Any]) -> dict[str, Any]:
        """The scores as the evaluation's file holds them; those of held-out answers under `answers`."""
        from megatron_lrpath.evaluate.perplexity import evaluate_model
        from megatron_lrpath.training.forward import set_packed

        set_packed(False)
        found = evaluate_model(model, self.validation) | {"validation": self.fingerprint}
        if self.answers is None:
            return found
        usual, self.args.seq_length = self.args.seq_length, self.answers_length
        set_packed(True)
        answers = evaluate_model(model, self.answers)
        set_packed(False)
        self.args.seq_length = usual
        return found | {"answers": {name: answers[name] for name in ("loss", "perplexity", "tokens")}}


def parse(words: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Our words, and the Megatron arguments that may follow."""
    parser = argparse.ArgumentParser(allow_abbrev=False, description=__doc__)
    parser.add_argument("--plan", type=Path, required=True)
    parser.add_argument("--runs", nargs="+", required=True, metavar="PARADIGM/RUN[@STEP]")
    parser.add_argument("--device", default="auto", choices=backend.DEVICES)
    return parser.parse_known_args(words)


def main(words: list[str] | None = None) -> None:
    """Evaluate; a user's error is one message and exit code 2."""
    for category in (DeprecationWarning, FutureWarning, UserWarning):
        warnings.filterwarnings("ignore", category=category)
    said, extra = parse(sys.argv[1:] if words is None else words)
    try:
        with failure.recorded():
            plan = load_plan(said.plan)
            evaluate_targets(plan, [Target.named(plan, name) for name in said.runs], said.device, extra)
    except UserError as error:
        if int(os.environ.get("RANK", "0")) == 0:
            print(f"lrpath: error: {error}", file=sys.stderr, flush=True)
        os._exit(2)


def evaluate_targets(plan: Plan, targets: list[Target], device: str, extra: list[str]) -> None:
    """Evaluate each checkpoint and write its evaluation."""
    device = backend.choose_device(device)
    backend.activate(device)
    from megatron_lrpath.training import seams, setup
    from megatron_lrpath.training.pretrain import set_single_process_environment

    set_single_process_environment()
    seams.apply(device)
    words = ["--plan", str(plan.path), "--paradigm", targets[0].run.paradigm, "--run", targets[0].run.name]
    words += ["--tensorboard-dir", "", *extra]  # an evaluation adds nothing to the training's records
    args, _ = setup.arguments(words, device)
    model, sets = build(plan, args, setup.configuration)
    for target in targets:
        if load_weights(plan, target, args, model):
            write_evaluation(plan, target, model, sets)
    setup.end()


def build(plan: Plan, args: Any, configuration: Any) -> tuple[list[Any], Sets]:
    """The model with random weights, and what it is evaluated on."""
    from megatron.core.enums import ModelType
    from megatron.core.process_groups_config import ProcessGroupCollection
    from megatron.training import training

    from megatron_lrpath.data.slice import open_validation
    from megatron_lrpath.data.versioned import build_validation
    from megatron_lrpath.sft.dataset import build_packed_validation
    from megatron_lrpath.training.context import get_context
    from megatron_lrpath.training.datasets import dataset_config
    from megatron_lrpath.training.guards.peers import own_store

    args.skip_train, args.load, args.no_load_rng = True, None, True
    training.initialize_megatron(store=own_store())
    model, _, _ = training.setup_model_and_optimizer(
        ModelType.encoder_or_decoder,
        cfg_container=configuration(args),
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
    seq_length, args.seq_length = args.seq_length, plan.batch.seq_length
    held_out = open_validation(plan.data)
    dataset = build_validation(held_out, dataset_config(args, versioned=True))
    sets = Sets(args, dataset, held_out.fingerprint)
    context = get_context()
    if context is not None and context.prepared is not None:
        sets.answers, sets.answers_length = build_packed_validation(context.prepared), seq_length
    return model, sets


def load_weights(plan: Plan, target: Target, args: Any, model: list[Any]) -> bool:
    """Load the checkpoint's weights; False where it is one along the main path that the training has since removed.

    Raises:
        UserError: that checkpoint is missing, damaged or of another model.
    """
    from megatron.training.checkpointing import load_checkpoint

    from megatron_lrpath.training.checkpoints import parent as branch
    from megatron_lrpath.training.context import ParentCheckpoint

    folder, step = RunFolder(plan.folder(target.run)).checkpoints, target.step
    if target.at is None:
        branch.require_checkpoint(ParentCheckpoint(folder, step))
    elif removed(folder, step):
        return False
    if problems := damage(folder, step):
        if target.at is not None and removed(folder, step):
            return False
        raise UserError(
            f"{folder}: the checkpoint of step {step} is damaged: {'; '.join(problems)}. Restore it from "
            "a backup, or train the run anew."
        )
    branch.check_model(args, folder, step, weights_only=target.run.kind == "sft")
    args.load, args.ckpt_step = str(folder), step
    args.no_load_optim, args.no_load_rng, args.exit_on_missing_checkpoint = True, True, True
    load_checkpoint(model, None, None)
    return True


def removed(folder: Path, step: int) -> bool:
    """Whether a checkpoint is not there any more, as rank 0 sees it."""
    import torch.distributed as dist

    found = [not checkpoint_folder(folder, step).exists()]
    dist.broadcast_object_list(found, src=0)
    return found[0]


def damage(folder: Path, step: int) -> list[str]:
    """What is wrong with a checkpoint's files, in words; every rank reads its share and learns what all found."""
    import torch.distributed as dist

    from megatron_lrpath.training.checkpoints import start
    from megatron_lrpath.training.guards.peers import Ranks

    ranks = Ranks(dist.get_rank(), dist.get_world_size(), store=None)
    mine = start.damage(folder, step, "sizes", ranks)
    if not mine and (checkpoint_folder(folder, step) / MANIFEST).exists():
        mine = start.content_problems(checkpoint_folder(folder, step), ranks)
    found: list[list[str]] = [[]] * ranks.world
    dist.all_gather_object(found, mine)
    return sorted({problem for part in found for problem in part})


def write_evaluation(plan: Plan, target: Target, model: list[Any], sets: Sets) -> None:
    """Evaluate the loaded weights; rank 0 writes the evaluation, with the fingerprint of the checkpoint."""
    scores = sets.evaluate(model)
    if int(os.environ["RANK"]) == 0:
        root = RunFolder(plan.folder(target.run)).checkpoints
        checkpoint = present_fingerprint(root, target.step)
        evaluation = {"step": target.step, "checkpoint": checkpoint, **scores}
        add_evaluation(plan, target, evaluation)
        print(f"evaluated {target.name} {evaluation['perplexity']:.4f}", flush=True)


if __name__ == "__main__":
    main()
