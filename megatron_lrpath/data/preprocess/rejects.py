"""Documents that were turned away: counted, and listed as `FILE:LINE: reason` in a file."""

from __future__ import annotations

from pathlib import Path

from megatron_lrpath.data.preprocess.writer import open_locked
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_open


class RejectLog:
    """The list of rejected documents of one run, written beside the output when there are any.

    Until `close`, no other run can have the same output.
    """

    def __init__(self, path: Path, limit: int, option: str = "--max-rejects") -> None:
        self.path = path
        self.limit = limit
        self.option = option
        self.count = 0
        self.first = ""
        self._aside = Path(f"{path}.partial")
        self._aside.parent.mkdir(parents=True, exist_ok=True)
        self._stream = open_locked(str(self._aside), str(path.with_suffix("")))

    def add(self, name: str, line: int, reason: str) -> None:
        """Note one document: the input file, its line or row (from 1) and what is wrong with it."""
        entry = f"{'<stdin>' if name == '-' else name}:{line}: {reason}"
        self.first = self.first or entry
        self.count += 1
        self._stream.write((entry + "\n").encode("utf-8", "backslashreplace"))

    def publish(self) -> None:
        """Give the list its final name, or remove the one of an earlier run when nothing was rejected."""
        self._stream.flush()
        if self.count:
            with atomic_open(self.path) as target, open(self._aside, "rb") as source:
                while block := source.read(1 << 20):
                    target.write(block)
        else:
            self.path.unlink(missing_ok=True)

    def close(self) -> None:
        """Remove what is temporary and let other runs have the output."""
        if self._stream.closed:
            return
        self._aside.unlink(missing_ok=True)
        self._stream.close()

    def verdict(self, documents: int) -> None:
        """Raise `UserError` when more were rejected than the option allows."""
        if self.count > self.limit:
            raise UserError(
                f"{self.count:,} of {self.count + documents:,} documents were rejected, {self.option} allows "
                f"{self.limit:,}; nothing was written. They are listed in {self.path}, the first is\n"
                f"  {self.first}\n"
                f"Mend them, or allow them with {self.option} {self.count}"
            )
