"""Kill the commands that write, at every moment that counts, and run two of each at once on one output.

    .venv/bin/python scripts/kill_writers.py FOLDER [--writers slices,report] [--kills 20] [--seed 1]

The moments: a temporary file or folder was made, a file was written, before and after each rename and removal. After
a kill every file under a final name is the old one or the new one, whole; after the next call all is as if nothing
had happened, and nothing is left behind. Of two at once one is refused, or both write the same.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from megatron_lrpath import files
from megatron_lrpath.errors import UserError

Call = Callable[[Path], None]
PATIENCE = 120.0  # seconds until a call and the processes that it started must have ended


@dataclass(frozen=True)
class Writer:
    """A command. `prepare` makes its inputs in the folder `in`, `call` writes the folder `out`.

    `exact`: two undisturbed calls write the same bytes. `again`: a second call overwrites the existing files.
    `warm`: modules that are imported once, before the processes are forked. `check` fails if the output of a
    killed call cannot be used.
    """

    prepare: Call
    call: Call
    exact: bool = True
    again: bool = False
    warm: tuple[str, ...] = ()
    check: Call | None = None


def draw_inputs(folder: Path) -> None:
    """Make a dataset of documents."""
    from tests.support.data_fixtures import make_lengths_dataset

    make_lengths_dataset(folder / "in/web", [7, 9, 11] * 40)


def draw_slices(folder: Path) -> None:
    """Draw three slices together with `tools/slice_versions.py`."""
    from tools import slice_versions

    argv = ["--source", str(folder / "in/web"), "--output", str(folder / "out"), "--seed", "1"]
    args = slice_versions.build_parser().parse_args([*argv, "--tokens", "200,200", "--valid-tokens", "100"])
    status = slice_versions.slice_versions(args)
    assert status == 0


def dataset_inputs(folder: Path) -> None:
    """Make two datasets to merge."""
    from tests.support.data_fixtures import make_lengths_dataset

    for number in range(2):
        make_lengths_dataset(folder / f"in/part{number}", [7, 9, 11] * 40, mark=number)


def merge_datasets(folder: Path) -> None:
    """Run `tools/merge_datasets.py`."""
    from tools.merge_datasets import merge_datasets as merge

    (folder / "out").mkdir(exist_ok=True)
    merge([str(folder / f"in/part{number}") for number in range(2)], str(folder / "out/all"), overwrite=True)


def checkpoint_inputs(folder: Path) -> None:
    """Make a run with two checkpoints."""
    from tests.merge.test_merge import write_checkpoint

    for step in (5, 10):
        write_checkpoint(folder / "in/checkpoints", step)


def merge_checkpoints(folder: Path) -> None:
    """Merge a run's checkpoints, as `lrpath merge` does."""
    from megatron_lrpath.merge.torch_dist import merge_checkpoints as merge

    merge(folder / "in/checkpoints", [5, 10], [0.5, 0.5], folder / "out", 10)


