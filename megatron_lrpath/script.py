"""Path switching in a custom pretrain script: Megatron's `parse_and_validate_args` and `pretrain`, extended.

A script built like Megatron-LM's `pretrain_gpt.py` imports these two names from here instead of from
`megatron.training`, above its other imports of Megatron (see docs/coming-from-megatron.md); the import
calls `begin()`. The script then accepts --plan and --lr-path with their related options; without them it
behaves as before.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from megatron_lrpath.training.exits import Exits, Signals
from megatron_lrpath.training.pretrain import open_session

if TYPE_CHECKING:
    from megatron_lrpath.training.own_script import Script


def begin(argv: list[str] | None = None) -> Script:
    """Prepare this process for its device and return the two functions of the script.

    Call it before the first import of Megatron, as in `parse_and_validate_args, pretrain = begin()`: the
    CPU backend must be installed first. Bad input ends the process with one message and status 2.
    """
    exits = Exits()
    with exits.reported():
        session = open_session(sys.argv[1:] if argv is None else argv, exits, Signals())
        from megatron_lrpath.training.own_script import (
            Script,  # imports Megatron, after the device is prepared
        )

        return Script(session)


def __getattr__(name: str) -> Any:
    """Provide the two functions to scripts that import their names: the first import calls `begin`."""
    if name not in ("parse_and_validate_args", "pretrain"):
        raise AttributeError(name)
    parse, pretrain = begin()
    globals().update(parse_and_validate_args=parse, pretrain=pretrain)  # both of one session
    return globals()[name]
