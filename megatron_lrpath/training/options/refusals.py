"""Collect the problems of a command line: missing libraries, optimizers, and Megatron's own checks."""

from __future__ import annotations

import ast
import copy
import inspect
import os
import textwrap
import traceback
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from megatron.training.arguments import validate_args

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan.arguments import PATH, PLAN, find
from megatron_lrpath.plan.needs import unmet
from megatron_lrpath.plan.optimizers import optimizer_problems
from megatron_lrpath.training import machine
from megatron_lrpath.training.guards.standstill import fit_collectives
from megatron_lrpath.training.options.arguments import explicit_arguments, full_parser, raise_all
from megatron_lrpath.training.options.from_arguments import incomplete
from megatron_lrpath.training.options.from_machine import set_machine_flags, take_over_saving
from megatron_lrpath.training.options.from_plan import apply_defaults
from megatron_lrpath.training.session import Session

NOTE = "_lrpath_note"
REFUSAL = "Megatron refuses these arguments: "


def found_later(
    given: Mapping[str, Any],
    wrong: Sequence[str],
    session: Session,
    defaults: Mapping[str, Any],
    flags: Sequence[str] = (),
) -> list[str]:
    """Return the problems that later checks would find in the command line in addition to `wrong`, a line each.

    Megatron's own problems are included if all arguments are known and complete.

    Args:
        given: the arguments of the command line.
        wrong: the problems found before.
        session: the session with its device.
        defaults: the defaults of a custom script.
        flags: the arguments that a plan sets, which come first.
    """
    found = unmet(given, machine.available(session.device, session.is_packed))
    parser = full_parser(session.own_arguments)
    explicit = {**given, **explicit_arguments(list(flags))}
    args = Namespace(**{**{action.dest: action.default for action in parser._actions}, **explicit})
    found += optimizer_problems(vars(args), with_path=True)
    if not any(problem.startswith("argument ") for problem in wrong) and "lr_path" in given:
        found += incomplete(given)
    is_whole = not wrong and not found and (flags or "lr_path" in given)
    return [*found, *megatrons(args, explicit, session, defaults)] if is_whole else found


def megatrons(
    args: Namespace, explicit: Mapping[str, Any], session: Session, defaults: Mapping[str, Any]
) -> list[str]:
    """Return what Megatron refuses of arguments that are refused for another reason, a line each."""
    kind = PATH if "lr_path" in explicit else PLAN
    for name in explicit:  # their own refusal is sufficient
        row = find(name)
        if row is not None and row.refuses(kind, explicit[name]):
            setattr(args, name, full_parser(session.own_arguments).get_default(name))
    if args.lr_path_decay_iters is not None:
        args.train_iters = (args.lr_path_parent_step or 0) + args.lr_path_decay_iters
    args.rank, args.world_size = (
        int(os.environ.get(name, i)) for i, name in enumerate(("RANK", "WORLD_SIZE"))
    )
    args._is_global_batch_size_explicitly_specified = args.global_batch_size is not None
    if kind == PLAN:
        apply_defaults(args, explicit)
    try:
        set_machine_flags(args, explicit, session)
    except UserError as error:
        return [str(error)]
    fit_collectives(args, explicit)
    take_over_saving(args)
    return refusals(args, defaults)


def validate(args: Any, defaults: Mapping[str, Any], others: Sequence[str] = ()) -> None:
    """Run Megatron's validation, which changes `args`.

    Args:
        args: Megatron's arguments, parsed.
        defaults: the defaults of a custom script, as Megatron's `args_defaults`.
        others: problems for the same message.

    Raises:
        UserError: `others` and the refusals of Megatron, a line each.
    """
    before = copy.deepcopy(args)
    try:
        validate_args(args, defaults=dict(defaults))
    except (AssertionError, ValueError) as error:
        raise_all([*others, *(refusals(before, defaults) or [one_refusal(error)])])
        raise
    raise_all(others)


def refusals(args: Any, defaults: Mapping[str, Any]) -> list[str]:
    """Return what Megatron's validation refuses, a line each; `args` must not be used afterwards.

    Its checks are statements of one function, which is executed here with each `assert` as a note; it ends at
    the first error of another kind. Later notes can follow from earlier ones.
    """
    found: list[str] = []

    def note(message: object, check: str) -> None:
        found.append(f"{REFUSAL}{message or check}")

    try:
        noting(validate_args, note)(args, defaults=dict(defaults))
    except (AssertionError, ValueError) as error:
        found.append(one_refusal(error))
    except Exception:  # a consequence of the notes, or the validation itself raises it
        pass
    return list(dict.fromkeys(found))


def noting(function: Callable[..., Any], note: Callable[[object, str], None]) -> Callable[..., Any]:
    """Return the function with a call of `note` (message or None, the check) for each failed assertion."""

    lines, first = inspect.getsourcelines(function)
    file = inspect.getsourcefile(function) or ""

    class Noting(ast.NodeTransformer):
        def visit_Assert(self, node: ast.Assert) -> ast.If:
            check = ast.Constant(without_words(ast.unparse(node), function.__name__, file, node.lineno))
            call = ast.Call(ast.Name(NOTE, ast.Load()), [node.msg or ast.Constant(None), check], [])
            unless = ast.If(ast.UnaryOp(ast.Not(), node.test), [ast.Expr(call)], [])
            return ast.copy_location(unless, node)

    tree = ast.parse(textwrap.dedent("".join(lines)))
    tree = Noting().visit(ast.increment_lineno(tree, first - 1))
    names = {**function.__globals__, NOTE: note}
    exec(compile(ast.fix_missing_locations(tree), file, "exec"), names)
    made: Callable[..., Any] = names[function.__name__]
    return made


def one_refusal(error: Exception) -> str:
    """Return an error of the validation as a line."""
    where = traceback.extract_tb(error.__traceback__)[-1]
    check = without_words(where.line or "", where.name, where.filename, where.lineno or 0)
    return f"{REFUSAL}{str(error) or check}"


def without_words(check: str, function: str, file: str, line: int) -> str:
    """Return the text for a check of Megatron without a message: its code."""
    return f"{check} does not hold ({function} in {file}, line {line})"