def model_inputs(folder: Path) -> None:
    """Write a small model in Hugging Face's format."""
    import torch
    from safetensors.torch import save_file

    hidden, inner, rows = 32, 48, 128
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": rows, "hidden_size": hidden,
        "intermediate_size": inner, "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 4,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False,
        "attention_bias": False, "mlp_bias": False, "rope_theta": 10000.0,
    }  # fmt: skip
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    shapes |= {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    names = {f"model.layers.0.{name}.weight": shape for name, shape in shapes.items()}
    names |= {"model.embed_tokens.weight": (rows, hidden), "lm_head.weight": (rows, hidden)}
    names["model.norm.weight"] = (hidden,)
    (folder / "in").mkdir(parents=True, exist_ok=True)
    (folder / "in/config.json").write_text(json.dumps(config))
    save_file({name: torch.ones(shape) for name, shape in names.items()}, folder / "in/model.safetensors")


def import_model(folder: Path) -> None:
    """Run `tools/import_hf.py`."""
    from tools.import_hf import import_folder

    import_folder(folder / "in", folder / "out")


def export_inputs(folder: Path) -> None:
    """Make a checkpoint to export."""
    from tools.import_hf import import_folder

    model_inputs(folder)
    import_folder(folder / "in", folder / "in/checkpoints")


def export_model(folder: Path) -> None:
    """Run `lrpath export --force`, over an earlier export if there is one."""
    from megatron_lrpath.export.card import Origin
    from megatron_lrpath.export.folder import Wishes, export_checkpoint
    from tests.support import GOLDEN

    checkpoint = folder / "in/checkpoints/release"
    wishes = Wishes(vocab_size=128, force=True, tokenizer=str(GOLDEN / "sp.model"))
    export_checkpoint(checkpoint, folder / "out", Origin(1), wishes)


def report_inputs(folder: Path) -> None:
    """Make a plan with made-up runs."""
    from tests.support import report_tree

    (folder / "in").mkdir(parents=True, exist_ok=True)
    plan = report_tree.write_plan(folder / "in", 2)
    report_tree.write_slices(plan)
    report_tree.write_tree(plan)


def write_report(folder: Path) -> None:
    """Run `lrpath report`."""
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.report.page import make_report
    from megatron_lrpath.report.page import write_report as write

    when = datetime(2026, 1, 1, tzinfo=UTC)
    write(make_report(load_plan(folder / "in/plan.yaml"), when), folder / "out")


def chat_inputs(folder: Path) -> None:
    """Make a plan with conversations for fine-tuning that have changed since they were prepared."""
    from tests.support.sft_fixtures import changed, conversations, sft_plan, write_lines

    (folder / "in").mkdir(parents=True, exist_ok=True)
    changed(sft_plan(folder / "in"), "chosen", output=str(folder / "out"))
    prepare_chats(folder)
    write_lines(folder / "in/chat.jsonl", conversations(NEW_CHATS))


def prepare_chats(folder: Path) -> None:
    """Run `lrpath sft --prepare`."""
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.sft.prepare import prepare

    prepare(load_plan(folder / "in/chosen.yaml"), 1)


def check_chats(folder: Path) -> None:
    """Check that the prepared conversations are completely the old or completely the new ones."""
    from megatron_lrpath.plan import load_plan
    from megatron_lrpath.sft.prepared import TRAIN, open_prepared
    from tests.support.sft_fixtures import CHATS

    prepared = open_prepared(load_plan(folder / "in/chosen.yaml"), verify=True)
    assert prepared.record[TRAIN]["examples"] in (CHATS, NEW_CHATS), prepared.record


def plan_inputs(folder: Path) -> None:
    """Make a plan with files in place of its data."""
    from tests.support.launch_fixtures import write_plan

    (folder / "in/data/slices").mkdir(parents=True, exist_ok=True)
    for name in ("v1", "v2", "valid"):
        (folder / f"in/data/slices/{name}.slice").touch()
    path = write_plan(folder / "in", 2).path
    path.write_text(path.read_text().replace(str(folder / "in/out"), str(folder / "out")))


def run_plan(folder: Path) -> None:
    """Run `lrpath run` with a stand-in for the training."""
    from megatron_lrpath.launch.local import Options, carry_out
    from megatron_lrpath.plan import load_plan
    from tests.support.launch_fixtures import fake_command

    plan = load_plan(folder / "in/plan.yaml")
    options = Options(paradigms=("ours",), jobs=2, device="cpu", evaluate=False, grace=1.0)
    status = carry_out(plan, options, fake_command(plan))
    assert status == 0


def submit_plan(folder: Path) -> None:
    """Run `lrpath submit` with a folder of files as the queue."""
    from megatron_lrpath.launch.slurm import queue as slurm
    from megatron_lrpath.launch.slurm.ledger import SubmittedPlan
    from megatron_lrpath.launch.slurm.settings import read_settings
    from megatron_lrpath.launch.slurm.submit import Submission

    jobs = folder / "in/queue"
    jobs.mkdir(exist_ok=True)

    def submit(options: Any, script: Path) -> int:
        descriptor, name = ORIGINAL_MKSTEMP(dir=jobs, prefix="job")
        os.write(descriptor, f"{script} {slurm.SUBMITTED}".encode())
        os.close(descriptor)
        return job_number(Path(name))

    def queue() -> dict[int, slurm.QueuedJob]:
        rows = {job_number(one): one.read_text() for one in jobs.iterdir()}
        return {
            number: slurm.QueuedJob(number, "PENDING", "", "", "", text, "") for number, text in rows.items()
        }

    def cancel(numbers: Any) -> None:
        for one in list(jobs.iterdir()):
            if job_number(one) in numbers:
                one.unlink()

    slurm.submit, slurm.queue, slurm.cancel = submit, queue, cancel  # type: ignore[assignment]
    os.chdir(folder / "in")
    settings = read_settings(None, {"gpus_per_node": "0", "nodes": "1"})
    submission = Submission.of(SubmittedPlan.of(folder / "in/plan.yaml"), settings, ("ours",))
    submission.carry_out()
    scripts = Counter(one.read_text() for one in jobs.iterdir())
    assert len(scripts) == len(submission.jobs), scripts
    assert set(scripts.values()) == {1}, f"doubles: {scripts}"


def job_number(path: Path) -> int:
    """Return a job's number, from the random name of its file."""
    return int.from_bytes(path.name.encode()[-5:], "big")


TORCH = (
    "megatron_lrpath.launch.preloaded",
    "megatron_lrpath.merge.torch_dist",
    "tools.import_hf",
    "megatron_lrpath.export.folder",
)
WRITERS = {
    "slices": Writer(draw_inputs, draw_slices),
    "datasets": Writer(dataset_inputs, merge_datasets, again=True),
    "merge": Writer(checkpoint_inputs, merge_checkpoints, exact=False, warm=TORCH),
    "import": Writer(model_inputs, import_model, exact=False, warm=TORCH),
    "export": Writer(export_inputs, export_model, again=True, warm=TORCH),
    "report": Writer(
        report_inputs, write_report, exact=False, again=True, warm=("megatron_lrpath.report.page",)
    ),
    "chats": Writer(
        chat_inputs,
        prepare_chats,
        exact=False,
        again=True,
        warm=("megatron_lrpath.sft.prepare",),
        check=check_chats,
    ),
    "run": Writer(plan_inputs, run_plan, exact=False, again=True),
    "submit": Writer(plan_inputs, submit_plan, exact=False, again=True),
}
NEW_CHATS = 30  # conversations
ORIGINAL_MKSTEMP = tempfile.mkstemp
LOCKS = {".lock"}  # remain: removing a lock file takes it from a process that waits for it


class Moments:
    """Counter of the moments of a process that kills it at one of them."""

    def __init__(self, kill_at: int | None, record: Path) -> None:
        self.kill_at, self.record, self.seen = kill_at, record, 0

    def pass_by(self, name: str) -> None:
        """Record a moment; kill the process if it is the chosen one."""
        self.seen += 1
        if self.kill_at is None:
            with self.record.open("a") as stream:
                stream.write(f"{name}\n")
        elif self.seen == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    def put_in_place(self) -> None:
        """Wrap the functions that make, write and rename files."""
        for owner, name, before, after in (
            (tempfile, "mkstemp", "", "made"),
            (tempfile, "mkdtemp", "", "made"),
            (os, "fsync", "", "written"),
            (os, "rename", "before rename", "after rename"),
            (os, "replace", "before rename", "after rename"),
            (os, "unlink", "", "removed"),
            (os, "symlink", "", "linked"),
            (subprocess, "Popen", "before a process", "after a process"),
            (files, "_exchange", "before rename", "after rename"),
        ):
            setattr(owner, name, self._around(getattr(owner, name), before, after))

    def _around(self, original: Callable[..., Any], before: str, after: str) -> Callable[..., Any]:
        owner = os.getpid()

        def wrapped(*args: Any, **named: Any) -> Any:
            ours = os.getpid() == owner  # not in the processes that it forks
            if before and ours:
                self.pass_by(before)
            result = original(*args, **named)
            if ours:
                self.pass_by(after)
            return result

        return wrapped


@dataclass
class Harness:
    """Kills one writer in `folder`, at `work` (always the same path: outputs may contain it)."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        self.writer = WRITERS[self.name]
        self.work, self.template = self.folder / "work", self.folder / "template"
        self.record, self.log = self.folder / "moments", self.folder / "log"
        shutil.rmtree(self.folder, ignore_errors=True)
        self.work.mkdir(parents=True)
        for module in self.writer.warm:
            importlib.import_module(module)
        self.check(self.child(self.writer.prepare), 0)
        shutil.copytree(self.work, self.template, symlinks=True)
        self.check(self.child(self.writer.call), 0)
        self.whole, self.moments = contents(self.work), self.record.read_text().split("\n")[:-1]
        self.record.unlink()

    def child(self, call: Call, kill_at: int | None = None) -> int:
        """Call in another process, wait for all that it starts, and return its exit status (-9: killed)."""
        leader = self.start(call, kill_at)
        return self.end(leader)

    def start(self, call: Call, kill_at: int | None = None) -> int:
        """Fork a process that calls; return its id."""
        process = os.fork()
        if process:
            return process
        status = 1
        try:
            os.setsid()
            log = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1)
            os.dup2(log, 2)
            if call is self.writer.call:
                Moments(kill_at, self.record).put_in_place()
            call(self.work)
            status = 0
        except UserError as error:
            print(f"refused: {error}", flush=True)
            status = 2
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)

    def end(self, leader: int) -> int:
        """Wait for a call, and until the processes that it left have ended; return its exit status."""
        status = os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1])
        deadline = time.monotonic() + PATIENCE
        while in_session(leader):
            assert time.monotonic() < deadline, f"left behind: {in_session(leader)}"
            time.sleep(0.05)
        return status

    def reset(self, with_output: bool = False) -> None:
        """Restore the inputs, without output or with the output of an undisturbed call."""
        shutil.rmtree(self.work)
        shutil.copytree(self.template, self.work, symlinks=True)
        if with_output:
            self.check(self.child(self.writer.call), 0)

    def kill(self, moment: int, with_output: bool) -> str:
        """Kill a call at its moment number `moment` (from 1), then call again; return the moment's name."""
        self.reset(with_output)
        before = contents(self.work)
        status = self.child(self.writer.call, moment)
        assert status in (0, -9), self.said()
        where = f"{self.name}, moment {moment} ({self.moments[min(moment, len(self.moments)) - 1]})"
        for path, content in contents(self.work).items():
            final = path.startswith("out") and not Path(path).name.startswith(".") and ".partial" not in path
            if self.writer.exact and final and "/." not in path:
                assert content in (before.get(path), self.whole.get(path)), f"{where}: {path} is half-written"
        if self.writer.check is not None:
            assert self.child(self.writer.check) == 0, f"{where}: {self.said()}"
        if status == -9 or self.writer.again:
            status = self.child(self.writer.call)
            there = self.work / "out"
            refused = status == 2 and there.exists() and not self.writer.again  # the killed call was complete
            assert status == 0 or refused, f"{where}: {self.said()}"
        self.compare(where)
        return self.moments[min(moment, len(self.moments)) - 1]

    def two_at_once(self) -> None:
        """Run two calls at the same time."""
        self.reset()
        statuses = [self.end(one) for one in [self.start(self.writer.call) for _ in range(2)]]
        assert 0 in statuses, f"{self.name}, two at once: {self.said()}"
        assert set(statuses) <= {0, 2}, f"{self.name}, two at once: {self.said()}"
        self.compare(f"{self.name}, two at once")

    def compare(self, where: str) -> None:
        """Check that the files are those of an undisturbed call."""
        found = contents(self.work)
        assert set(found) == set(self.whole), f"{where}: {sorted(set(found) ^ set(self.whole))}"
        if self.writer.exact:
            changed = [path for path in found if found[path] != self.whole[path]]
            assert not changed, f"{where}: {changed}"

    def check(self, status: int, wanted: int) -> None:
        """Check the exit status of an undisturbed call."""
        assert status == wanted, f"{self.name}: {self.said()}"

    def said(self) -> str:
        """Return the end of the output of the calls."""
        return self.log.read_text(errors="replace")[-3000:]


def contents(folder: Path) -> dict[str, bytes]:
    """Return the content of all files below a folder by path, without names that a call draws at random."""
    found: dict[str, bytes] = {}
    for path in folder.rglob("*"):
        if path.is_file() and path.name not in LOCKS and "queue" not in path.parts:
            name = str(path.relative_to(folder))
            if path.parent.name == "logs":  # named by the time
                name = str(path.parent.relative_to(folder) / "*.log")
            with contextlib.suppress(FileNotFoundError):
                found[name] = path.read_bytes()
    return found


def in_session(leader: int) -> list[int]:
    """Return the processes that live in the session of `leader`."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, PermissionError, psutil.NoSuchProcess):
            if os.getsid(process.pid) == leader and process.status() != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
    return found


def harass(folder: Path, name: str, kills: int, chosen: random.Random) -> Counter[str]:
    """Kill a writer at `kills` of its moments (or all), then run two at once; return the moments hit."""
    harness = Harness(folder / name, name)
    cases = [(moment, False) for moment in range(1, len(harness.moments) + 1)]
    cases += [(moment, True) for moment, _ in cases] if harness.writer.again else []
    hit: Counter[str] = Counter()
    for moment, with_output in sorted(chosen.sample(cases, min(kills, len(cases)))):
        hit[harness.kill(moment, with_output)] += 1
    harness.two_at_once()
    return hit


def main() -> None:
    """Test all writers, or those that are named."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--writers", default=",".join(WRITERS), help="names, with commas (default: all)")
    parser.add_argument(
        "--kills", type=int, default=10**6, help="of each writer at most (default: every moment)"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    chosen = random.Random(args.seed)
    for name in args.writers.split(","):
        begun = time.monotonic()
        hit = harass(args.folder.resolve(), name, args.kills, chosen)
        print(f"{name}: {hit.total()} kills {dict(hit)}, {time.monotonic() - begun:.0f} s", flush=True)


if __name__ == "__main__":
    main()
