"""slurm/preprocess.sh through the real sbatch: shards in an array, merged; interrupted, resumed; refusals."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import ROOT
from tests.support.preprocess_fixtures import NULL, pair, preprocess, write_lines
from tests.support.slurm_cluster.site import Site, cluster_or_skip
from tools import preprocess_shards


def delivery(folder: Path) -> list[Path]:
    """Write files of different sizes; return their paths."""
    folder.mkdir(parents=True)
    counts = (40, 3, 25, 1, 30)
    texts = [[f"{number} {line} 7" for line in range(count)] for number, count in enumerate(counts)]
    return [write_lines(folder / f"part {number}.jsonl", lines) for number, lines in enumerate(texts)]


def test_files_are_shared_out_in_order_and_numbers_written_as_sbatch_takes_them(tmp_path):
    files = [str(path) for path in delivery(tmp_path / "raw")]
    parts = preprocess_shards.shared_out(files, 3)
    assert [name for part in parts for name in part] == files
    assert len(parts) == 3
    assert len(preprocess_shards.shared_out(files, 50)) == 5
    assert preprocess_shards.ranges([0, 1, 2, 5, 7, 8]) == "0-2,5,7-8"


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--overwrite"], "--overwrite does not go with shards"),
        (["--json-keys", "body"], "holds the shards of other files or arguments"),
    ],
)
def test_shards_of_other_files_or_arguments_are_refused(tmp_path, capsys, argv, said):
    files = [str(path) for path in delivery(tmp_path / "raw")]
    given = [
        "prepare",
        "--shards",
        "2",
        "--",
        "--input",
        *files,
        "--output-prefix",
        str(tmp_path / "web"),
        *NULL,
    ]
    assert preprocess_shards.main(given) == 0
    assert preprocess_shards.main([*given, *argv]) == 2
    assert said in capsys.readouterr().err


@pytest.mark.slow
def test_an_array_writes_the_bytes_of_one_run_and_resumes(tmp_path):
    site = Site(cluster_or_skip(), tmp_path / "a site")
    delivery(site.folder / "raw")
    assert preprocess(site.folder / "raw/*.jsonl", site.folder / "whole", *NULL) == 0
    argv = ["bash", str(ROOT / "slurm/preprocess.sh"), "3", "--input", "raw/*.jsonl"]
    argv += ["--output-prefix", "data/web", *NULL]
    environment = site.cluster.environment | {"LRPATH_PYTHON": sys.executable, "PYTHONPATH": str(ROOT)}
    broken = site.folder / "raw/part 4.jsonl"
    text = broken.read_text()
    broken.write_text("{" * len(text))

    def submit() -> list[int]:
        told = subprocess.run(
            argv, cwd=site.folder, env=environment, capture_output=True, text=True, timeout=240
        )
        assert told.returncode == 0, told.stderr
        return [int(line.split("job ")[1].split(";")[0]) for line in told.stdout.splitlines()]

    array, merge = submit()
    site.cluster.wait(merge, "CANCELLED", seconds=120)  # a shard has failed
    assert not (site.folder / "data/web_text_document.idx").exists()
    first = site.folder / "data/web.shards/00000_text_document.idx"
    before = first.stat().st_mtime_ns
    broken.write_text(text)
    array, merge = submit()
    assert site.cluster.job(array)["ArrayTaskId"] == "2"
    site.finish(merge, 120)
    assert first.stat().st_mtime_ns == before
    assert pair(site.folder / "data/web_text_document") == pair(site.folder / "whole_text_document")
    (again,) = submit()
    site.finish(again)
    site.cluster.empty()


def test_the_end_names_the_prefix_that_the_next_step_takes(tmp_path, monkeypatch, capsys):
    delivery(tmp_path / "raw")
    argv = [str(tmp_path / "raw/*.jsonl"), tmp_path / "web", *NULL]
    assert preprocess(*argv) == 0
    assert (
        f"next: python tools/slice_versions.py --source {tmp_path}/web_text_document"
        in capsys.readouterr().err
    )
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    assert preprocess(*argv, "--overwrite") == 0
    assert "next:" not in capsys.readouterr().err
