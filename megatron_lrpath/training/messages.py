"""What a training says to people: on the error stream, at once."""

import sys


def say(text: str) -> None:
    """Print `text`."""
    print(text, file=sys.stderr, flush=True)


def warn(text: object) -> None:
    """Print `text` as a warning: the training goes on."""
    say(f"lrpath: WARNING: {text}")


def say_error(text: object) -> None:
    """Print `text` as what ended the run."""
    say(f"lrpath: error: {text}")
