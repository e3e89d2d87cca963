"""The index cache: files are complete or absent, built once where possible, and contain only data."""

from __future__ import annotations

import multiprocessing
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lrpath.data.index_cache import CacheEntry, IndexCache, private_folder
from megatron_lrpath.errors import UserError
from tests.support.flips import flip


def numbers(count: int, built: list[int] | None = None) -> CacheEntry:
    """Return an entry of two arrays; every build is recorded in `built`."""

    def build() -> dict[str, np.ndarray]:
        if built is not None:
            built.append(count)
        return {"up": np.arange(count), "down": np.arange(count)[::-1].copy()}

    return CacheEntry(["numbers", count], ("up", "down"), build)


@pytest.fixture(autouse=True)
def own_temporary_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the private folder of these tests away from the real one."""
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))


def test_an_entry_is_built_once(tmp_path: Path) -> None:
    built: list[int] = []
    for _ in range(2):
        arrays = IndexCache(tmp_path / "cache").prepare([numbers(5, built), numbers(6, built)])
        assert [one["down"].tolist() for one in arrays] == [[4, 3, 2, 1, 0], [5, 4, 3, 2, 1, 0]]
    assert built == [5, 6]


def test_arrays_are_mapped_not_read_and_cannot_be_changed(tmp_path: Path) -> None:
    (arrays,) = IndexCache(tmp_path).prepare([numbers(5)])
    assert isinstance(arrays["up"], np.memmap)
    with pytest.raises(ValueError, match="read-only"):
        arrays["up"][0] = 1


@pytest.mark.parametrize("damage", ["cut", "emptied", "removed", "objects", "before checksums"])
def test_a_damaged_file_is_built_again(tmp_path: Path, damage: str) -> None:
    cache = IndexCache(tmp_path / "cache")
    cache.prepare([numbers(50)])
    path = next((tmp_path / "cache").glob("*-down.npy"))
    if damage == "cut":
        os.truncate(path, path.stat().st_size - 8)
    elif damage == "emptied":
        os.truncate(path, 0)
    elif damage == "removed":
        path.unlink()
    elif damage == "before checksums":
        np.save(path, np.arange(50))
    else:
        np.save(path, np.array([Trap()], dtype=object), allow_pickle=True)
    (arrays,) = cache.prepare([numbers(50)])
    assert arrays["down"].tolist() == list(range(49, -1, -1))
    assert not Trap.sprung


def test_every_flipped_bit_is_found_and_built_again(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    cache = IndexCache(tmp_path)
    cache.prepare([numbers(50)])
    path = next(tmp_path.glob("*-down.npy"))
    written = path.read_bytes()
    for number, byte in enumerate(range(0, len(written), 17)):
        flip(path, byte, number % 8)
        (arrays,) = cache.prepare([numbers(50)])
        assert arrays["down"].tolist() == list(range(49, -1, -1))
        assert path.read_bytes() == written
    assert "the index is damaged" in capsys.readouterr().err


def test_a_damaged_file_in_a_folder_that_cannot_be_written_is_not_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = IndexCache(tmp_path / "cache")
    cache.prepare([numbers(50)])
    flip(next((tmp_path / "cache").glob("*-down.npy")), 200, 0)
    write = CacheEntry.write

    def refuse(self: CacheEntry, folder: Path, arrays: dict[str, np.ndarray]) -> None:
        if folder == cache.folder:
            raise OSError(30, "Read-only file system")
        write(self, folder, arrays)

    monkeypatch.setattr(CacheEntry, "write", refuse)
    for _ in range(2):
        (arrays,) = cache.prepare([numbers(50)])
        assert arrays["down"].tolist() == list(range(49, -1, -1))


class Trap:
    """Records that it was unpickled."""

    sprung = False

    def __reduce__(self) -> tuple[Any, ...]:
        return spring, ()


def spring() -> int:
    """Record the call, which a pickle of the wrong kind would make."""
    Trap.sprung = True
    return 0


def test_a_folder_that_cannot_be_written_is_replaced_by_a_private_one(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    built: list[int] = []
    for _ in range(2):
        (arrays,) = IndexCache(tmp_path / "file/cache").prepare([numbers(5, built)])
        assert arrays["up"].tolist() == [0, 1, 2, 3, 4]
    assert built == [5]
    assert private_folder().stat().st_mode & 0o777 == 0o700


def test_a_private_folder_that_somebody_planted_is_not_trusted(tmp_path: Path) -> None:
    (tmp_path / "planted").mkdir()
    (tmp_path / "tmp" / f"lrpath-index-{os.getuid()}").symlink_to(tmp_path / "planted")
    with pytest.raises(UserError, match="belongs to another user"):
        IndexCache(tmp_path / "cache").prepare([numbers(5)])


def build_often(folder: str, start: Any, results: Any) -> None:
    """Build the same entries as other jobs at the same moment; report the number of wrong ones."""
    start.wait()
    wrong = 0
    for count in range(2000, 2040):
        (arrays,) = IndexCache(folder).prepare([numbers(count)])
        wrong += int(arrays["up"].tolist() != list(range(count)))
    results.put(wrong)


def test_jobs_that_start_together_do_not_disturb_each_other(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    start, results = context.Event(), context.Queue()
    jobs = [context.Process(target=build_often, args=(str(tmp_path / "c"), start, results)) for _ in range(3)]
    for job in jobs:
        job.start()
    start.set()
    assert [results.get(timeout=240) for _ in jobs] == [0, 0, 0]
    for job in jobs:
        job.join()
    assert not [path for path in (tmp_path / "c").iterdir() if path.suffix != ".npy"]


RANK = """
import json, sys
import numpy as np
import torch.distributed as dist
from megatron_lrpath.data.index_cache import CacheEntry, IndexCache
dist.init_process_group("gloo", init_method=f"file://{sys.argv[1]}", rank=int(sys.argv[2]), world_size=2)
built = []
def build():
    built.append(1)
    return {"up": np.arange(100)}
(arrays,) = IndexCache(sys.argv[3]).prepare([CacheEntry(["ranks"], ("up",), build)])
print(json.dumps([len(built), int(arrays["up"].sum())]))
dist.barrier()
"""


@pytest.mark.slow
@pytest.mark.parametrize("shared", [True, False])
def test_one_rank_builds_and_without_a_shared_disk_one_of_each_node(tmp_path: Path, shared: bool) -> None:
    ranks = []
    for rank in range(2):
        folder = tmp_path / ("cache" if shared else f"cache{rank}")
        local = str(rank) if shared else "0"
        temporary = tmp_path / f"tmp{rank}"
        temporary.mkdir()
        environment = {**os.environ, "LOCAL_RANK": local, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)}
        command = [sys.executable, "-c", RANK, str(tmp_path / "meet"), str(rank), str(folder)]
        ranks.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    outputs = [rank.communicate(timeout=240)[0].strip() for rank in ranks]
    assert outputs == ["[1, 4950]", "[0, 4950]" if shared else "[1, 4950]"]
