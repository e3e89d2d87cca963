"""Run Megatron-LM's own tests plain and with this project's CPU backend and seams, and compare the outcomes.

A test that passes plain must pass with the seams applied. Each test file runs twice, each time in a process of its
own, against the installed megatron-core; of the checkout only `tests/` and `tools/` are used. Take the tag of the
installed version:

    git clone --branch core_v0.19.0 https://github.com/NVIDIA/Megatron-LM
    python scripts/upstream_tests.py Megatron-LM

Exit status: 0 where no test was lost, 1 otherwise, 2 for a mistake in the call.
"""

from __future__ import annotations

import argparse
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

VARIABLE = "LRPATH_UPSTREAM_TESTS"  # plain or seams
CHOSEN = "LRPATH_UPSTREAM_CHOSEN"  # a file with the names of the tests to run
SELECTION = (
    "tests/unit_tests/test_optimizer_param_scheduler.py",
    "tests/unit_tests/test_checkpointing.py",
    "tests/unit_tests/test_num_microbatches_calculator.py",
    "tests/unit_tests/data",
    "tests/unit_tests/dist_checkpointing",
    "tests/unit_tests/training",
)
PASSED = "passed"


def pytest_collection_modifyitems(items: list[Any]) -> None:
    """Keep the tests that passed plain: others may wait forever for a GPU that the backend only pretends."""
    chosen = set(Path(os.environ[CHOSEN]).read_text(encoding="utf-8").splitlines())
    if chosen:
        items[:] = [item for item in items if test_name(item.nodeid) in chosen]


def test_name(node: str) -> str:
    """Return the name of a test in the JUnit report, from its id in pytest."""
    file, *names = node.split("::")
    return "::".join([".".join([file.removesuffix(".py").replace("/", "."), *names[:-1]]), names[-1]])


def prepare(how: str) -> None:
    """Import what the tests import; with `seams`, apply the backend and the seams."""
    if how == "seams":
        # In this order: the backend precedes every import of Megatron.
        from megatron_lrpath.training.machine import activate

        activate("cpu")
        from megatron_lrpath.training import seams
        from megatron_lrpath.training.session import Session

        seams.apply(Session("cpu"))
    import megatron.training.training  # noqa: F401 (for the forked processes)


