"""User-facing errors with one clear message and no stack trace, and markers of secondary errors."""

import errno
import os

FULL = (errno.ENOSPC, errno.EDQUOT)
TRANSIENT = {
    errno.EIO: "The disk or its server fails; call again, and report it to the administrator if that does not help.",
    errno.ESTALE: "The file server has replaced the file; call again.",
    errno.ETIMEDOUT: "The file server does not answer; call again later.",
    errno.EAGAIN: "It is in use; call again.",
    errno.EBUSY: "It is in use; call again.",
    errno.EINTR: "Call again.",
    errno.ENOMEM: "The machine is out of memory; call again when memory is free.",
    errno.EMFILE: "The process has too many open files; raise `ulimit -n` and call again.",
    errno.ENFILE: "The machine has too many open files; call again later.",
    errno.EREMOTEIO: "The file server fails; call again.",
    errno.EHOSTDOWN: "The file server is down; call again later.",
    errno.ECONNRESET: "The connection was closed; call again.",
}
"""Errors that can be transient, and what to do."""

REMEDIES = {
    **TRANSIENT,
    errno.ENOSPC: "Free disk space and call again.",
    errno.EDQUOT: "The quota is used up; free disk space and call again.",
    errno.EACCES: "Check the permissions.",
    errno.EPERM: "Check the permissions.",
    errno.EROFS: "Use a writable disk.",
    errno.ENOENT: "Check the name.",
    errno.EEXIST: "Choose another name, or move the existing file.",
    errno.ENOTEMPTY: "Choose another name, or move the existing folder.",
    errno.ENOTDIR: "Give the path of a folder.",
    errno.EISDIR: "Give the path of a file.",
    errno.ENAMETOOLONG: "Use a shorter name.",
    errno.ELOOP: "The symbolic links form a loop; fix them.",
    errno.EFBIG: "The file system does not support files of this size; use another one.",
    errno.EMLINK: "The file system does not support more links here; use another folder.",
    errno.EXDEV: "Choose a path on the same file system.",
    errno.EINVAL: "The file system does not support this; choose another path.",
    errno.EOPNOTSUPP: "The file system does not support this; use another one.",
}
"""What to do after an OSError; `ANY_REMEDY` applies to all others."""
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
"""Parts of the errors that other ranks raise after one rank has died; never the cause."""


class UserError(Exception):
    """Bad input. The message states what is wrong, where, and what to do; commands print it and exit with 2."""


class PlanError(UserError):
    """A plan file that cannot be used; the message begins with `FILE:LINE:`."""


class RendezvousError(Exception):
    """Rendezvous timed out: some ranks did not join. Each waiting rank prints the message and exits with 1."""


class TrainingStoppedError(Exception):
    """A training that cannot continue, for a reason other than bad input; the trainer prints the message and
    exits with 1.

    `calling_again_helps` is None if it is unknown.
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
"""Errors that depend on the input: before the first step, a restart raises them again."""


def would_repeat(error: BaseException, step: int | None) -> bool:
    """Return whether a restart would raise this unexpected error again; `step` is the last step finished
    since the start.
    """
    consequence = any(mark in str(error) for mark in CONSEQUENCES)
    return step is None and isinstance(error, REPEATED) and not consequence


def cause(error: OSError) -> str:
    """Return the description of an OSError."""
    if error.errno is None:
        return str(error) or type(error).__name__
    return error.strerror or os.strerror(error.errno)


def is_transient(error: OSError) -> bool:
    """Return whether the error can be transient, so that a retry can succeed."""
    return error.errno in TRANSIENT


def message_of(error: OSError) -> str:
    """Return the message for an OSError: the file, the cause, the remedy. All modules use this function."""
    place = error.filename if error.filename is not None else "input or output"
    place = os.fsdecode(place) if isinstance(place, bytes) else str(place)
    if error.errno is None:  # a library's own text
        return cause(error)
    return f"{place}: {cause(error)}. {REMEDIES.get(error.errno, ANY_REMEDY)}"


def refusal(error: OSError) -> str | None:
    """Return the `message_of` message if a file or disk caused the error; otherwise None.

    A permission error without a file name is not about a user's file. A missing program or library is not
    about a user's file either.
    """
    named = error.filename is not None and error.errno not in (None, errno.ENOENT)
    if error.errno in FULL and error.filename is None:
        return f"a file: {cause(error)}. {REMEDIES[error.errno]}"
    return message_of(error) if named or error.errno in FULL else None
