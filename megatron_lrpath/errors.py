"""Errors that are the user's to mend: one clear message, no stack trace."""


class UserError(Exception):
    """Bad input. The message says what is wrong, where, and how to go on; commands print it and exit with 2."""


class PlanError(UserError):
    """A plan file that cannot be used; the message begins with `FILE:LINE:`."""


class TrainingStoppedError(Exception):
    """A training that cannot go on, through no fault of the command line; the trainer prints it and exits with 1."""
