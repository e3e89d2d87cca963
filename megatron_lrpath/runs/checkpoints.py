"""The checkpoints of a run on disk: their steps, their completeness, and their content; without torch.

A checkpoint is written in `iter_0000010.saving`, gets `manifest.json` last, and is renamed to `iter_0000010`:
a folder with that name and a manifest was complete when it was written. A damaged checkpoint is renamed to
`iter_0000010.damaged`; a checkpoint that retention removes is renamed to `iter_0000010.removing` first.

The checksums are XXH3 (128 bits): of each file, and of each item (a stored piece of a tensor, or an object)
in it, so that a reader of some items verifies only those. They detect every accident at a fraction of the
time to read the file. They do not protect against a user who changes a checkpoint together with its manifest.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

import xxhash

from megatron_lrpath.errors import UserError, cause
from megatron_lrpath.files import atomic_write_text, sweep_unfinished, sync_folder
from megatron_lrpath.reading import parse_json, read_json
from megatron_lrpath.runs.folder import read_json_object
from megatron_lrpath.sealed import unsealed, write_sealed

MANIFEST = "manifest.json"
METADATA = ".metadata"  # torch's file in a checkpoint: the places of its tensors and objects
RELEASE = "release"  # Megatron's folder of imported weights; its manifest has step 0
FORMAT = 1
CHUNK = 4 * 2**20  # bytes read at a time
BLOCK = 64 * 1024  # bytes of a fingerprint's block
MAXIMUM_ITEMS = 400_000  # of a manifest: about 30 MB of it; larger checkpoints have only sums of files
_SUM = re.compile("[0-9a-f]{32}")
_ITEM = re.compile(r"(0|[1-9]\d{0,18})\+(0|[1-9]\d{0,18})")
_RANK_FILE = re.compile(r"__(\d{1,9})_\d+\.distcp")


class ManifestError(ValueError):
    """A manifest that cannot be used; the text gives the reason."""


@dataclass(frozen=True)
class FileSum:
    """A file's size in bytes and the XXH3-128 of its content in hexadecimal.

    Attributes:
        items: the same sum of each item in the file, by `item_key`; empty if their places are unknown. Two
            sums of a file are equal whether or not the items are known.
    """

    bytes: int
    xxh3_128: str
    items: Mapping[str, str] = field(default_factory=dict, compare=False)


def item_key(offset: int, length: int) -> str:
    """Return the name in a manifest of the item at `offset`, of `length` bytes."""
    return f"{offset}+{length}"


def sum_file(path: Path, items: Iterable[tuple[int, int]] = ()) -> FileSum:
    """Read a file once and sum it, and each of its items.

    Args:
        path: the file.
        items: (offset, length) in bytes; they do not overlap. An item outside the file gets no sum.
    """
    whole, sums, size = xxhash.xxh3_128(), _ItemSums(items), 0
    buffer = memoryview(bytearray(CHUNK))
    with path.open("rb", buffering=0) as stream:
        while count := stream.readinto(buffer):
            whole.update(buffer[:count])
            sums.update(buffer[:count], size)
            size += count
    return FileSum(size, whole.hexdigest(), sums.found)


class _ItemSums:
    """Sums the items of a file whose content arrives chunk by chunk."""

    def __init__(self, items: Iterable[tuple[int, int]]) -> None:
        self.found: dict[str, str] = {}
        self._left = sorted(items, reverse=True)
        self._digest = xxhash.xxh3_128()

    def update(self, chunk: memoryview, position: int) -> None:
        """Process the bytes of the file from `position` on."""
        end = position + len(chunk)
        while self._left and self._left[-1][0] < end:
            offset, length = self._left[-1]
            self._digest.update(chunk[max(offset - position, 0) : offset + length - position])
            if offset + length > end:
                return
            self.found[item_key(offset, length)] = self._digest.hexdigest()
            self._digest = xxhash.xxh3_128()
            self._left.pop()


def sum_files(
    folder: Path, items: Mapping[str, Iterable[tuple[int, int]]] | None = None
) -> dict[str, FileSum]:
    """Read and sum every file of a folder, by name; `items` by file as in `sum_file`."""
    return {path.name: sum_file(path, (items or {}).get(path.name, ())) for path in sorted(folder.iterdir())}


def sum_entry(file: FileSum) -> dict[str, Any]:
    """Return a file's entry in a manifest, which `file_sum` reads."""
    entry: dict[str, Any] = {"bytes": file.bytes, "xxh3_128": file.xxh3_128}
    return entry | {"items": dict(file.items)} if file.items else entry


