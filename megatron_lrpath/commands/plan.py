"""`lrpath plan`: print the runs that follow from a plan, their costs, and their learning-rate curves."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_lrpath.commands.following import next_for
from megatron_lrpath.commands.options import add_plan, add_set, paradigms_of
from megatron_lrpath.console import say_next
from megatron_lrpath.errors import UserError, cause
from megatron_lrpath.paradigms import PARADIGMS

if TYPE_CHECKING:
    from megatron_lrpath.plan import Plan

HELP = "check a plan and show its runs, their cost against PTFS and their learning-rate curves"
EXAMPLE = "lrpath plan examples/quickstart/plan.yaml --paradigm ours --png curves.png"
PNG_POINTS = 1000  # points of a run's curve


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the plan, the selection of a paradigm, and the output format."""
    add_plan(parser, optional=True)
    add_set(parser, "nothing is written")
    parser.add_argument(
        "--paradigm",
        choices=PARADIGMS,
        help="only this one (default: the runs of those that the plan trains, the costs of all)",
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables and curves")
    parser.add_argument("--no-curves", action="store_true", help="leave the curves out")
    parser.add_argument("--png", type=Path, metavar="FILE", help="draw the curves into a PNG file, too")
    parser.add_argument(
        "--schema", action="store_true", help="print the JSON schema of plan files, for editors, and no more"
    )


def execute(args: argparse.Namespace) -> int:
    """Print the plan and return 0. Raise UserError (status 2) if existing files contradict it."""
    from megatron_lrpath.plan import json_schema, load_plan

    if args.schema:
        print(json.dumps(json_schema(), indent=2, ensure_ascii=False))
        return 0
    if args.plan is None:
        raise UserError("which plan? lrpath plan PLAN (the file), or lrpath plan --schema")
    from megatron_lrpath.launch.estimate import estimate
    from megatron_lrpath.readiness.data import with_vocabulary
    from megatron_lrpath.runs.overridden import OverriddenPlan

    changed = OverriddenPlan.of(args.plan, args.set) if args.set else None
    plan = changed.asked if changed else load_plan(args.plan)
    trained = paradigms_of(args, plan)
    paradigms = tuple(one for one in paradigms_of(args) if plan.runs(one))
    left, sized = estimate(plan, trained), with_vocabulary(plan)
    if args.png:
        from megatron_lrpath.files import atomic_write_bytes

        try:
            atomic_write_bytes(args.png, draw_curves(plan, paradigms))
        except OSError as error:
            text = f"cannot write {args.png}: {cause(error)}; choose another place for --png"
            raise UserError(text) from None
    if args.json:
        whole = as_json(sized, paradigms) | {"left_to_train": {"paradigms": list(trained), **left.to_dict()}}
        print(json.dumps(whole, indent=2, ensure_ascii=False, allow_nan=False))
    else:
        from megatron_lrpath.commands.plan_view import show_plan

        show_plan(sized, paradigms, trained, left, curves=not args.no_curves)
        if args.png:
            print(f"Curves: {args.png}")
    sys.stdout.flush()
    if changed:
        changed.require_output()
    check_files(plan, paradigms)
    if not args.json:
        options = [word for one in args.set for word in ("--set", one)]
        train = shlex.join(["lrpath", "run", str(args.plan), *options])
        trained_as = changed.path if changed else args.plan
        say_next(train if left.steps else next_for(load_plan(trained_as), trained))
    return 0


def check_files(plan: Plan, paradigms: tuple[str, ...]) -> None:
    """Compare the plan with the existing files; missing files are no problem, so that a new plan can be viewed.

    Raises:
        UserError: all that contradicts it.
    """
    from megatron_lrpath.readiness import ANYWHERE, Request, check_plan, refuse, tell

    findings = check_plan(plan, Request(paradigms, where=ANYWHERE))
    tell(findings)
    refuse([(plan, findings)], missing_too=False)


def draw_curves(plan: Plan, paradigms: tuple[str, ...]) -> bytes:
    """Return a PNG with a panel for each paradigm: learning rate over steps, a shade for each version."""
    import numpy as np

    from megatron_lrpath.commands.plan_view import curve_points
    from megatron_lrpath.report.style import drawing_style, name_curve, rate_panels, run_colour, to_png

    with drawing_style():
        figure, panels, unit = rate_panels(plan, paradigms, 0.6 + 2.3 * len(paradigms))
        for paradigm, axes in panels.items():
            for run in plan.runs(paradigm):
                steps, rates = np.array(curve_points(run, PNG_POINTS)).T
                colour = run_colour(plan, run)
                axes.plot(steps, rates / unit, color=colour, linewidth=1.6)
                place = run.last_step / 2 if not run.makes_version else run.last_step
                name_curve(axes, run, (place, run.path.lr_at(place) / unit), colour)
        return to_png(figure)


def as_json(plan: Plan, paradigms: tuple[str, ...]) -> dict[str, Any]:
    """Return the JSON: the runs of each paradigm in dependency order, total steps and relative cost.

    A run with a mix has the number of samples that it reads from each slice.
    """
    paths = {}
    for paradigm in paradigms:
        cost, runs = plan.cost(paradigm), []
        for run in plan.runs(paradigm):
            runs.append(run.to_dict() | {"tokens": plan.tokens_of(run)})
            if run.mix:
                runs[-1]["mix"]["samples"] = run.mix.samples(plan.batch_of(run).global_batch_size, run.steps)
        paths[paradigm] = {
            "runs": runs,
            "total_steps": cost.steps,
            "total_tokens": cost.tokens,
            "relative_cost": cost.relative,
            "storage": storage_as_json(plan, paradigm),
        }
    return {
        "name": plan.name,
        "versions": [
            {
                "name": version.name,
                "steps": version.steps,
                "alpha": version.alpha or plan.alpha,
                "global_batch_size": plan.batch_sizes.size_of(end),
                "new_samples": plan.samples_of(index),
                "replay": version.replay.to_dict() if version.replay else None,
            }
            for index, (version, end) in enumerate(zip(plan.versions, plan.timeline.ends, strict=True))
        ],
        "paradigms": paths,
        "sft": sft_as_json(plan),
    }


def storage_as_json(plan: Plan, paradigm: str) -> dict[str, Any] | None:
    """Return the bytes of the paradigm's checkpoints; None for a model whose parameters cannot be counted."""
    from megatron_lrpath.runs.storage import predicted

    storage = predicted(plan, paradigm)
    if storage is None:
        return None
    return {
        "weights": storage.one.weights,
        "optimizer_state": storage.one.state,
        "checkpoint": storage.one.total,
        "kept_by_version": storage.by_version,
        "newest": storage.newest,
        "total": storage.total,
    }


def sft_as_json(plan: Plan) -> dict[str, Any] | None:
    """Return the fine-tunings; `runs` is None while their steps depend on data that are not prepared."""
    if plan.sft is None:
        return None
    runs = [run.to_dict() | {"paradigm": name} for name in plan.sft.paradigms for run in plan.sft_runs(name)]
    return {
        "versions": list(plan.sft.versions),
        "paradigms": list(plan.sft.paradigms),
        "data": list(plan.sft.data),
        "epochs": plan.sft.epochs,
        "steps": plan.sft.steps,
        "runs": runs or None,
    }
