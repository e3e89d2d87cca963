"""Write the advised alphas into the plan file, unless that changes a trained or running version."""

from __future__ import annotations

from collections.abc import Mapping

from megatron_lrpath.advise.by_version import trained_versions
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import OURS
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.file.edit import with_alphas, write_text
from megatron_lrpath.plan.file.load import plan_from
from megatron_lrpath.plan.file.source import parse_source, read_text
from megatron_lrpath.runs.state import is_live
from megatron_lrpath.wording import listing, plural


def require_applicable(plan: Plan) -> None:
    """Raise UserError if no alpha of the plan can change: all versions are trained, or a training is running."""
    if len(trained_versions(plan)) == len(plan.versions):
        raise UserError(
            f"{plan.path}: --apply: all versions are trained, so that their alphas cannot change; without --apply the "
            "advice is for a fresh plan of the same versions"
        )
    live = [run.key for run in plan.runs(OURS.name) if is_live(plan.folder(run))]
    if live:
        raise UserError(
            f"{plan.path}: --apply: {listing(live)} {'is' if len(live) == 1 else 'are'} being trained by the plan as "
            "it is, and would keep no checkpoint at another branch point; stop it (lrpath cancel, or Ctrl+C) or wait, "
            "and call again"
        )


def apply_alphas(plan: Plan, changes: Mapping[str, float]) -> str:
    """Write these alphas into the plan file atomically; return one line that describes the changes.

    Raises:
        UserError: the file has changed since `plan` was read, a version has been trained since, or the syntax of the
            file does not allow the edit.
    """
    if not changes:
        return f"{plan.path} has these alphas already."
    require_applicable(plan)
    text = read_text(plan.path)
    trained = [name for name in changes if name in trained_versions(plan)]
    if plan_from(parse_source(plan.path, text)) != plan or trained:
        raise UserError(
            f"{plan.path}: --apply: the plan or its runs have changed since the advice was made; call again"
        )
    changed = with_alphas(plan.path, text, changes)
    plan_from(parse_source(plan.path, changed))  # raises where the alphas do not fit
    write_text(plan.path, changed)
    lines = ", ".join(f"{name} alpha {alpha:g}" for name, alpha in changes.items())
    return f"{plan.path}: {plural(len(changes), 'alpha')} written: {lines}."
