"""The checkpoints of a run on disk: which are there, which are complete, and what each consists of; without torch.

A checkpoint is written in `iter_0000010.saving`, gets `manifest.json` last, and is renamed to `iter_0000010`:
what has that name and a manifest was complete when it was written. A damaged checkpoint is renamed to
`iter_0000010.damaged`; one that retention removes is renamed to `iter_0000010.removing` first.

The checksum of a file is XXH3 (128 bits): it finds every accident and costs a fraction of reading the file. It
does not protect against somebody who changes a checkpoint on purpose, and its manifest with it.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import xxhash

from megatron_lrpath.errors import cause
from megatron_lrpath.files import atomic_write_json, atomic_write_text, sweep_unfinished, sync_folder
from megatron_lrpath.reading import parse_json, read_json
from megatron_lrpath.runs.folder import read_json_object

MANIFEST = "manifest.json"
RELEASE = "release"  # Megatron's name of the folder of weights that no run trained; its manifest says step 0
FORMAT = 1
CHUNK = 4 * 2**20  # bytes read at a time
BLOCK = 64 * 1024  # bytes of a fingerprint's block
_RANK_FILE = re.compile(r"__(\d{1,9})_\d+\.distcp")


class ManifestError(ValueError):
    """A manifest that cannot be used; the text says why."""


@dataclass(frozen=True)
class FileSum:
    """A file's size in bytes and the XXH3-128 of its content in hexadecimal."""

    bytes: int
    xxh3_128: str


def sum_file(path: Path) -> FileSum:
    """Read a file and sum it."""
    digest = xxhash.xxh3_128()
    buffer = memoryview(bytearray(CHUNK))
    size = 0
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            digest.update(buffer[:count])
            size += count
    return FileSum(size, digest.hexdigest())


def sum_files(folder: Path) -> dict[str, FileSum]:
    """Read and sum every file of a folder, by name."""
    return {path.name: sum_file(path) for path in sorted(folder.iterdir())}


def write_manifest(folder: Path, step: int, sums: Mapping[str, FileSum]) -> None:
    """Write the manifest of the checkpoint of `step` in `folder`; `sums` by file name."""
    files = {name: asdict(sums[name]) for name in sorted(sums)}
    atomic_write_json(folder / MANIFEST, {"format": FORMAT, "step": step, "files": files})


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """The files of a checkpoint by name.

    Raises:
        ManifestError: there is none, or it cannot be used.
    """
    try:
        return _check_manifest(read_json(folder / MANIFEST), folder.name)
    except OSError as error:
        raise ManifestError(f"{MANIFEST} cannot be read ({cause(error)})") from None
    except ValueError as error:
        raise ManifestError(f"{MANIFEST} is damaged ({error})") from None


def parse_manifest(content: bytes, folder_name: str) -> dict[str, FileSum]:
    """The files of a checkpoint by name, from the content of its manifest; `folder_name` is that of its folder.

    Raises:
        ManifestError: it cannot be used.
    """
    try:
        return _check_manifest(parse_json(content), folder_name)
    except ValueError as error:
        raise ManifestError(f"{MANIFEST} is damaged ({error})") from None


def _check_manifest(value: object, folder_name: str) -> dict[str, FileSum]:
    """Check a manifest's content for the folder it was found in; raises ValueError."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"not a manifest of format {FORMAT}")
    step, files = value.get("step"), value.get("files")
    own = isinstance(step, int) and folder_name.startswith(f"iter_{step:07d}")
    if not own and not (step == 0 and folder_name == RELEASE):
        raise ValueError(f"it belongs to step {step!r}")
    if not isinstance(files, dict) or not files:
        raise ValueError("it lists no files")
    return {name: _file_sum(name, entry) for name, entry in files.items()}


def _file_sum(name: str, entry: object) -> FileSum:
    if name != Path(name).name or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"{name!r} is no file name")
    size = entry.get("bytes") if isinstance(entry, dict) else None
    checksum = entry.get("xxh3_128") if isinstance(entry, dict) else None
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"{name}: {size!r} is no size")
    if not isinstance(checksum, str) or not re.fullmatch("[0-9a-f]{32}", checksum):
        raise ValueError(f"{name}: {checksum!r} is no checksum")
    return FileSum(size, checksum)


def wrong_sizes(folder: Path, sums: Mapping[str, FileSum]) -> list[str]:
    """What is missing or of another size, in words."""
    found = []
    for name, expected in sums.items():
        try:
            size = (folder / name).stat().st_size
        except OSError as error:
            found.append(f"{name} cannot be read ({cause(error)})")
            continue
        if size != expected.bytes:
            found.append(f"{name} has {size} bytes instead of {expected.bytes}")
    return found


def wrong_content(folder: Path, sums: Mapping[str, FileSum], names: Iterable[str]) -> list[str]:
    """Which of `names` do not hold what was written, in words."""
    found = []
    for name in names:
        try:
            actual = sum_file(folder / name)
        except OSError as error:
            found.append(f"{name} cannot be read ({cause(error)})")
            continue
        if actual != sums[name]:
            found.append(f"{name} holds other bytes than were written")
    return found


def share_of(rank: int, world: int, names: Collection[str]) -> list[str]:
    """The files that `rank` of `world` sums: its own, as its node then has them in memory for loading."""
    owners = {name: int(match[1]) if (match := _RANK_FILE.fullmatch(name)) else 0 for name in names}
    return sorted(name for name, owner in owners.items() if owner % world == rank)


TRACKER = "latest_checkpointed_iteration.txt"
SAVE_INTERVAL = 500  # steps, for a plan that says nothing else; of these checkpoints the newest two are kept
SAVING, REMOVING, DAMAGED = ".saving", ".removing", ".damaged"
_STEP_FOLDER = re.compile(r"iter_(\d{7,18})")
_LEFTOVER = re.compile(rf"iter_\d{{7,18}}({re.escape(SAVING)}|{re.escape(REMOVING)})")


def checkpoint_folder(root: Path, step: int) -> Path:
    """Megatron's folder for the checkpoint of `step` under `root`."""
    return root / f"iter_{step:07d}"


