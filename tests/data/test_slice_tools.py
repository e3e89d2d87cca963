"""The scripts slice_versions.py and check_slices.py as commands: files, output and exit status."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from megatron_lrpath.data.slice import Slice, verify_slices
from megatron_lrpath.locks import FolderLock
from tests.support import ROOT
from tests.support.data_fixtures import make_lengths_dataset


def call(tool: str, *argv: object, folder: Path) -> subprocess.CompletedProcess[str]:
    """Run a script of tools/ in `folder`."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200", "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(ROOT / "tools" / tool), *map(str, argv)]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def as_json(result: subprocess.CompletedProcess[str]) -> Any:
    """Return the JSON that a script printed with --json."""
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """Return a folder with data/web (1,000 documents of about 50 tokens) and data/books (100, about 500)."""
    rng = np.random.RandomState(5)
    make_lengths_dataset(tmp_path / "data/web", rng.randint(1, 100, 1000), 1)
    make_lengths_dataset(tmp_path / "data/books", rng.randint(1, 1000, 100), 2)
    return tmp_path


def draw_four(tree: Path, *more: object) -> subprocess.CompletedProcess[str]:
    """Draw four versions of 10,000 tokens and a validation set, 70% web."""
    sources = ["--source", "data/web:0.7:net", "--source", "data/books:0.3"]
    amounts = ["--versions", 4, "--tokens-per-version", "1e4", "--valid-tokens", "2k"]
    return call("slice_versions.py", *sources, *amounts, "--output", "data/slices", *more, folder=tree)


def test_versions_are_drawn_shown_and_proved(tree: Path) -> None:
    drawn = draw_four(tree)
    assert drawn.returncode == 0, drawn.stderr
    assert sorted(path.name for path in (tree / "data/slices").glob("*.slice")) == [
        "v1.slice", "v2.slice", "v3.slice", "v4.slice", "valid.slice",
    ]  # fmt: skip
    for word in ("net", "books", "v1", "v4", "valid", "not drawn"):
        assert word in drawn.stdout
    checked = as_json(call("check_slices.py", "data/slices", "--json", folder=tree))
    assert checked["ok"]
    for one in checked["slices"]:
        wanted = 2000 if one["name"] == "valid" else 10_000
        assert wanted * 0.7 <= one["tokens_by_domain"]["net"] < wanted * 0.7 + 100
        assert wanted * 0.3 <= one["tokens_by_domain"]["books"] < wanted * 0.3 + 1000


def test_a_second_call_continues_and_changes_no_existing_file(tree: Path) -> None:
    first = as_json(draw_four(tree, "--json"))
    before = {path: path.read_bytes() for path in (tree / "data/slices").glob("*.slice")}
    again = draw_four(tree)
    assert again.returncode == 2
    assert again.stderr.startswith("error: data/slices/valid.slice: exists already")
    make_lengths_dataset(tree / "data/new", [10] * 50, 3)
    rest = call(
        "slice_versions.py", "--source", "data/new", "--append", "--output", "data/slices", folder=tree
    )
    assert rest.returncode == 0, rest.stderr
    assert Slice.load(tree / "data/slices/v5.slice").tokens_by_domain == {"new": 500}
    assert {path: path.read_bytes() for path in before} == before
    left = ["--source", "data/web", "--source", "data/books", "--append", "--json"]
    everything = as_json(call("slice_versions.py", *left, "--output", "data/slices", folder=tree))
    assert everything["slices"][0]["name"] == "v6"
    assert everything["slices"][0]["tokens"] == sum(first["left"].values())
    assert as_json(call("check_slices.py", "data/slices", "--json", folder=tree))["ok"]


def test_named_documents_need_no_mixture(tree: Path) -> None:
    argv = ["--documents", "v1=data/web:0-500", "--documents", "valid=data/web:500-510", "--output", "s"]
    assert call("slice_versions.py", *argv, folder=tree).returncode == 0
    assert Slice.load(tree / "s/v1.slice").sources[0].documents.tolist() == list(range(500))


def test_too_many_tokens_print_a_table_and_write_nothing(tree: Path) -> None:
    sources = ["--source", "data/web", "--source", "data/books"]
    argv = [*sources, "--tokens-per-version", "1e6", "--output", "s"]
    refused = call("slice_versions.py", *argv, folder=tree)
    assert refused.returncode == 2
    assert "too few tokens" in refused.stderr
    assert "data/books" in refused.stderr
    assert "error: asked for 1,000,000 tokens" in refused.stderr
    assert not list((tree / "s").glob("*.slice"))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--source", "nowhere", "--tokens-per-version", "5"], "nowhere.idx"),
        (["--source", "data/web", "--versions", "2"], "--tokens-per-version is missing"),
        (["--source", "data/web"], "nothing to draw"),
        (["--tokens-per-version", "5"], "no --source"),
        (
            ["--source", "data/web", "--source", "data/books:1", "--tokens-per-version", "5"],
            "some have a weight",
        ),
        (["--source", "data/web:1", "--append"], "weights mean nothing"),
        (["--source", "data/web", "--source", "data/web", "--tokens-per-version", "5"], "one and the same"),
    ],
)
def test_bad_requests_are_one_line(tree: Path, argv: list[str], message: str) -> None:
    refused = call("slice_versions.py", *argv, "--output", "s", folder=tree)
    assert refused.returncode == 2
    assert message in refused.stderr
    assert refused.stderr.startswith("error: ")
    assert "Traceback" not in refused.stderr


