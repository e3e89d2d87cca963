"""Run Megatron-LM's own tests plain and with this project's CPU backend and seams, and compare the outcomes.

A test that passes plain must pass with the seams applied. Each test file runs twice, in processes of its own,
against the installed megatron-core; of the checkout only `tests/` is used. Take the tag of the installed version:

    git clone --branch core_v0.19.0 https://github.com/NVIDIA/Megatron-LM
    python scripts/upstream_tests.py Megatron-LM

Exit status: 0 where no test was lost, 1 otherwise, 2 for a mistake in the call.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

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
    if os.environ.get(CHOSEN):
        chosen = set(Path(os.environ[CHOSEN]).read_text(encoding="utf-8").splitlines())
        items[:] = [item for item in items if test_name(item.nodeid) in chosen]


def test_name(node: str) -> str:
    """The name of a test in the JUnit report, from its id in pytest."""
    file, *names = node.split("::")
    return "::".join([".".join([file.removesuffix(".py").replace("/", "."), *names[:-1]]), names[-1]])


def pytest_configure() -> None:
    """Apply backend and seams in a process of pytest that was started for them (this file is its plugin)."""
    if os.environ.get(VARIABLE) == "seams":
        # In this order: the backend precedes every import of Megatron.
        from megatron_lrpath.training.device import activate

        activate("cpu")
        from megatron_lrpath.training import seams
        from megatron_lrpath.training.session import Session

        seams.apply(Session("cpu"))


def main() -> int:
    """Run the selection both ways and print what differs."""
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
        shutil.copytree(args.checkout / "tests", root / "tests")
        lost: list[str] = []
        counts: Counter[str] = Counter()
        for file in files:
            plain = outcomes(root, file, "plain", args.timeout)
            passed = {test for test, outcome in plain.items() if outcome == PASSED}
            seams = outcomes(root, file, "seams", args.timeout, passed) if passed else {}
            kept = {test for test in passed if seams.get(test) == PASSED}
            lost += [f"{file}: {test}: {seams.get(test, 'not run')}" for test in passed - kept]
            counts.update(plain=len(passed), kept=len(kept), files=1)
            print(f"{file}: {len(passed)} pass plain, {len(kept)} of them with seams", flush=True)
    print(
        f"{counts['files']} files: {counts['plain']} tests pass plain, {counts['kept']} of them with backend and "
        "seams"
    )
    for line in sorted(lost):
        print(f"lost: {line}")
    return 1 if lost else 0


def test_files(checkout: Path, chosen: list[str] | tuple[str, ...]) -> list[str]:
    """The test files among `chosen` files and folders, relative to the checkout.

    Raises:
        FileNotFoundError: one of them is not there.
    """
    found: list[str] = []
    for name in chosen:
        place = checkout / name
        if not place.exists():
            raise FileNotFoundError(name)
        files = [place] if place.is_file() else sorted(place.rglob("test_*.py"))
        found += [str(file.relative_to(checkout)) for file in files]
    return found


def outcomes(root: Path, file: str, how: str, timeout: float, chosen: Iterable[str] = ()) -> dict[str, str]:
    """The outcome of each test of a file, by the test's name.

    Args:
        root: the folder with `tests/`.
        how: `plain` or `seams`.
        timeout: seconds; a file that takes longer has no outcomes.
        chosen: the tests to run, by name; none: all.
    """
    results = root / "results.xml"
    results.unlink(missing_ok=True)
    command = [sys.executable, "-m", "pytest", file, "-q", "--no-header", "-p", "no:cacheprovider", "-p"]
    command += [Path(__file__).stem, f"--rootdir={root}", "-c", os.devnull, f"--junit-xml={results}"]
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
    names = root / "chosen"
    names.write_text("\n".join(chosen), encoding="utf-8")
    environment[CHOSEN] = str(names) if chosen else ""
    with (root / "log").open("wb") as log:
        try:
            subprocess.run(command, cwd=root, env=environment, stdout=log, stderr=log, timeout=timeout)
        except subprocess.TimeoutExpired:
            print(f"{file}: {how}: longer than {timeout:g} s", file=sys.stderr)
    if not results.exists():
        return {}
    cases = ElementTree.parse(results).iter("testcase")
    return {f"{case.get('classname')}::{case.get('name')}": outcome(case) for case in cases}


def outcome(case: ElementTree.Element) -> str:
    """`passed`, `skipped`, or the first line of what went wrong."""
    for child in case:
        if child.tag == "skipped":
            return "skipped"
        if child.tag in ("failure", "error"):
            return f"{child.tag}: {(child.get('message') or '').splitlines()[0][:200]}"
    return PASSED


if __name__ == "__main__":
    sys.exit(main())
