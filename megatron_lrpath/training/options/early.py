"""What must be known of the command line before torch and Megatron are imported, which takes seconds."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn


class SilentParser(argparse.ArgumentParser):
    """Leaves complaints to the parser that knows all arguments."""

    def error(self, message: str) -> NoReturn:
        """Raise ValueError."""
        raise ValueError(message)


def read(words: Sequence[str]) -> argparse.Namespace:
    """`device`, and `plan`, `paradigm` and `run` (None where they are not given); nothing is checked yet."""
    parser = SilentParser(allow_abbrev=False, add_help=False)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--plan", type=Path)
    parser.add_argument("--paradigm")
    parser.add_argument("--run", "--run-name", dest="run")
    try:
        return parser.parse_known_args(words)[0]
    except ValueError:
        return parser.parse_args([])
