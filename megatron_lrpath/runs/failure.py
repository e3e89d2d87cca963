"""The cause of a failed run as data: a small JSON file that the failing process writes and launchers and
`status` read.
"""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

from megatron_lrpath.errors import (
    CONSEQUENCES,
    RendezvousError,
    TrainingStoppedError,
    UserError,
    refusal,
    would_repeat,
)
from megatron_lrpath.exits import SAVED_AND_STOPPED
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.sealed import read_sealed, write_sealed

VARIABLE = "LRPATH_FAILURE"  # environment variable with the file's path, set by the launcher
MAX_BYTES = 64 * 1024
MAX_CHARACTERS = 2000  # maximum length of the message

USER, STOPPED, EXCEPTION, DIED, NOT_MET = "user", "stopped", "error", "died", "not-met"
_HINTS = {9: ", possibly out of memory"}


NO_USE = "calling again without a change would fail in the same way"


@dataclass(frozen=True)
class Failure:
    """A failure of a run or of an evaluation.

    Attributes:
        kind: user (bad input), stopped (the training cannot continue), error (an exception), died (killed by a signal,
            or ended without a message) or not-met (rendezvous failed).
        message: the cause in one line.
        rank, host, pid: the process that failed; None and "" if unknown.
        step: the last finished step; None if unknown.
        status: the exit status of the process, -n for signal n.
        calling_again_helps: False if another start would fail in the same way; None if unknown.
        consequence: whether it only follows from the end of another rank, or is only an exit status.
        time: when it was detected, ISO 8601 in UTC.
    """

    kind: str
    message: str
    rank: int | None = None
    host: str = ""
    pid: int | None = None
    step: int | None = None
    status: int | None = None
    calling_again_helps: bool | None = None
    consequence: bool = False
    time: str = ""

    @property
    def again(self) -> str:
        """Advice on a retry, as a clause."""
        if self.calling_again_helps is False:
            return NO_USE
        return "call the same command again to continue"

    @property
    def may_follow_from_a_stop(self) -> bool:
        """Return whether it can be only a consequence: a rank that received a signal while it started."""
        return self.kind != USER and (self.consequence or self.kind in (DIED, NOT_MET))


_TYPES = get_type_hints(Failure)


def read(path: Path | str | None) -> Failure | None:
    """Return the failure in a file; None if there is no file, or if it is truncated, too large or malformed."""
    if path is None:
        return None
    try:
        row = read_sealed(Path(path), MAX_BYTES)[0]
    except (OSError, ValueError):
        return None
    if not {"kind", "message"} <= row.keys():
        return None
    known = {name: row[name] for name in _TYPES if name in row}
    for name, value in known.items():
        a_number_is_due = _TYPES[name] == int | None  # true and false are integers in Python
        if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and a_number_is_due):
            return None
    return Failure(**known)


def write(path: Path | str, failure: Failure) -> None:
    """Write the failure, unless the file already has a cause.

    The first cause is kept, a consequence never replaces anything, and a cause replaces a consequence. An
    error of the disk is ignored, because it must not hide the failure that the process is about to report.
    """
    if read(path) is None and _create(Path(path), failure):
        return
    before = read(path)
    if before is None or (before.consequence and not failure.consequence):
        replace(path, failure)


def _create(path: Path, failure: Failure) -> bool:
    """Create a complete file; return False if it already exists; on NFS, only the server decides."""
    draft = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
    try:
        write_sealed(draft, asdict(failure))
        os.link(draft, path)
    except FileExistsError:
        return False
    except OSError:  # a full disk, or one without links
        replace(path, failure)
    finally:
        clear(draft)
    return True


def replace(path: Path | str, failure: Failure) -> None:
    """Write the failure and replace any other; for the launcher, after the end of all ranks."""
    with suppress(OSError):
        write_sealed(path, asdict(failure))


def clear(path: Path | str) -> None:
    """Remove the file, at the start of the process that it would report on."""
    with suppress(OSError):
        Path(path).unlink()


def beside(log: Path) -> Path:
    """Return the failure file of a process that logs into `log` and has no run folder."""
    return log.with_suffix(".error.json")


def target() -> Path | None:
    """Return the failure file of this process; None if there is none."""
    path = os.environ.get(VARIABLE)
    return Path(path) if path else None


