"""A run that is killed at any moment, in any way, leaves no file that can be read as a dataset."""

from __future__ import annotations

import os
import random
import resource
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import pytest

from megatron_lrpath.data.indexed import check_pair
from tests.support.preprocess_fixtures import (
    NULL,
    SP,
    command,
    environment,
    left_behind,
    pair,
    preprocess,
    write_lines,
)
from tests.support.waiting import until

ENDINGS = (".idx", ".bin")


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a file with some megabytes of text, so that a run takes a moment."""
    rng = random.Random(1)
    words = ["".join(rng.choices("abcdefghij学习率", k=rng.randrange(2, 9))) for _ in range(3000)]
    texts = (" ".join(rng.choices(words, k=rng.randrange(5, 400))) for _ in range(6000))
    return write_lines(tmp_path_factory.mktemp("large") / "in.jsonl", texts)


def start(source: Path | str, prefix: Path, *more: str, **options: Any) -> subprocess.Popen[bytes]:
    """Start the tool as a command."""
    line = command(
        "preprocess_data", "--input", source, *SP, "--output-prefix", prefix, "--workers", 2, *more
    )
    return subprocess.Popen(line, env=environment(), stderr=subprocess.PIPE, **options)


def children(process: int) -> list[int]:
    """Return the process ids of a process's children."""
    try:
        return [int(pid) for pid in Path(f"/proc/{process}/task/{process}/children").read_text().split()]
    except OSError:
        return []


