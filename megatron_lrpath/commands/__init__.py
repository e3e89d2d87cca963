"""The subcommands of `lrpath`, one module each, in the order of the help.

To add a command NAME, write `commands/NAME.py` (`_` for `-`) and add NAME to `COMMANDS`. The module has

- `HELP`: one line in lower case, without a full stop; the help begins with it
- `EXAMPLE`: a command line that parses (a test tries it), shown at the end of the help
- `add_arguments(parser)`: adds the arguments; those shared with other commands are in `options.py`
- `execute(args) -> int`: runs the command and returns the exit status: 0 done, 1 failed; raises `UserError`
  for bad input (status 2)
- `TAKES_EXTRA = True`, only if Megatron arguments may follow `--`: they arrive as `args.extra`

This package's modules, rich, numpy and the like are imported inside functions: every call, help and
completion included, builds the parser of all commands, which must load nothing heavy (`tests/commands`
checks it).
"""

COMMANDS = (
    "init", "check-args", "plan", "budget", "lr", "experiment", "update", "run", "sft", "submit", "status",
    "cancel", "eval", "generate", "chat", "report", "samples", "prune", "rewind", "trace", "archive",
    "adopt", "compare-starts", "advise", "probe", "audition", "merge", "export", "doctor", "docs", "completion",
)  # fmt: skip
