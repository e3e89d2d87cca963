"""How the scripts in `tools/` end: a user's error as one line and status 2, never a stack trace."""

from __future__ import annotations

import sys
from collections.abc import Callable

from megatron_lrpath.errors import UserError


def run_script(main: Callable[[], int]) -> int:
    """The exit status of `main`, with user errors and interruptions turned into one line each."""
    try:
        return main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; nothing half-written was left under a final name", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"error: {error.filename or 'input or output'}: {error.strerror or error}", file=sys.stderr)
        return 2