def saving_folder(folder: Path) -> Path:
    """Where the checkpoint that is to stand in `folder` is written."""
    return folder.with_name(folder.name + SAVING)


def checkpoint_fingerprint(root: Path, step: int) -> str:
    """The `files_fingerprint` of a checkpoint's files, by name."""
    return files_fingerprint(sorted(checkpoint_folder(root, step).iterdir()))


def files_fingerprint(paths: Iterable[Path]) -> str:
    """A digest of files in this order: each one's name and size, and sixteen blocks of 64 KiB spread over it.

    Small files are read whole. A checkpoint of other weights differs in every block, so it does not pass; a
    single flipped bit may (that is what checksums are for).
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as stream:
            for number in range(16):
                stream.seek(size * number // 16)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def present_fingerprint(root: Path, step: int) -> str | None:
    """The fingerprint of a checkpoint, None where it is not there (any more)."""
    try:
        return checkpoint_fingerprint(root, step)
    except OSError:
        return None


def checkpoint_complete(root: Path, step: int) -> bool:
    """Whether the checkpoint of `step` under `root` is whole, so that a branch may start from it.

    Ours have a manifest (what it says is checked on loading). One that plain Megatron wrote has none: of a
    `torch_dist` checkpoint it writes `metadata.json` after everything else in the folder; for other formats
    the tracker, moved on at the end, shows that the folder was finished.
    """
    folder = checkpoint_folder(root, step)
    if (folder / MANIFEST).is_file():
        return True
    if (folder / ".metadata").is_file():
        return read_json_object(folder / "metadata.json") is not None  # it is not written atomically
    tracked = tracked_step(root)
    return tracked is not None and tracked >= step and not _is_empty(folder)


def complete_steps(root: Path) -> list[int]:
    """The steps under `root` whose checkpoints are complete, ascending."""
    return [step for step in steps_found(root) if checkpoint_complete(root, step)]


def steps_found(root: Path) -> list[int]:
    """The steps that have a folder under `root`, complete or not, ascending."""
    return sorted(int(match[1]) for name in _names(root) if (match := _STEP_FOLDER.fullmatch(name)))


def has_begun(root: Path) -> bool:
    """Whether a run has left any checkpoint under `root`, damaged or not."""
    return bool(steps_found(root) or damaged_found(root))


def latest_step(root: Path) -> int | None:
    """The newest complete checkpoint's step, None where there is none."""
    steps = complete_steps(root)
    return steps[-1] if steps else None


def tracked_step(root: Path) -> int | None:
    """The step in the tracker file, None where there is none or it cannot be read."""
    try:
        with (root / TRACKER).open("rb") as stream:
            text = stream.read(64).strip()
    except OSError:
        return None
    return int(text) if re.fullmatch(rb"\d{1,18}", text) else None


def write_tracker(root: Path, step: int) -> None:
    """Let the tracker, from which Megatron's tools learn the newest step, say `step`; atomically."""
    if tracked_step(root) != step:
        atomic_write_text(root / TRACKER, str(step))


def damaged_found(root: Path) -> list[str]:
    """The names of the checkpoints under `root` that were set aside."""
    return sorted(name for name in _names(root) if name.startswith("iter_") and DAMAGED in name)


def set_aside(root: Path, step: int) -> Path:
    """Rename a checkpoint that is not whole, so that nobody takes it for one; its new name."""
    folder = checkpoint_folder(root, step)
    for number in range(1, 1000):
        target = folder.with_name(f"{folder.name}{DAMAGED}{f'-{number}' if number > 1 else ''}")
        if not target.exists():
            break
    folder.rename(target)
    sync_folder(root)
    return target


def sweep(root: Path) -> None:
    """Remove what a killed process left of a save or a removal. Only for who holds the run's lock."""
    for name in _names(root):
        if _LEFTOVER.fullmatch(name):
            shutil.rmtree(root / name, ignore_errors=True)
        elif _STEP_FOLDER.fullmatch(name) and _is_empty(root / name):
            (root / name).rmdir()
    sweep_unfinished(root / TRACKER)


def remove(root: Path, step: int) -> None:
    """Remove a checkpoint; killed half-way it leaves nothing that looks like one."""
    folder = checkpoint_folder(root, step)
    going = folder.with_name(folder.name + REMOVING)
    folder.rename(going)
    shutil.rmtree(going, ignore_errors=True)


def _names(root: Path) -> list[str]:
    try:
        return os.listdir(root)
    except OSError:
        return []


def _is_empty(folder: Path) -> bool:
    """Whether `folder` holds nothing, or is no folder."""
    return not folder.is_dir() or not _names(folder)
