"""The subcommands of `lrpath`, a module each, in the order in which the help lists them.

To add a command NAME, write `commands/NAME.py` (`_` for `-`) and put NAME into `COMMANDS`. The module has

- `HELP`: one line in lower case, without a full stop; the help begins with it
- `EXAMPLE`: a command line that parses (a test tries it), shown at the end of the help
- `add_arguments(parser)`: the arguments; those that other commands have too come from `options.py`
- `execute(args) -> int`: the exit status; 0 done, 1 failed, and `UserError` for bad input (status 2)
- `TAKES_EXTRA = True`, only where Megatron arguments may follow `--`: they come as `args.extra`

Modules of ours, rich, numpy and the like are imported inside functions: the parser is built of all commands for
every call, help and completion included, and must load nothing heavy (`tests/commands` checks it).
"""

COMMANDS = (
    "init", "check-args", "plan", "budget", "lr", "experiment", "update", "run", "sft", "submit", "status",
    "cancel", "eval", "generate", "chat", "report", "samples", "prune", "rewind", "trace", "archive",
    "adopt", "compare-starts", "advise", "probe", "audition", "merge", "export", "doctor", "docs", "completion",
)  # fmt: skip
