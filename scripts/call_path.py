"""Count the files of the package on the way from `lrpath run` to the first optimizer step.

    .venv/bin/python scripts/call_path.py [TREE]

Trains a tiny plan on the CPU in a temporary folder and prints three lists with their lengths:

1. the call path: the files whose functions are on the stack when a process of ours is started, when Megatron's
   `pretrain` is entered, and when the optimizer's `step` is entered first;
2. the call path and the files whose functions those functions call directly, not by an import or through Megatron;
3. all files with a function that ran before that step (every command's `add_arguments` among them).

TREE is the checkout to look at, with a .venv of its own (default: this one).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

# Runs first in every process that inherits PYTHONPATH. Needs Python 3.12 (`sys.monitoring`).
WATCHER = """
import json, os, sys, threading, time

package, answer = os.environ["CALL_PATH_PACKAGE"] + os.sep, os.environ["CALL_PATH_ANSWER"]
calls, busy, events = set(), threading.local(), sys.monitoring.events

def write(**entry):
    with open(answer, "a") as stream:
        stream.write(json.dumps(entry | {"time": time.time(), "process": os.getpid()}) + "\\n")

def is_own(code):
    # 1: CO_OPTIMIZED, which bodies of modules and classes lack
    return code.co_filename.startswith(package) and not code.co_name.startswith("<") and code.co_flags & 1

def place(code):
    return code.co_filename.removeprefix(package), code.co_qualname

def stack(frame):
    found = []
    while frame is not None:
        if is_own(frame.f_code):
            found.append(place(frame.f_code))
        frame = frame.f_back
    return found[::-1]

def caller(frame):
    while frame is not None and not is_own(frame.f_code):
        if frame.f_code.co_name == "<module>" or "site-packages" in frame.f_code.co_filename:
            return "", ""  # an import, or another package
        frame = frame.f_back
    return place(frame.f_code) if frame else ("", "")

def landmark(code, frame):
    name, function = code.co_filename, code.co_name
    if name.endswith("subprocess.py") and code.co_qualname == "Popen.__init__":
        if any(str(word).startswith("megatron_lrpath.") for word in frame.f_locals.get("args")):
            return "process"  # a module of ours, not a command with a path in it
    elif function == "pretrain" and name.endswith("megatron/training/training.py"):
        return "pretrain"
    elif function == "step" and "/megatron/core/optimizer/" in name:
        return "step"

def started(code, offset):
    if getattr(busy, "now", False):
        return
    busy.now = True
    try:
        name = code.co_filename
        if name.startswith(package):
            if not is_own(code):
                return sys.monitoring.DISABLE
            call = caller(sys._getframe(1).f_back), place(code)
            if call not in calls:
                calls.add(call)
                write(event="call", caller=call[0], called=call[1])
            return  # the next caller may differ
        if code.co_name in ("__init__", "pretrain", "step"):
            frame = sys._getframe(1)
            if event := landmark(code, frame):
                write(event=event, stack=stack(frame))
            if code.co_qualname == "Popen.__init__":
                return  # every call counts
        return sys.monitoring.DISABLE
    finally:
        busy.now = False

sys.monitoring.use_tool_id(sys.monitoring.PROFILER_ID, "call_path")
sys.monitoring.register_callback(sys.monitoring.PROFILER_ID, events.PY_START, started)
sys.monitoring.set_events(sys.monitoring.PROFILER_ID, events.PY_START)
"""
MAKE_PLAN = """
import sys
from pathlib import Path
from tests.{module} import make_plan
make_plan(Path(sys.argv[1]), (6, 6))
"""


def main() -> int:
    """Print the call path of a tree; return 0."""
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("tree", type=Path, nargs="?", default=Path(__file__).parents[1])
    tree = parser.parse_args().tree.resolve()
    with tempfile.TemporaryDirectory() as folder:
        entries = train(tree, Path(folder))
    steps = [entry["time"] for entry in entries if entry["event"] == "step"]
    if not steps:
        raise SystemExit("the training made no optimizer step")
    before = [entry for entry in entries if entry["time"] <= steps[0]]
    path = stacks(before)
    calls = [(tuple(entry["caller"]), entry["called"][0]) for entry in before if entry["event"] == "call"]
    show_files("on the call path", {file for file, _ in path})
    show_files(
        "of the path and what it calls", {file for file, _ in path} | {to for by, to in calls if by in path}
    )
    show_files("with a function that ran before the first step", {to for _, to in calls})
    return 0


def train(tree: Path, folder: Path) -> list[dict[str, Any]]:
    """Train the main path of a tiny plan with the tree's Python; return the watcher's entries by time."""
    python = str(tree / ".venv/bin/python")
    module = "support.training_fixtures" if (tree / "tests/support/training_fixtures.py").exists() else ""
    make_plan = MAKE_PLAN.format(module=module or "training_fixtures")
    subprocess.run([python, "-c", make_plan, str(folder)], cwd=tree, check=True)
    answer = folder / "calls.jsonl"
    (folder / "watcher").mkdir()
    (folder / "watcher/sitecustomize.py").write_text(WATCHER)
    environment = os.environ | {
        "PYTHONPATH": str(folder / "watcher"),
        "CALL_PATH_PACKAGE": str(tree / "megatron_lrpath"),
        "CALL_PATH_ANSWER": str(answer),
    }
    options = ["--paradigm", "ours", "--run", "main", "--jobs", "1", "--device", "cpu", "--no-evaluate"]
    run = [python, "-m", "megatron_lrpath.cli", "run"]
    known = subprocess.run([*run, "--help"], cwd=tree, capture_output=True, text=True, check=True).stdout
    if "--cold" in known:  # a fork of a warm process does not show the functions that requested it
        options.append("--cold")
    command = [*run, str(folder / "plan.yaml"), *options]
    subprocess.run(command, cwd=tree, env=environment, check=True, stdout=sys.stderr)
    entries = [json.loads(line) for line in answer.read_text().splitlines()]
    return sorted(entries, key=lambda entry: entry["time"])


def stacks(entries: list[dict[str, Any]]) -> set[tuple[str, str]]:
    """Print the functions (file, name) on the stack at each landmark, and return them."""
    path = set()
    for entry in entries:
        if entry["event"] != "call":
            print(f"{entry['event']} (process {entry['process']})")
            for file, function in entry["stack"]:
                print(f"  {file}: {function}")
                path.add((file, function))
    return path


def show_files(title: str, files: set[str]) -> None:
    """Print a list of files under its title and length."""
    print(f"\nfiles {title}: {len(files)}", *sorted(files), sep="\n  ")


if __name__ == "__main__":
    sys.exit(main())
