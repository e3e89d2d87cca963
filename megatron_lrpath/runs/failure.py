"""Why a run failed, as data: a small JSON file that the failing process writes and launchers and `status` read."""

from __future__ import annotations

import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, get_type_hints

from megatron_lrpath.errors import (
    CONSEQUENCES,
    NotMetError,
    TrainingStoppedError,
    UserError,
    refusal,
    repeats,
)
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.sealed import read_sealed, write_sealed

VARIABLE = "LRPATH_FAILURE"  # environment variable with the file's path, set by the launcher
MAX_BYTES = 64 * 1024
MAX_CHARACTERS = 2000  # of the message

USER, STOPPED, EXCEPTION, DIED, NOT_MET = "user", "stopped", "error", "died", "not-met"
_HINTS = {9: ", perhaps for want of memory"}


NO_USE = "calling again without a change would end in the same way"


@dataclass(frozen=True)
class Failure:
    """One failure of a run or of an evaluation.

    Attributes:
        kind: user (bad input), stopped (the training cannot go on), error (an exception), died (killed by a
            signal, or gone without a message) or not-met (ranks did not find each other).
        message: one line that says what was wrong.
        rank, host, pid: the process that failed; None and "" where they are not known.
        step: the last finished step, None where it is not known.
        status: the exit status of the process, -n for signal n.
        calling_again_helps: False where another start would fail in the same way; None where nobody knows.
        consequence: it only follows from another rank's end, or gives no more than an exit status.
        time: when it was noticed, ISO 8601 in UTC.
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
        """Whether calling again can help, as a clause."""
        if self.calling_again_helps is False:
            return NO_USE
        return "call the same command again to go on"

    @property
    def may_follow_from_a_stop(self) -> bool:
        """Whether it may be no more than the trace of ranks that were told to stop while they started."""
        return self.kind != USER and (self.consequence or self.kind in (DIED, NOT_MET))


_TYPES = get_type_hints(Failure)


def read(path: Path | str | None) -> Failure | None:
    """The failure in a file; None where there is no file, or one that is torn, too large or of another kind."""
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
        a_number_is_due = _TYPES[name] == int | None  # true and false are integers to Python
        if not isinstance(value, _TYPES[name]) or (isinstance(value, bool) and a_number_is_due):
            return None
    return Failure(**known)


def write(path: Path | str, failure: Failure) -> None:
    """Write the failure, unless a cause stands there already.

    The first cause stays, a consequence never replaces anything, and a cause replaces a consequence. A disk that
    refuses the file is no error here: this must not hide what the process is about to report.
    """
    if read(path) is None and _create(Path(path), failure):
        return
    before = read(path)
    if before is None or (before.consequence and not failure.consequence):
        replace(path, failure)


def _create(path: Path, failure: Failure) -> bool:
    """Write a file that is not there, whole; False where it is: on NFS, only the server knows."""
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
    """Write the failure whatever stands there; for the launcher, after the end of all ranks."""
    with suppress(OSError):
        write_sealed(path, asdict(failure))


def clear(path: Path | str) -> None:
    """Remove the file, at the start of what it would report on."""
    with suppress(OSError):
        Path(path).unlink()


def beside(log: Path) -> Path:
    """The file for what logs into `log` and has no run folder of its own."""
    return log.with_suffix(".error.json")


def target() -> Path | None:
    """The file that this process writes to, None where there is none."""
    path = os.environ.get(VARIABLE)
    return Path(path) if path else None


def use_folder(folder: Path) -> None:
    """Let this process write into the run folder, where no launcher has named a file.

    To be called once the run is this process's own: rank 0 removes what an earlier start left.
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
    """Write what leaves the block as an exception, or as `sys.exit(message)`, and let it go on."""
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
    """The failure of this process that an exception is; `step` is the last finished one."""
    message = one_line(str(error))
    if isinstance(error, UserError):
        return here(USER, message, step=step, status=2, calling_again_helps=False)
    if isinstance(error, TrainingStoppedError):
        return here(STOPPED, message, step=step, calling_again_helps=error.calling_again_helps)
    if isinstance(error, NotMetError):
        return here(NOT_MET, message, step=step, calling_again_helps=True)
    if isinstance(error, OSError) and (refused := refusal(error)) is not None:
        return here(STOPPED, refused, step=step)
    message = f"{type(error).__name__}: {message}".removesuffix(": ")
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        message = f"rank {os.environ.get('RANK', '?')}: {message}"
    consequence = any(mark in str(error) for mark in CONSEQUENCES)
    helps = False if repeats(error, step) else None
    return here(EXCEPTION, message, step=step, consequence=consequence, calling_again_helps=helps)


def here(kind: str, message: str, **known: Any) -> Failure:
    """A failure on this machine, of this process and with status 1 unless `known` (fields of `Failure`) differ."""
    rank = os.environ.get("RANK", "")
    process = {"rank": int(rank) if rank.isdigit() else None, "pid": os.getpid(), "status": 1}
    return Failure(kind, one_line(message), **(process | known), host=socket.gethostname(), time=now())


def of_status(who: str, status: int, rank: int | None = None, pid: int | None = None) -> Failure:
    """The failure of a process on this machine whose parent saw it end with `status` (-n: by signal n).

    `who` names it, as `rank 1`. An exit status alone says little: whatever the process itself has written, or
    will have written in a moment, counts more.
    """
    process: dict[str, Any] = {"rank": rank, "pid": pid, "status": status}
    if status < 0:
        text = f"{who} was killed by {signal_name(-status)}{_HINTS.get(-status, '')}"
        return here(DIED, text, **process)
    text = f"{who} exited with status {status}"
    if status == 2:
        return here(USER, text, **process, calling_again_helps=False, consequence=True)
    return here(EXCEPTION, text, **process, consequence=True)


def signal_name(number: int) -> str:
    """`SIGKILL`, or `signal 99` for a number without a name."""
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def one_line(text: str) -> str:
    """The first line of a message that says something."""
    return next((line.strip() for line in text.splitlines() if line.strip()), "")[:MAX_CHARACTERS]


def now() -> str:
    """The time in UTC to the second, ISO 8601."""
    return datetime.now(UTC).isoformat(timespec="seconds")