def gone(process: int) -> bool:
    """Return whether a process has ended (a zombie has)."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z"
    except OSError:
        return True


def nothing_passes_for_a_dataset(folder: Path, whole: dict[str, tuple[bytes, bytes]]) -> None:
    """Check that a dataset with both files under a final name is complete and equals one of `whole`."""
    for index in folder.glob("*.idx"):
        prefix = str(index.with_suffix(""))
        if os.path.exists(f"{prefix}.bin"):
            check_pair(prefix)
            assert pair(prefix) in whole.values()


@pytest.mark.slow
def test_killed_at_random_moments_then_called_again(large: Path, tmp_path: Path) -> None:
    started = time.monotonic()
    assert start(large, tmp_path / "whole").wait() == 0
    duration = time.monotonic() - started
    whole = {"new": pair(tmp_path / "whole_text_document")}
    folder = tmp_path / "killed"
    rng = random.Random()
    for _ in range(8):
        process = start(large, folder / "out")
        time.sleep(rng.uniform(0.05, duration * 1.05))
        workers = children(process.pid)
        process.kill()
        process.wait()
        if folder.exists():
            nothing_passes_for_a_dataset(folder, whole)
        until(lambda workers=workers: all(map(gone, workers)), 5, lambda: "workers outlive a killed run")
        for ending in ENDINGS:
            (folder / f"out_text_document{ending}").unlink(missing_ok=True)
    assert start(large, folder / "out").wait() == 0
    assert pair(folder / "out_text_document") == whole["new"]
    assert left_behind(folder) == []


def killed_at_step(step: int, work: Any) -> bool:
    """Run `work` in a child that is killed before its n-th file-system change; return whether it was."""
    child = os.fork()
    if child:
        return os.WIFSIGNALED(os.waitpid(child, 0)[1])
    left = step

    def dying(function: Any) -> Any:
        def call(*arguments: Any, **options: Any) -> Any:
            nonlocal left
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            left -= 1
            return function(*arguments, **options)

        return call

    for name in ("replace", "unlink", "fsync", "rename"):
        setattr(os, name, dying(getattr(os, name)))
    os._exit(work())


@pytest.mark.parametrize("overwrite", [False, True])
def test_killed_at_every_step_of_publishing(overwrite: bool, tmp_path: Path) -> None:
    old = write_lines(tmp_path / "old.jsonl", ["1 2 3"])
    new = tmp_path / "new.jsonl"
    new.write_text('{"a": "4 5", "b": "6"}\n{"a": "7", "b": "8 9"}\n')
    keys = ["--json-keys", "a", "b"]
    assert preprocess(new, tmp_path / "whole", *NULL, *keys) == 0
    whole = {key: pair(tmp_path / f"whole_{key}_document") for key in "ab"}
    step, died = 0, True
    while died:
        folder = tmp_path / f"step{step}"
        if overwrite:
            for key in "ab":
                assert preprocess(old, folder / "out", *NULL) == 0
                for ending in ENDINGS:
                    os.replace(folder / f"out_text_document{ending}", folder / f"out_{key}_document{ending}")
            whole["old"] = pair(folder / "out_a_document")
        more = [*keys, "--overwrite"] if overwrite else keys
        died = killed_at_step(step, lambda: preprocess(new, folder / "out", *NULL, *more))  # noqa: B023
        nothing_passes_for_a_dataset(folder, whole)
        if preprocess(new, folder / "out", *NULL, *more) == 2:  # it was complete already
            assert not overwrite
            assert not died or step > 8
        for key in "ab":
            assert pair(folder / f"out_{key}_document") == whole[key]
        assert left_behind(folder) == []
        assert [path.name for path in folder.iterdir() if path.name.startswith(".")] == []
        step += 1
    assert step > 8


@pytest.mark.slow
def test_a_worker_that_dies_ends_the_run(large: Path, tmp_path: Path) -> None:
    process = start(large, tmp_path / "out")
    until(lambda: children(process.pid), pause=0.005)
    os.kill(children(process.pid)[0], signal.SIGKILL)
    _, answer = process.communicate(timeout=240)
    assert process.returncode == 2
    assert b"a worker process died" in answer
    assert b"Traceback" not in answer
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.slow
def test_a_full_disk_ends_the_run(large: Path, tmp_path: Path) -> None:
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, 300_000))  # noqa: E731
    process = start(large, tmp_path / "out", preexec_fn=limit)
    _, answer = process.communicate(timeout=240)
    assert process.returncode == 2
    assert b"error: " in answer
    assert b"Traceback" not in answer
    assert list(tmp_path.glob("out*")) == []


@pytest.mark.slow
def test_interrupted_by_the_user(large: Path, tmp_path: Path) -> None:
    process = start("-", tmp_path / "out", start_new_session=True, stdin=subprocess.PIPE)
    process.stdin.write(large.read_bytes())
    process.stdin.flush()  # without closing it: the interrupt cannot come too late
    until(lambda: list(tmp_path.glob("out*.partial")), pause=0.005)
    os.killpg(process.pid, signal.SIGINT)  # to all processes, as a terminal does
    _, answer = process.communicate(timeout=240)
    assert process.returncode == 130, answer
    assert b"Traceback" not in answer
    assert list(tmp_path.glob("out*")) == []


def test_two_runs_of_one_output_do_not_mix(large: Path, tmp_path: Path) -> None:
    first = start(large, tmp_path / "out")
    until(lambda: list(tmp_path.glob("out*.bin.partial")), pause=0.002)
    small = write_lines(tmp_path / "small.jsonl", ["a"])
    second = start(small, tmp_path / "out")
    _, answer = second.communicate(timeout=240)
    assert first.wait(timeout=240) == 0
    assert second.returncode == 2
    assert b"another process is writing" in answer or b"exists already" in answer, answer
    assert check_pair(str(tmp_path / "out_text_document")).header.documents == 6000


def test_an_existing_output_is_kept_without_overwrite(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one, two = write_lines(tmp_path / "one", ["1"]), write_lines(tmp_path / "two", ["2"])
    assert preprocess(one, tmp_path / "out", *NULL) == 0
    before = pair(tmp_path / "out_text_document")
    assert preprocess(two, tmp_path / "out", *NULL) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert pair(tmp_path / "out_text_document") == before
    assert preprocess(two, tmp_path / "out", *NULL, "--overwrite") == 0
    assert pair(tmp_path / "out_text_document") != before
    (tmp_path / "other_text_document.bin").write_bytes(b"somebody's")
    assert preprocess(two, tmp_path / "other", *NULL) == 2
    assert (tmp_path / "other_text_document.bin").read_bytes() == b"somebody's"


def test_a_failed_overwrite_keeps_the_old_output(tmp_path: Path) -> None:
    good, bad = write_lines(tmp_path / "good", ["1"]), write_lines(tmp_path / "bad", ["x"])
    assert preprocess(good, tmp_path / "out", *NULL) == 0
    before = pair(tmp_path / "out_text_document")
    assert preprocess(bad, tmp_path / "out", *NULL, "--overwrite") == 2
    assert pair(tmp_path / "out_text_document") == before