def use_folder(folder: Path) -> None:
    """Write failures of this process into the run folder, unless a launcher has set a file.

    Call it when this process owns the run: rank 0 removes the file of an earlier start.
    """
    if target() is None:
        os.environ[VARIABLE] = str(RunFolder(folder).error)
        if int(os.environ.get("RANK", "0")) == 0:
            clear(RunFolder(folder).error)


def record(failure: Failure) -> None:
    """Write the failure to this process's file, if it has one."""
    path = target()
    if path is not None:
        write(path, failure)


def record_error(error: BaseException, step: int | None = None) -> None:
    """Write the exception to this process's file, if it has one."""
    record(of_error(error, step))


@contextmanager
def recorded() -> Iterator[None]:
    """Record an exception, or `sys.exit(message)`, that leaves the block, and re-raise it."""
    try:
        yield
    except Exception as error:
        record_error(error)
        raise
    except SystemExit as error:
        if isinstance(error.code, str):
            record_error(TrainingStoppedError(error.code))
        raise


def of_error(error: BaseException, step: int | None = None) -> Failure:
    """Return the failure of this process for an exception; `step` is the last finished step."""
    message = one_line(str(error))
    if isinstance(error, UserError):
        message = joined(str(error))
        return here(USER, message, step=step, status=2, calling_again_helps=False)
    if isinstance(error, TrainingStoppedError):
        return here(STOPPED, message, step=step, calling_again_helps=error.calling_again_helps)
    if isinstance(error, RendezvousError):
        return here(NOT_MET, message, step=step, calling_again_helps=True)
    if isinstance(error, OSError) and (refused := refusal(error)) is not None:
        return here(STOPPED, refused, step=step)
    message = f"{type(error).__name__}: {message}".removesuffix(": ")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = f"rank {os.environ.get('RANK', '?')}: {message}"
    consequence = any(mark in str(error) for mark in CONSEQUENCES)
    helps = False if would_repeat(error, step) else None
    return here(EXCEPTION, message, step=step, consequence=consequence, calling_again_helps=helps)


def here(kind: str, message: str, **known: Any) -> Failure:
    """Return a failure of this process with status 1, with the fields in `known` overridden."""
    rank = os.environ.get("RANK", "")
    process = {"rank": int(rank) if rank.isdigit() else None, "pid": os.getpid(), "status": 1}
    return Failure(kind, one_line(message), **(process | known), host=socket.gethostname(), time=now())


def of_status(who: str, status: int, rank: int | None = None, pid: int | None = None) -> Failure:
    """Return the failure of a child process that ended with `status` (-n: by signal n).

    `who` names it, as in `rank 1`. An exit status has little information, so a failure that the process
    itself writes takes precedence.
    """
    process: dict[str, Any] = {"rank": rank, "pid": pid, "status": status}
    if status < 0:
        text = f"{who} was killed by {signal_name(-status)}{_HINTS.get(-status, '')}"
        return here(DIED, text, **process)
    text = f"{who} exited with status {status}"
    if status == 2:
        return here(USER, text, **process, calling_again_helps=False, consequence=True)
    return here(EXCEPTION, text, **process, consequence=True)


def first(statuses: Mapping[int, int], ended: Collection[int] = ()) -> int:
    """Return the process that a signal killed, else the first that failed, from statuses in the order of the ends.

    Processes that have been `ended`, or may have been asked to end, count only if no other has failed; successful
    ones come last.
    """

    def order(process: int) -> int:
        status = statuses[process]
        if status == 0:
            return 3
        asked = process in ended or status in (-signal.SIGTERM, SAVED_AND_STOPPED)
        return 2 if asked else int(status >= 0)

    return min(statuses, key=order)


def signal_name(number: int) -> str:
    """Return `SIGKILL`, or `signal 99` for a number without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def one_line(text: str) -> str:
    """Return the first non-empty line of a message."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:MAX_CHARACTERS]


def joined(text: str) -> str:
    """Return all lines of a message in one: a heading with `:` precedes the others, which `;` separates."""
    lines = [line.strip().removeprefix("- ") for line in text.splitlines() if line.strip()]
    ended = [line if line[-1] in ":;" else line.removesuffix(".") + ";" for line in lines[:-1]]
    return " ".join([*ended, *lines[-1:]])[:MAX_CHARACTERS]


def now() -> str:
    """Return the time in UTC to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
