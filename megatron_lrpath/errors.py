"""Errors that are the user's to mend: one clear message, no stack trace. And those that only follow from another."""

import errno

FULL = (errno.ENOSPC, errno.EDQUOT)
REMEDIES = {
    errno.ENOSPC: "Make room and call again.",
    errno.EDQUOT: "The quota is used up; make room and call again.",
    errno.EACCES: "You have no right to it.",
    errno.EPERM: "You have no right to it.",
    errno.EROFS: "Use a disk that may be written.",
}

CONSEQUENCES = (
    "Connection closed by peer",
    "Connection reset by peer",
    "Connection refused",
    "Broken pipe",
    "DistNetworkError",
    "ncclRemoteError",
    "recvValue failed",
    "Application timeout caused pair closure",
)
"""Parts of what the other ranks' libraries say when one rank is gone: never the cause."""


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and how to go on; commands print it and exit with 2."""


class PlanError(UserError):
    """A plan file that cannot be used; the message begins with `FILE:LINE:`."""


class NotMetError(Exception):
    """Ranks that do not come; each that waited for them prints it, and exits with 1."""


class TrainingStoppedError(Exception):
    """A training that cannot go on, through no fault of the command line; the trainer prints it and exits with 1.

    `calling_again_helps` is None where nobody knows.
    """

    def __init__(self, message: str, calling_again_helps: bool | None = None) -> None:
        super().__init__(message)
        self.calling_again_helps = calling_again_helps


REPEATED = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    NameError,
    TypeError,
    ValueError,
)
"""What code raises for what it was given: before the first step, another start raises it again."""


def repeats(error: BaseException, step: int | None) -> bool:
    """Whether another start would meet an unexpected error again; `step` is the last finished one of this start."""
    consequence = any(mark in str(error) for mark in CONSEQUENCES)
    return step is None and isinstance(error, REPEATED) and not consequence


def refusal(error: OSError) -> str | None:
    """What a full or forbidden disk refuses, and how to go on; None for an error of another kind.

    A right that is missing for something without a name was not missing for a file of the user's.
    """
    remedy = REMEDIES.get(error.errno or 0)
    if error.filename is None and error.errno not in FULL:
        return None
    return f"{error.filename or 'a file'}: {error.strerror}. {remedy}" if remedy else None
