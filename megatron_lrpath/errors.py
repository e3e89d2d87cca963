"""Errors that are the user's to mend: one clear message, no stack trace. And those that only follow from another."""

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
    """A training that cannot go on, through no fault of the command line; the trainer prints it and exits with 1."""