def test_two_draws_into_one_folder_do_not_run_at_once(tree: Path) -> None:
    lock = FolderLock.acquire(tree / "data/slices")
    try:
        refused = draw_four(tree)
    finally:
        lock.close()
    assert refused.returncode == 2
    assert "is drawing slices there now" in refused.stderr


def test_every_failure_is_named(tree: Path) -> None:
    assert draw_four(tree).returncode == 0
    folder = tree / "data/slices"
    one = Slice.load(folder / "v1.slice")
    Slice("v9", 1, one.sources).save(folder / "v9.slice")
    (folder / "v2.slice").write_bytes((folder / "v2.slice").read_bytes()[:-1])
    make_lengths_dataset(tree / "data/books", [1000] * 3, 2)
    checked = call("check_slices.py", "data/slices", folder=tree)
    assert checked.returncode == 1
    for message in (
        "v2.slice: not a whole slice file",
        "v9.slice share",
        "v3.slice: the indexed dataset",
        "but the dataset has 3 documents",
    ):
        assert message in checked.stdout
    found = call("check_slices.py", "data/slices", "--json", folder=tree)
    assert found.returncode == 1
    assert not json.loads(found.stdout)["ok"]


def test_a_wrong_count_is_noticed(tree: Path) -> None:
    assert draw_four(tree).returncode == 0
    path = tree / "data/slices/v1.slice"
    one = Slice.load(path)
    wrong = [type(s)(s.prefix, s.fingerprint, s.domain, s.documents, s.tokens + 1) for s in one.sources]
    Slice("v1", 1, tuple(wrong)).save(path)
    checked = call("check_slices.py", path, folder=tree)
    assert checked.returncode == 1
    assert "tokens, but its documents have" in checked.stdout


@pytest.mark.slow
def test_a_killed_draw_leaves_whole_slices_or_none_and_can_be_drawn_again(tree: Path) -> None:
    undisturbed = as_json(draw_four(tree, "--json", "--output", "elsewhere"))
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    argv = [
        "--source",
        "data/web:0.7:net",
        "--source",
        "data/books:0.3",
        "--versions",
        "4",
        "--tokens-per-version",
    ]
    command = [sys.executable, str(ROOT / "tools/slice_versions.py"), *argv, "1e4", "--valid-tokens", "2k"]
    begin = time.perf_counter()
    assert (
        subprocess.run([*command, "--output", "timed"], cwd=tree, env=environment, check=False).returncode
        == 0
    )
    whole = time.perf_counter() - begin
    random = np.random.RandomState(8)
    for _ in range(8):
        process = subprocess.Popen([*command, "--output", "killed"], cwd=tree, env=environment)
        time.sleep(whole * random.uniform(0.4, 1.0))
        process.kill()
        process.wait()
        for path in (tree / "killed").glob("*.slice"):
            verify_slices([Slice.load(path)])
            path.unlink()
    again = subprocess.run([*command, "--output", "killed"], cwd=tree, env=environment, check=False)
    assert again.returncode == 0
    prints = {one["name"]: one["fingerprint"] for one in undisturbed["slices"]}
    assert {name: Slice.load(tree / f"killed/{name}.slice").fingerprint for name in prints} == prints


@pytest.mark.parametrize("path", ["nowhere", "data", "data/slices/v7"])
def test_nothing_to_check_is_bad_input(tree: Path, path: str) -> None:
    assert call("check_slices.py", path, folder=tree).returncode == 2


@pytest.mark.parametrize("tool", ["slice_versions.py", "check_slices.py"])
def test_help_comes_at_once(tree: Path, tool: str) -> None:
    """It imports none of the libraries whose import takes longer than the rest of a start."""
    command = [sys.executable, "-X", "importtime", str(ROOT / "tools" / tool), "--help"]
    answer = subprocess.run(command, cwd=tree, capture_output=True, text=True, check=True)
    assert "usage" in answer.stdout
    loaded = {line.rpartition("|")[2].strip().partition(".")[0] for line in answer.stderr.splitlines()}
    assert "argparse" in loaded
    assert loaded.isdisjoint({"numpy", "torch", "yaml", "megatron"})