def write_manifest(folder: Path, step: int, sums: Mapping[str, FileSum]) -> None:
    """Write the manifest of the checkpoint of `step` in `folder`; `sums` by file name."""
    files = {name: sum_entry(sums[name]) for name in sorted(sums)}
    if sum(len(file.items) for file in sums.values()) > MAXIMUM_ITEMS:
        for entry in files.values():
            entry.pop("items", None)
    write_sealed(folder / MANIFEST, {"format": FORMAT, "step": step, "files": files})


def read_manifest(folder: Path) -> dict[str, FileSum]:
    """Return the files of a checkpoint by name.

    Raises:
        ManifestError: the manifest is missing or damaged.
    """
    try:
        return _check_manifest(read_json(folder / MANIFEST), folder.name)
    except OSError as error:
        raise ManifestError(f"{MANIFEST} cannot be read ({cause(error)})") from None
    except ValueError as error:
        raise ManifestError(f"{MANIFEST} is damaged ({error})") from None


def parse_manifest(content: bytes, folder_name: str) -> dict[str, FileSum]:
    """Return the files of a checkpoint by name, from the content of its manifest and the name of its folder.

    Raises:
        ManifestError: the manifest is damaged.
    """
    try:
        return _check_manifest(parse_json(content), folder_name)
    except ValueError as error:
        raise ManifestError(f"{MANIFEST} is damaged ({error})") from None


def _check_manifest(value: object, folder_name: str) -> dict[str, FileSum]:
    """Return the files in a manifest's content for this folder. Raise ValueError if it is invalid."""
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise ValueError(f"not a manifest of format {FORMAT}")
    content, _ = unsealed(value)  # older manifests have no checksum of their own
    if unknown := content.keys() - {
        "format",
        "step",
        "files",
    }:  # otherwise one changed bit could hide the checksum
        raise ValueError(f"unknown fields {sorted(unknown)}")
    step, files = content.get("step"), content.get("files")
    own = isinstance(step, int) and folder_name.startswith(f"iter_{step:07d}")
    if not own and not (step == 0 and folder_name == RELEASE):
        raise ValueError(f"it belongs to step {step!r}")
    if not isinstance(files, dict) or not files:
        raise ValueError("it lists no files")
    return {name: file_sum(name, entry) for name, entry in files.items()}


def file_sum(name: str, entry: object) -> FileSum:
    """Return the sum of the file `name` from its entry in a manifest. Raise ValueError if it is invalid."""
    if name != Path(name).name or name in ("", ".", "..") or "\0" in name:
        raise ValueError(f"{name!r} is no file name")
    fields = entry if isinstance(entry, dict) else {}
    size, checksum, items = fields.get("bytes"), fields.get("xxh3_128"), fields.get("items", {})
    if not isinstance(size, int) or isinstance(size, bool) or size < 0:
        raise ValueError(f"{name}: {size!r} is no size")
    if not isinstance(checksum, str) or not _SUM.fullmatch(checksum):
        raise ValueError(f"{name}: {checksum!r} is no checksum")
    if not isinstance(items, dict):
        raise ValueError(f"{name}: its items are no JSON object")
    for key, one in items.items():
        if not _ITEM.fullmatch(key) or not isinstance(one, str) or not _SUM.fullmatch(one):
            raise ValueError(f"{name}: {key!r}: {one!r} is no item's checksum")
    return FileSum(size, checksum, items)


def wrong_sizes(folder: Path, sums: Mapping[str, FileSum]) -> list[str]:
    """Return a text for each file that is missing or whose size differs."""
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
    """Return a text for each of `names` whose content differs from the sums."""
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


