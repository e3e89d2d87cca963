"""Errors that are the user's to mend: one clear message, no stack trace. And those that only follow from another."""

import errno
import os

FULL = (errno.ENOSPC, errno.EDQUOT)
PASSING = {
    errno.EIO: "The disk or its server fails; call again, and tell who looks after it if that does not help.",
    errno.ESTALE: "The file server has replaced it meanwhile; call again.",
    errno.ETIMEDOUT: "The file server does not answer; call again later.",
    errno.EAGAIN: "It is in use; call again.",
    errno.EBUSY: "It is in use; call again.",
    errno.EINTR: "Call again.",
    errno.ENOMEM: "The machine has no memory left; call again when it has.",
    errno.EMFILE: "The process may open no more files; raise `ulimit -n` and call again.",
    errno.ENFILE: "The machine may open no more files; call again when it may.",
    errno.EREMOTEIO: "The file server fails; call again.",
    errno.EHOSTDOWN: "The file server is down; call again later.",
    errno.ECONNRESET: "The connection was cut; call again.",
}
"""What may be over at the next call, and how to go on."""

REMEDIES = {
    **PASSING,
    errno.ENOSPC: "Make room and call again.",
    errno.EDQUOT: "The quota is used up; make room and call again.",
    errno.EACCES: "You have no right to it.",
    errno.EPERM: "You have no right to it.",
    errno.EROFS: "Use a disk that may be written.",
    errno.ENOENT: "Check the name.",
    errno.EEXIST: "Name another one, or move it away.",
    errno.ENOTEMPTY: "Name another one, or move it away.",
    errno.ENOTDIR: "Name a folder.",
    errno.EISDIR: "Name a file.",
    errno.ENAMETOOLONG: "Use a shorter name.",
    errno.ELOOP: "Its links lead back to themselves; mend them.",
    errno.EFBIG: "The file system takes no file of this size; use another one.",
    errno.EMLINK: "The file system takes no more of these; use another folder.",
    errno.EXDEV: "Name a place on the same file system.",
    errno.EINVAL: "The file system does not take this; use another place.",
    errno.EOPNOTSUPP: "The file system cannot do this; use another one.",
}
"""How to go on after an error of the system; `ANY_REMEDY` stands for all others."""
ANY_REMEDY = "Check the file and its file system, and call again."

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


def cause(error: OSError) -> str:
    """What the system says of an error, whichever it is."""
    if error.errno is None:
        return str(error) or type(error).__name__
    return error.strerror or os.strerror(error.errno)


def may_pass(error: OSError) -> bool:
    """Whether the next call may not meet the error."""
    return error.errno in PASSING


def told(error: OSError) -> str:
    """An error of the system as a message: where, what, how to go on. The one rule for every number."""
    place = error.filename if error.filename is not None else "input or output"
    place = os.fsdecode(place) if isinstance(place, bytes) else str(place)
    if error.errno is None:  # a library's own text
        return cause(error)
    return f"{place}: {cause(error)}. {REMEDIES.get(error.errno, ANY_REMEDY)}"


def refusal(error: OSError) -> str | None:
    """`told` of what a file or disk refuses; None for an error of another kind.

    A right that is missing for something without a name was not missing for a file of the user's; nor does a program
    or library that is not there speak of a file of the user's.
    """
    named = error.filename is not None and error.errno not in (None, errno.ENOENT)
    if error.errno in FULL and error.filename is None:
        return f"a file: {cause(error)}. {REMEDIES[error.errno]}"
    return told(error) if named or error.errno in FULL else None