def main() -> int:
    """Run the selection both ways and print the differences; return 1 if a test was lost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkout", type=Path, help="a checkout of Megatron-LM")
    parser.add_argument("files", nargs="*", default=SELECTION, help="test files or folders of the checkout")
    parser.add_argument("--timeout", type=float, default=600, help="seconds for one file (default: 600)")
    args = parser.parse_args()
    try:
        files = test_files(args.checkout, args.files)
    except FileNotFoundError as error:
        parser.error(f"{error} is not in {args.checkout}")
    with tempfile.TemporaryDirectory() as temporary:
        # A copy, so that the checkout's own `megatron` does not hide the installed one.
        root = Path(temporary)
        for folder in ("tests", "tools"):
            shutil.copytree(args.checkout / folder, root / folder)
        lost: list[str] = []
        counts: Counter[str] = Counter()
        passed: dict[str, set[str]] = {}
        for file, plain in outcomes(root, "plain", args.timeout, {file: set() for file in files}):
            passed[file] = {test for test, found in plain.items() if found == PASSED}
            print(f"{file}: {len(passed[file])} of {len(plain)} pass plain", flush=True)
        wanted = {file: tests for file, tests in passed.items() if tests}
        for file, seams in outcomes(root, "seams", args.timeout, wanted):
            kept = {test for test in wanted[file] if seams.get(test) == PASSED}
            lost += [f"{file}: {test}: {seams.get(test, 'not run')}" for test in wanted[file] - kept]
            counts.update(plain=len(wanted[file]), kept=len(kept), files=1)
            print(f"{file}: {len(kept)} of {len(wanted[file])} pass with seams", flush=True)
    print(
        f"{counts['files']} files: {counts['plain']} tests pass plain, {counts['kept']} of them with backend and "
        "seams"
    )
    for line in sorted(lost):
        print(f"lost: {line}")
    return 1 if lost else 0


def test_files(checkout: Path, chosen: list[str] | tuple[str, ...]) -> list[str]:
    """Return the test files among `chosen` files and folders, relative to the checkout.

    Raises:
        FileNotFoundError: one of them does not exist.
    """
    found: list[str] = []
    for name in chosen:
        place = checkout / name
        if not place.exists():
            raise FileNotFoundError(name)
        files = [place] if place.is_file() else sorted(place.rglob("test_*.py"))
        found += [str(file.relative_to(checkout)) for file in files]
    return found


def outcomes(
    root: Path, how: str, timeout: float, chosen: dict[str, set[str]]
) -> Iterator[tuple[str, dict[str, str]]]:
    """Run test files one after the other; yield each file with the outcome of each of its tests, by name.

    Torch and Megatron are imported once: a process that has imported them, with the seams where they are asked for,
    forks one for each file.

    Args:
        root: the folder with `tests/`.
        how: `plain` or `seams`.
        timeout: seconds; a file that takes longer has no outcomes.
        chosen: the tests to run of each file, by name; none: all.
    """
    environment = os.environ | {
        VARIABLE: how,
        "PYTHONPATH": os.pathsep.join([str(root), str(Path(__file__).parent)]),
        "OMP_NUM_THREADS": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }
    for number, file in enumerate(chosen):
        (root / f"{number}.chosen").write_text("\n".join(chosen[file]), encoding="utf-8")
        (root / f"{number}.{how}.xml").unlink(missing_ok=True)
    command = [sys.executable, "-c", f"import {Path(__file__).stem} as own; own.serve({timeout!r})", *chosen]
    with (root / f"{how}.log").open("wb") as log:
        server = subprocess.Popen(
            command, cwd=root, env=environment, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=log
        )
        assert server.stdout is not None
        for number, file in enumerate(chosen):
            if server.stdout.readline() == b"longer\n":
                print(f"{file}: {how}: longer than {timeout:g} s", file=sys.stderr)
            yield file, results(root / f"{number}.{how}.xml")
        server.wait()


def serve(timeout: float) -> None:
    """Import Megatron, run each file of the command line in a fork of this process, and print a line at each end."""
    how = os.environ[VARIABLE]
    prepare(how)
    for number, file in enumerate(sys.argv[1:]):
        child = os.fork()
        if child == 0:
            os.setpgid(0, 0)
            os.dup2(2, 1)
            os.environ[CHOSEN] = f"{number}.chosen"
            own = [f"--rootdir={os.getcwd()}", "-c", os.devnull, f"--junit-xml={number}.{how}.xml"]
            plugins = ["-p", "no:cacheprovider", "-p", Path(__file__).stem]
            pytest.main([file, "-q", "--no-header", *plugins, *own])
            sys.stderr.flush()
            os._exit(0)
        print(end_of(child, timeout), flush=True)


def end_of(child: int, timeout: float) -> str:
    """Wait for a forked process, and kill its group after `timeout` seconds; return `ended` or `longer`."""
    with suppress(OSError):
        os.setpgid(child, child)
    descriptor = os.pidfd_open(child)
    ended = bool(select.select([descriptor], [], [], timeout)[0])
    os.close(descriptor)
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return "ended" if ended else "longer"


def results(report: Path) -> dict[str, str]:
    """Return the outcomes in a JUnit report, by test; none if the file did not finish."""
    if not report.exists():
        return {}
    cases = ElementTree.parse(report).iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in cases}


def outcome(case: ElementTree.Element) -> str:
    """Return `passed`, `skipped`, or the first line of the failure."""
    for child in case:
        if child.tag == "skipped":
            return "skipped"
        if child.tag in ("failure", "error"):
            return f"{child.tag}: {(child.get('message') or 'no message').splitlines()[0][:200]}"
    return PASSED


if __name__ == "__main__":
    sys.exit(main())
