"""The quickstart's data, made offline from small releases: versions in order, resumable, clear errors."""

from __future__ import annotations

import gzip
import hashlib
import importlib.util
import json
import os
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

from megatron_lrpath.data.slice import Slice, check_disjoint
from tests.support.preprocess_fixtures import ROOT, documents


@pytest.fixture
def prepare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Return the script as a module, in an empty folder with four small releases in its cache."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    spec = importlib.util.spec_from_file_location("prepare", ROOT / "examples/quickstart/prepare.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "prepare", module)  # its functions are pickled by name
    spec.loader.exec_module(module)
    releases = {}
    for number in range(1, 5):
        release = f"0.{number}"
        releases[f"v{number}"] = (release, make_release(module.FOLDER / "cache", release, number))
    monkeypatch.setattr(module, "RELEASES", releases)
    monkeypatch.setattr(module, "VOCAB_SIZE", 400)
    monkeypatch.setattr(module, "VALID_TOKENS", 500)
    monkeypatch.setattr(module, "RECIPE", {"releases": releases})
    return module


def make_release(cache: Path, release: str, number: int) -> str:
    """Write a wheel whose services have the strings of all releases up to `number`; return its SHA-256."""
    cache.mkdir(parents=True, exist_ok=True)
    path = cache / f"botocore-{release}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for service in ("queue", "store"):
            data = service_description(service, number)
            archive.writestr(f"botocore/data/{service}/2020-01-01/service-2.json.gz", gzip.compress(data))
            archive.writestr(f"botocore/data/{service}/2020-01-01/paginators-1.json", "{}")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def service_description(service: str, number: int) -> bytes:
    def text(what: str, i: int) -> str:
        return (
            f"<p>The {what} {i} of the {service} takes {i * 7} requests &amp; answers them</p><p>"
            + "slowly " * 12
        )

    release = range(1, number + 1)
    shapes = {f"S{r}x{i}": {"documentation": text("field", 100 * r + i)} for r in release for i in range(30)}
    operations = {
        f"O{r}": {"documentation": text("operation", r), "short": {"documentation": "x"}} for r in release
    }
    return json.dumps({"operations": operations, "shapes": shapes, "documentation": "short"}).encode()


@pytest.mark.slow
def test_four_versions_that_hold_what_was_new(
    prepare: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main() == 0
    said = capsys.readouterr().err
    assert "[4/4]" in said
    slices = [
        Slice.load(prepare.FOLDER / "slices" / f"{name}.slice") for name in ("v1", "v2", "v3", "v4", "valid")
    ]
    check_disjoint(slices)
    total = 0
    for version, one in zip(prepare.RELEASES, slices, strict=False):
        assert {source.domain for source in one.sources} == {"operations", "shapes"}
        for source in one.sources:
            assert source.prefix.name.startswith(version)
        for domain, count in (("operations", 2), ("shapes", 60)):
            assert len(documents(prepare.dataset(version, domain))) == count
            total += count
    assert sum(one.documents for one in slices) == total
    assert slices[-1].tokens >= 500
    lines = prepare.text_file("v3", "operations").read_text().splitlines()
    texts = [json.loads(line)["text"] for line in lines]
    assert texts[0].startswith("The operation 3 of the queue takes 21 requests & answers them\nslowly slowly")
    assert not any("<" in text for text in texts)


def contents(folder: Path) -> dict[Path, object]:
    """Return every file's bytes; of a record its content without the time when its dataset was written."""
    found: dict[Path, object] = {}
    for path in folder.rglob("*.*"):
        if path.name.endswith(".tokens.json"):
            record = json.loads(path.read_bytes())
            del record["content_sha256"], record["content"]["mtime_ns"]
            found[path] = record
        elif path.name != ".lock":
            found[path] = path.read_bytes()
    return found


@pytest.mark.slow
def test_called_again_it_does_nothing_or_continues(
    prepare: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    assert prepare.main() == 0
    kept = contents(prepare.FOLDER)
    capsys.readouterr()
    assert prepare.main() == 0
    assert "already prepared" in capsys.readouterr().err
    for name in ("slices/v4.slice", "indexed/v2-shapes_text_document.idx"):
        (prepare.FOLDER / name).unlink()
    (prepare.FOLDER / "indexed/v2-shapes_text_document.bin").unlink()
    assert prepare.main() == 0
    assert contents(prepare.FOLDER) == kept


def test_another_recipe_starts_over_but_keeps_what_was_fetched(prepare: ModuleType) -> None:
    made = [prepare.FOLDER / name for name in ("tokenizer.model", "slices/v1.slice", "text/v1-shapes.jsonl")]
    for path in made:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    (prepare.FOLDER / "recipe.json").write_text("another")
    prepare.start_over_if_changed()
    assert not any(path.exists() for path in made)
    assert len(list((prepare.FOLDER / "cache").iterdir())) == 4
    made[0].touch()
    prepare.start_over_if_changed()
    assert made[0].exists()


def test_no_registry_in_reach(
    prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    for wheel in (prepare.FOLDER / "cache").glob("*0.3*"):
        wheel.unlink()
    assert prepare.main() == 2
    said = capsys.readouterr().err
    assert said.count("error: cannot get botocore 0.3 from the package registry") == 1
    assert "call this again" in said
    assert "Traceback" not in said


def test_a_release_that_was_tampered_with_is_fetched_again_or_refused(
    prepare: ModuleType, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    wheel = next((prepare.FOLDER / "cache").glob("*0.2*"))
    wheel.write_bytes(wheel.read_bytes() + b"x")
    assert prepare.main() == 2
    assert "cannot get botocore 0.2" in capsys.readouterr().err
