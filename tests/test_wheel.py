"""The built wheel in a separate environment, used from a folder that is no checkout."""

from __future__ import annotations

import json
import os
import shutil
import site
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import yaml

from tests.support import ROOT
from tests.support.training_fixtures import make_plan

BUILD = "import sys; from setuptools.build_meta import build_wheel; print(build_wheel(sys.argv[1]))"


def call(*argv: object, cwd: Path, status: int = 0) -> str:
    """Return a command's output, run without access to the checkout; fail at another exit status."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    answer = subprocess.run(
        [str(word) for word in argv], cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )
    assert answer.returncode == status, answer.stdout + answer.stderr
    return answer.stdout


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the `bin` of an environment with the wheel, which uses the present environment's packages."""
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    listed = call("git", "ls-files", "--cached", "--others", "--exclude-standard", "-z", cwd=ROOT)
    for name in filter(None, listed.split("\0")):
        if (ROOT / name).is_file() and not name.startswith("tests/"):
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, source / name)
    wheel = call(sys.executable, "-c", BUILD, folder, cwd=source).split()[-1]
    venv.create(folder / "venv", with_pip=False)
    shutil.rmtree(source)
    python = folder / "venv/bin/python"
    own = Path(call(python, "-c", "import site; print(site.getsitepackages()[0])", cwd=folder).strip())
    call(
        sys.executable, "-m", "pip", "--python", python, "install", "--no-deps", "--no-index",
        "--disable-pip-version-check", "--quiet", folder / wheel, cwd=folder,
    )  # fmt: skip
    # A path line, not a site folder: the editable install of the checkout is not read from there.
    (own / "borrowed.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    return folder / "venv/bin"


@pytest.fixture(scope="module")
def work(installed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder that `lrpath init` made."""
    folder = tmp_path_factory.mktemp("elsewhere")
    answer = call(installed / "lrpath", "init", "work", cwd=folder)
    assert "plans in examples/" in answer
    return folder / "work"


def test_the_package_is_the_installed_one(installed: Path, work: Path) -> None:
    place = call(installed / "python", "-c", "import megatron_lrpath as m; print(m.__file__)", cwd=work)
    assert Path(place.strip()).is_relative_to(installed.parent)


def test_example_plans_and_schema_come_along(installed: Path, work: Path) -> None:
    plans = {path.relative_to(ROOT) for path in (ROOT / "examples").rglob("*.yaml")}
    assert plans <= {path.relative_to(work) for path in work.rglob("*.yaml")}
    answer = json.loads(call(installed / "lrpath", "plan", "examples/paper/1.2b.yaml", "--json", cwd=work))
    assert answer["paradigms"]["ours"]["relative_cost"] == 0.58
    assert json.loads((work / "plan.schema.json").read_text())["required"]


def test_the_documents_come_along(installed: Path, work: Path) -> None:
    listed = [line.split()[0] for line in call(installed / "lrpath", "docs", cwd=work).splitlines()]
    assert set(listed) == {path.stem for path in (ROOT / "docs").glob("*.md")}
    assert "branch_mix" in call(installed / "lrpath", "docs", "plan-file", cwd=work)


def test_init_again_keeps_what_was_changed(installed: Path, work: Path) -> None:
    changed = work / "examples/paper/203m.yaml"
    before = changed.read_text()
    changed.write_text(before + "# mine\n")
    answer = call(installed / "lrpath", "init", ".", cwd=work)
    assert answer.count("kept as it is") == 1
    assert "203m.yaml" in answer
    assert changed.read_text().endswith("# mine\n")
    changed.write_text(before)


def test_the_tools_are_modules(installed: Path, work: Path) -> None:
    tools = sorted(path.stem for path in (ROOT / "tools").glob("*.py") if path.stem != "__init__")
    code = f"import importlib; [importlib.import_module('megatron_lrpath.tools.' + n) for n in {tools}]"
    call(installed / "python", "-c", code, cwd=work)
    argv = ["-m", "megatron_lrpath.tools.train_tokenizer", "--help"]
    assert "--vocab-size" in call(installed / "python", *argv, cwd=work)


def test_a_slurm_recipe_hands_in_its_plan(installed: Path, work: Path) -> None:
    """It is a dry run, which needs no Slurm; without data it shows the jobs and then what is missing."""
    data = work / "data"
    data.mkdir()
    environment = f"PATH={installed}:{os.environ['PATH']}"
    argv = ["--data", data, "--output", work / "out", "--dry-run", "--json"]
    answer = call("env", environment, "bash", "slurm/ours_203m.sh", *argv, cwd=work, status=2)
    jobs = {job["key"] for job in json.loads(answer)["jobs"]}
    assert {"ours/main", "ours/branch-v4", "report"} <= jobs


@pytest.mark.slow
def test_a_plan_is_trained(installed: Path, tmp_path: Path) -> None:
    plan = make_plan(tmp_path, (4,))
    content = yaml.safe_load(plan.read_text())
    plan.write_text(yaml.safe_dump(content | {"output": "runs"}))
    argv = ["run", plan, "--paradigm", "ptfs", "--device", "cpu", "--no-evaluate"]
    call(installed / "lrpath", *argv, cwd=tmp_path)
    assert json.loads((tmp_path / "runs/ptfs/scratch-v1/result.json").read_text())["step"] == 4
    assert "scratch-v1" in call(installed / "lrpath", "status", plan, cwd=tmp_path)
