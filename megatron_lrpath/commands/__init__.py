"""The subcommands of `lrpath`, a module each, in the order in which the help lists them.

A command module has `HELP` (one line), `add_arguments(parser)`, `execute(args) -> int` (the exit status) and,
where it helps, `EXAMPLE` (shown at the end of its help) and
`TAKES_EXTRA` (the words after `--` come as `args.extra`). It imports what is heavy inside `execute`.
"""

COMMANDS = (
    "init", "plan", "lr", "experiment", "run", "sft", "submit", "status", "cancel",
    "eval", "report", "samples", "advise", "merge", "export", "doctor", "completion",
)  # fmt: skip