def wrong_items(path: Path, expected: FileSum, items: Mapping[tuple[int, int], str]) -> list[str]:
    """Return a text for each item of a file that differs from its sum; read only the items.

    Args:
        path: the file.
        expected: the file's sums in the manifest, with items.
        items: the name of each tensor or object, by (offset, length) in bytes.
    """
    found = []
    try:
        with path.open("rb", buffering=0) as stream:
            for (offset, length), name in sorted(items.items()):
                checksum = expected.items.get(item_key(offset, length))
                if checksum is None:
                    found.append(f"{MANIFEST} does not have {name} in {path.name}")
                elif _sum_part(stream, offset, length) != checksum:
                    found.append(f"{name} in {path.name} holds other bytes than were written")
    except OSError as error:
        found.append(f"{path.name} cannot be read ({cause(error)})")
    return found


def _sum_part(stream: IO[bytes], offset: int, length: int) -> str:
    """Return the sum of a part of a file; of fewer bytes if the file ends earlier."""
    digest = xxhash.xxh3_128()
    stream.seek(offset)
    while length and (content := stream.read(min(length, CHUNK))):
        digest.update(content)
        length -= len(content)
    return digest.hexdigest()


def share_of(rank: int, world: int, names: Collection[str]) -> list[str]:
    """Return the files that `rank` of `world` sums: its own, then in its node's memory for loading."""
    owners = {name: int(match[1]) if (match := _RANK_FILE.fullmatch(name)) else 0 for name in names}
    return sorted(name for name, owner in owners.items() if owner % world == rank)


TRACKER = "latest_checkpointed_iteration.txt"
SAVING, REMOVING, DAMAGED = ".saving", ".removing", ".damaged"
_STEP_FOLDER = re.compile(r"iter_(\d{7,18})")
_LEFTOVER = re.compile(rf"iter_\d{{7,18}}({re.escape(SAVING)}|{re.escape(REMOVING)})")


def checkpoint_folder(root: Path, step: int) -> Path:
    """Return Megatron's folder for the checkpoint of `step` under `root`."""
    return root / f"iter_{step:07d}"


def weights_folder(root: Path) -> Path:
    """Return the folder of the checkpoint in the tracker file of `root`, as Megatron finds it.

    Raises:
        UserError: there is no such checkpoint.
    """
    try:
        word = (root / TRACKER).read_text(encoding="ascii").strip()
        folder = root / RELEASE if word == RELEASE else checkpoint_folder(root, int(word))
    except (OSError, ValueError):
        raise UserError(
            f"{root}: not a folder of Megatron checkpoints ({TRACKER} is missing or unreadable); "
            "tools/import_hf.py writes one from a Hugging Face folder."
        ) from None
    if not (folder / METADATA).is_file():
        raise UserError(f"{folder}: the checkpoint that {root / TRACKER} names is not there.")
    return folder


def saving_folder(folder: Path) -> Path:
    """Return the folder in which the checkpoint is written before it is renamed to `folder`."""
    return folder.with_name(folder.name + SAVING)


def checkpoint_fingerprint(root: Path, step: int) -> str:
    """Return the `files_fingerprint` of a checkpoint's files, in the order of their names."""
    return files_fingerprint(sorted(checkpoint_folder(root, step).iterdir()))


