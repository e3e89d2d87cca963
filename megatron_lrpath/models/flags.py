"""Megatron arguments from a mapping to the words of a command line."""

from __future__ import annotations

import re
from typing import Any

_NUMBER = re.compile(r"-?[0-9.].*")


def megatron_flags(arguments: dict[str, Any]) -> list[str]:
    """`{"num_layers": 4, "swiglu": True, "split": ["99", "1"]}` as `--num-layers 4 --swiglu --split 99 1`.

    true is a flag, false and None leave the argument out, a list gives several values. Text that begins with
    a dash is joined with `=`, so that it is not read as another argument.
    """
    words: list[str] = []
    for name, value in arguments.items():
        option = "--" + name.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            words.append(option)
        elif isinstance(value, list | tuple):
            words += [option, *(_word(item) for item in value)]
        elif _word(value).startswith("-") and not _NUMBER.fullmatch(_word(value)):
            words.append(f"{option}={_word(value)}")
        else:
            words += [option, _word(value)]
    return words


def _word(value: Any) -> str:
    return repr(value) if isinstance(value, float) else str(value)
