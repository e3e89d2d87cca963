"""Copy checkpoints to an object store file by file, compare them with their manifests, and fetch them."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import xxhash

from megatron_lrpath.console import say
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import sync_folder
from megatron_lrpath.locks import LOCK_NAME, FolderLock, LockHeldError
from megatron_lrpath.plan import Plan, Run
from megatron_lrpath.runs.checkpoints import (
    CHUNK,
    MANIFEST,
    FileSum,
    ManifestError,
    checkpoint_complete,
    checkpoint_folder,
    parse_manifest,
    read_manifest,
    tracked_step,
    write_tracker,
    wrong_content,
)
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.wording import byte_size

BUCKET_STORES = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "oci"}  # names in fsspec
FETCHING = ".fetching"  # suffix of a checkpoint that is not completely fetched

type Note = Callable[[str], None]


def _silent(text: str) -> None:
    """Discard the message."""


@dataclass(frozen=True)
class Archive:
    """A folder of an object store, `URL/<paradigm>/<run>/iter_N/<file>`.

    A checkpoint is complete there when its manifest is, which is written last. Every method raises UserError
    if the store does not answer or refuses; completed work is kept, and the call can be repeated.
    """

    url: str
    fs: Any
    root: str

    @classmethod
    def of(cls, plan: Plan) -> Archive | None:
        """Return the archive of the plan; None if it has none."""
        return None if plan.archive is None else cls.open(plan.archive)

    @classmethod
    def open(cls, url: str) -> Archive:
        """Open the store; write nothing.

        Raises:
            UserError: the store's package is not installed, or the address is invalid.
        """
        extra = "pip install 'megatron-lrpath[archive]'"
        try:
            from fsspec.core import url_to_fs
        except ImportError:
            raise UserError(f"archive {url}: needs the package fsspec: {extra}") from None
        try:
            fs, root = url_to_fs(url, use_listings_cache=False)
        except ImportError as error:
            raise UserError(f"archive {url}: {error}; for S3: {extra}") from None
        except ValueError as error:
            raise UserError(f"archive {url}: {error}") from None
        return cls(url, fs, root.rstrip("/"))

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Convert the errors of a store to UserError: each store has its own, and not all are OSErrors."""
        try:
            yield
        except (UserError, KeyboardInterrupt):
            raise
        except Exception as error:
            text = " ".join(str(error).split()) or type(error).__name__
            raise UserError(
                f"archive {self.url}: {text}. Check the address, the credentials (for S3 in AWS_PROFILE or "
                "AWS_ACCESS_KEY_ID, the endpoint in AWS_ENDPOINT_URL) and the disk; then call again: complete files "
                "are not copied again"
            ) from None

    def place(self, key: str, step: int) -> str:
        """Return the path of a run's checkpoint."""
        return f"{self.root}/{key}/{checkpoint_folder(Path(), step).name}"

    @property
    def has_buckets(self) -> bool:
        """Return whether the store has no folders; `makedirs` would create a bucket there."""
        names = self.fs.protocol if isinstance(self.fs.protocol, tuple | list) else (self.fs.protocol,)
        return bool(set(names) & BUCKET_STORES)

    @cached_property
    def complete(self) -> Mapping[str, frozenset[int]]:
        """The complete checkpoints by run, at the time of the first access."""
        with self._reached():
            found: dict[str, set[int]] = {}
            for name in self.fs.glob(f"{self.root}/*/*/iter_*/{MANIFEST}"):
                paradigm, run, folder, _ = name.rsplit("/", 3)
                number = folder.removeprefix("iter_")
                if number.isdecimal():
                    found.setdefault(f"{paradigm.rsplit('/', 1)[-1]}/{run}", set()).add(int(number))
        return {key: frozenset(steps) for key, steps in found.items()}

    def has(self, key: str, step: int) -> bool:
        """Return whether a checkpoint is complete there."""
        return step in self.complete.get(key, ())

    def manifest(self, key: str, step: int) -> dict[str, FileSum] | None:
        """Return the files of a complete checkpoint by name; None if it is not complete there."""
        folder = self.place(key, step)
        with self._reached():
            try:
                content = self.fs.cat_file(f"{folder}/{MANIFEST}")
            except FileNotFoundError:
                return None
        try:
            return parse_manifest(content, folder.rsplit("/", 1)[-1])
        except ManifestError as error:
            raise UserError(
                f"archive {self.url}: {folder}: {error}; remove that folder, and archive it again"
            ) from None

    def put(self, key: str, root: Path, step: int, note: Note = _silent) -> bool:
        """Copy a complete checkpoint under `root`, its manifest last; return False if it is archived already.

        Files of an interrupted copy are kept if they match the manifest.

        Raises:
            UserError: the checkpoint is damaged or missing, or the archive has a different one of this step.
        """
        source, target = checkpoint_folder(root, step), self.place(key, step)
        try:
            sums = read_manifest(source)
        except ManifestError as error:
            raise UserError(f"{source}: {error}; a checkpoint without a manifest is not archived") from None
        if (there := self.manifest(key, step)) is not None:
            if there == sums:
                return False
            raise UserError(
                f"archive {self.url}: {target} and {source} are different checkpoints of this step. Give the plan "
                "another `archive`, or move that folder away in the store, then call again"
            )
        for name, expected in sums.items():
            if self._holds(f"{target}/{name}", expected):
                continue
            if found := wrong_content(source, sums, [name]):
                raise UserError(f"{source}: {found[0]}; the checkpoint is damaged and was not archived")
            note(f"{key} step {step}: {name}")
            with self._reached():
                if not self.has_buckets:
                    self.fs.makedirs(target, exist_ok=True)
                self.fs.put_file(str(source / name), f"{target}/{name}")
                if self.fs.size(f"{target}/{name}") != expected.bytes:
                    raise OSError(f"{target}/{name} is not complete")
        with self._reached():
            self.fs.put_file(str(source / MANIFEST), f"{target}/{MANIFEST}")
        return True

    def verify(self, key: str, step: int) -> list[str]:
        """Read a checkpoint that is complete in the archive, and return its differences from its manifest."""
        sums, target = self.manifest(key, step), self.place(key, step)
        wrong = [name for name, one in (sums or {}).items() if not self._holds(f"{target}/{name}", one)]
        return [f"{target}/{name} is missing, or holds other bytes than were archived" for name in wrong]

    def _holds(self, path: str, expected: FileSum) -> bool:
        """Return whether the archive has the file with this content; it is read only if its size matches."""
        with self._reached():
            try:
                if self.fs.size(path) != expected.bytes:
                    return False
                digest = xxhash.xxh3_128()
                with self.fs.open(path, "rb", block_size=8 * CHUNK) as stream:
                    while part := stream.read(CHUNK):
                        digest.update(part)
            except FileNotFoundError:
                return False
        return digest.hexdigest() == expected.xxh3_128

    def fetch(self, key: str, root: Path, step: int, note: Note = _silent) -> Path:
        """Copy a checkpoint to its place under `root`, where it appears when it is complete; return its folder.

        `note` receives a message with the size. Files of an interrupted call are kept if they match the manifest.

        Raises:
            UserError: the archive does not have it, or its bytes differ from its manifest, or another process
                fetches it now.
        """
        target = checkpoint_folder(root, step)
        if checkpoint_complete(root, step):
            return target
        sums, source = self.manifest(key, step), self.place(key, step)
        if sums is None:
            raise UserError(f"archive {self.url}: has no complete checkpoint of {key} at step {step}")
        folder = target.with_name(target.name + FETCHING)
        try:
            lock = FolderLock.acquire(folder)
        except LockHeldError as owner:
            raise UserError(
                f"{folder}: {owner} fetches this checkpoint; call again when it is done"
            ) from None
        try:
            if checkpoint_complete(root, step):  # the other process has fetched it
                shutil.rmtree(folder, ignore_errors=True)
                return target
            self._copy_back(
                source,
                folder,
                sums,
                lambda size: note(
                    f"{key}: fetching the checkpoint of step {step:,} from {self.url} ({size}) …"
                ),
            )
            (folder / LOCK_NAME).unlink()
            folder.rename(target)
        finally:
            lock.close()
        sync_folder(root)
        if (tracked_step(root) or 0) < step:
            write_tracker(root, step)
        return target

    def _copy_back(self, source: str, folder: Path, sums: Mapping[str, FileSum], note: Note) -> None:
        """Copy the files that `folder` lacks, compare all, and write them to the disk; `note` receives their size."""
        left = [name for name in sums if wrong_content(folder, sums, [name])]
        note(byte_size(sum(sums[name].bytes for name in left)))
        for name in (*left, MANIFEST):
            with self._reached():
                self.fs.get_file(f"{source}/{name}", str(folder / name))
        if found := wrong_content(folder, sums, sums):
            shutil.rmtree(folder, ignore_errors=True)
            raise UserError(f"archive {self.url}: {source}: {found[0]}; restore it in the store from a copy")
        for path in folder.iterdir():
            _sync(path)


def fetch_missing(plan: Plan, wanted: Iterable[tuple[Run, int]]) -> None:
    """Fetch the checkpoints (run, step) that are not on the disk from the plan's archive; print a line for each.

    A plan without an archive, and a checkpoint that the archive does not have, are left to the caller.

    Raises:
        UserError: the archive does not answer, or its copy is damaged; a repeated call resumes it.
    """
    runs = [(plan.carried_out(run), step) for run, step in wanted]
    places = [(run.key, RunFolder(plan.folder(run)).checkpoints, step) for run, step in runs]
    missing = [place for place in places if not checkpoint_complete(place[1], place[2])]
    archive = Archive.of(plan) if missing else None
    for key, root, step in missing if archive else ():
        if archive and archive.has(key, step):
            archive.fetch(key, root, step, say)


def _sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())