def content_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint in `folder` without its manifest, in the order of their names."""
    return [path for path in sorted(folder.iterdir()) if path.name != MANIFEST]


def files_fingerprint(paths: Iterable[Path]) -> str:
    """Return a digest of files in this order: each name and size, and 16 blocks of 64 KiB spread over it.

    Small files are read completely. A checkpoint of other weights differs in every block and is detected; a
    single flipped bit may not be (the checksums detect it).
    """
    digest = hashlib.sha256()
    for path in paths:
        size = path.stat().st_size
        digest.update(f"{path.name}:{size}\n".encode())
        with path.open("rb") as stream:
            for block in fingerprint_blocks(size):
                stream.seek(block.start)
                digest.update(stream.read(BLOCK))
    return digest.hexdigest()


def fingerprint_blocks(size: int) -> list[range]:
    """Return the ranges of bytes that the fingerprint of a file of `size` bytes reads."""
    return [range(start, min(start + BLOCK, size)) for start in (size * number // 16 for number in range(16))]


def present_fingerprint(root: Path, step: int) -> str | None:
    """Return the fingerprint of a checkpoint; None if it does not exist."""
    try:
        return checkpoint_fingerprint(root, step)
    except OSError:
        return None


def checkpoint_complete(root: Path, step: int) -> bool:
    """Return whether the checkpoint of `step` under `root` is complete, so that a branch can start from it.

    This project's checkpoints have a manifest (its sums are checked on loading). Plain Megatron's have none:
    it writes `metadata.json` of a `torch_dist` checkpoint after all other files in the folder; for other
    formats the tracker, updated at the end, shows that the folder is complete.
    """
    folder = checkpoint_folder(root, step)
    if (folder / MANIFEST).is_file():
        return True
    if (folder / ".metadata").is_file():
        return read_json_object(folder / "metadata.json") is not None  # it is not written atomically
    tracked = tracked_step(root)
    return tracked is not None and tracked >= step and not _is_empty(folder)


def require_checkpoint(root: Path, step: int) -> None:
    """Raise UserError, with the existing steps, if `root` has no complete checkpoint of `step`."""
    if checkpoint_complete(root, step):
        return
    steps = complete_steps(root)
    have = f"it has steps {', '.join(map(str, steps))}" if steps else "it has no complete checkpoint yet"
    raise UserError(
        f"{root}: no checkpoint of step {step}; {have}. Run the parent up to step "
        f"{step} (it saves its branch points for any save interval), or restore that checkpoint."
    )


def complete_steps(root: Path) -> list[int]:
    """Return the steps under `root` whose checkpoints are complete, ascending."""
    return [step for step in steps_found(root) if checkpoint_complete(root, step)]


def steps_found(root: Path) -> list[int]:
    """Return the steps that have a folder under `root`, complete or not, ascending."""
    return sorted(int(match[1]) for name in _names(root) if (match := _STEP_FOLDER.fullmatch(name)))


def has_begun(root: Path) -> bool:
    """Return whether a run has any checkpoint under `root`, damaged or not."""
    return bool(steps_found(root) or damaged_found(root))


def latest_step(root: Path) -> int | None:
    """Return the newest complete checkpoint's step; None if there is none."""
    steps = complete_steps(root)
    return steps[-1] if steps else None


def tracked_step(root: Path) -> int | None:
    """Return the step in the tracker file; None if it is missing or unreadable."""
    try:
        with (root / TRACKER).open("rb") as stream:
            text = stream.read(64).strip()
    except OSError:
        return None
    return int(text) if re.fullmatch(rb"\d{1,18}", text) else None


def write_tracker(root: Path, step: int) -> None:
    """Write `step` into the tracker, from which Megatron's tools read the newest step, atomically."""
    if tracked_step(root) != step:
        atomic_write_text(root / TRACKER, str(step))


def damaged_found(root: Path) -> list[str]:
    """Return the names of the damaged checkpoints under `root` that were set aside."""
    return sorted(name for name in _names(root) if name.startswith("iter_") and DAMAGED in name)


def set_aside(root: Path, step: int) -> Path:
    """Rename an incomplete checkpoint, so that no reader uses it; return the new name."""
    folder = checkpoint_folder(root, step)
    for number in range(1, 1000):
        target = folder.with_name(f"{folder.name}{DAMAGED}{f'-{number}' if number > 1 else ''}")
        if not target.exists():
            break
    folder.rename(target)
    sync_folder(root)
    return target


def sweep(root: Path) -> None:
    """Remove leftovers of an interrupted save or removal. Only the holder of the run's lock may call it."""
    for name in _names(root):
        if _LEFTOVER.fullmatch(name):
            shutil.rmtree(root / name, ignore_errors=True)
        elif _STEP_FOLDER.fullmatch(name) and _is_empty(root / name):
            (root / name).rmdir()
    sweep_unfinished(root / TRACKER)


def remove(root: Path, step: int) -> None:
    """Remove a checkpoint; an interrupted removal leaves nothing that looks like a checkpoint."""
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
    """Return whether `folder` is empty or not a folder."""
    return not folder.is_dir() or not _names(folder)
