"""Any content of a file that is read gives a clear error or a correct load, quickly and in little memory."""

from __future__ import annotations

import contextlib
import hashlib
import json
import struct
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_lrpath.checkpoints.metadata import load_metadata
from megatron_lrpath.commands.samples import named_run
from megatron_lrpath.data.indexed import HEADER_BYTES, read_header
from megatron_lrpath.data.slice import Slice
from megatron_lrpath.data.slice_codec import PREAMBLE
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import load_plan
from megatron_lrpath.report.collect import collect, gaps
from megatron_lrpath.report.facts import facts
from megatron_lrpath.report.tables import run_table
from megatron_lrpath.runs import checkpoints as disk
from megatron_lrpath.runs import history, lineage
from megatron_lrpath.runs.checkpoints import MANIFEST, FileSum, ManifestError, read_manifest, write_manifest
from megatron_lrpath.runs.folder import RunFolder
from megatron_lrpath.sealed import json_digest
from tests.support.data_fixtures import make_random_dataset, make_slice

MAXIMUM_BYTES = 16 * 2**20
FUZZ = settings(
    max_examples=300,
    deadline=2000,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
PLAN = """name: fuzz
seed: 7
model: tiny
schedule: {style: cosine, max_lr: 1.0e-3, min_lr: 1.0e-4, warmup_steps: 2}
alpha: 0.5
batch: {global_batch_size: 4, micro_batch_size: 2, seq_length: 16}
tokenizer: {type: NullTokenizer, vocab_size: 100}
data: {slices: slices, valid: slices/valid}
versions:
  - {name: v1, steps: 100}
  - {name: v2, steps: 50, alpha: 0.25}
output: runs
"""

Edit = tuple[str, float, bytes]
EDITS = st.lists(
    st.tuples(
        st.sampled_from(["replace", "insert", "cut", "repeat"]),
        st.floats(0, 1),
        st.binary(min_size=1, max_size=9),
    ),
    min_size=1,
    max_size=4,
)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=9), inner, max_size=4),
    max_leaves=12,
)


def edited(content: bytes, edits: list[Edit]) -> bytes:
    """Return `content` with bytes replaced, inserted, cut off or repeated."""
    for kind, share, piece in edits:
        place = int(share * len(content))
        if kind == "cut":
            content = content[:place]
        elif kind == "repeat":
            content = content[:place] + content[max(0, place - 40) :]
        else:
            content = content[:place] + piece + content[place + (len(piece) if kind == "replace" else 0) :]
    return content


@contextlib.contextmanager
def clear_error_or_load(*errors: type[Exception]) -> Iterator[None]:
    """Check that only `errors` with a text are raised, with no more memory than `MAXIMUM_BYTES`."""
    message = "loaded correctly"
    tracemalloc.start()
    try:
        yield
    except errors as error:
        message = str(error)
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert len(message) > 10
    assert peak < MAXIMUM_BYTES


@FUZZ
@given(edits=EDITS)
def test_plan_files(tmp_path: Path, edits: list[Edit]) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(edited(PLAN.encode(), edits))
    with clear_error_or_load(UserError):
        load_plan(path)


@FUZZ
@given(key=st.sampled_from(["seed", "model", "schedule", "alpha", "batch", "versions", "data"]), value=JSON)
@example(key="versions", value=[{"name": "v", "steps": 10**30}])
@example(key="alpha", value=float("nan"))
def test_plan_values(tmp_path: Path, key: str, value: Any) -> None:
    import yaml

    path = tmp_path / "plan.yaml"
    path.write_text(yaml.safe_dump(yaml.safe_load(PLAN) | {key: value}, allow_unicode=True))
    with clear_error_or_load(UserError):
        load_plan(path)


def test_a_plan_executes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(
        PLAN.replace("seed: 7", f"seed: !!python/object/apply:os.system ['touch {tmp_path}/executed']")
    )
    with pytest.raises(UserError):
        load_plan(path)
    assert not (tmp_path / "executed").exists()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the prefix of a small indexed dataset."""
    return make_random_dataset(tmp_path_factory.mktemp("pair") / "a", [5, 9, 3, 30])


@pytest.fixture(scope="module")
def slice_bytes(pair: Path, tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the content of a slice file."""
    path = tmp_path_factory.mktemp("slice") / "v1.slice"
    make_slice(path, [(pair, range(4), "prose")])
    return path.read_bytes()


@FUZZ
@given(edits=EDITS, resigned=st.booleans())
def test_slices(tmp_path: Path, slice_bytes: bytes, edits: list[Edit], resigned: bool) -> None:
    """Some inputs have a checksum that fits the changed content, to reach the code after that check."""
    content = edited(slice_bytes, edits)
    if resigned and len(content) > PREAMBLE.size:
        magic, version, length, _ = PREAMBLE.unpack_from(content)
        body = content[PREAMBLE.size :]
        content = PREAMBLE.pack(magic, version, length, hashlib.sha256(body).digest()) + body
    path = tmp_path / "v1.slice"
    path.write_bytes(content)
    with clear_error_or_load(UserError):
        Slice.load(path)


@FUZZ
@given(edits=EDITS, header=st.none() | st.tuples(*[st.integers(0, 2**64 - 1)] * 3, st.integers(0, 255)))
def test_index_files(tmp_path: Path, pair: Path, edits: list[Edit], header: Any) -> None:
    content = edited(Path(f"{pair}.idx").read_bytes(), edits)
    if header:
        version, sequences, bounds, code = header
        content = (
            b"MMIDIDX\x00\x00"
            + struct.pack("<QBQQ", version, code, sequences, bounds)
            + content[HEADER_BYTES:]
        )
    (tmp_path / "a.idx").write_bytes(content)
    (tmp_path / "a.bin").write_bytes(Path(f"{pair}.bin").read_bytes())
    with clear_error_or_load(UserError):
        read_header(str(tmp_path / "a"))


@FUZZ
@given(content=st.binary(max_size=200) | st.integers().map(lambda number: str(number).encode()))
@example(content=b"9" * 5000)
@example(content="٣".encode())
def test_trackers(tmp_path: Path, content: bytes) -> None:
    (tmp_path / disk.TRACKER).write_bytes(content)
    (tmp_path / "iter_0000003").mkdir(exist_ok=True)
    step = disk.tracked_step(tmp_path)
    assert step is None or (step >= 0 and int(content) == step)
    assert disk.latest_step(tmp_path) is None


def manifest_of(folder: Path) -> bytes:
    """Return a whole manifest for `folder`."""
    folder.mkdir(exist_ok=True)
    write_manifest(folder, 3, {"a.distcp": FileSum(1, "0" * 32), ".metadata": FileSum(2, "f" * 32)})
    return (folder / MANIFEST).read_bytes()


@FUZZ
@given(edits=EDITS)
def test_manifests(tmp_path: Path, edits: list[Edit]) -> None:
    folder = tmp_path / "iter_0000003"
    (folder / MANIFEST).write_bytes(edited(manifest_of(folder), edits))
    with clear_error_or_load(ManifestError):
        assert all(Path(name).name == name for name in read_manifest(folder))


@FUZZ
@given(value=JSON, key=st.sampled_from(["format", "step", "files", "bytes", "xxh3_128", "name"]))
def test_manifest_values(tmp_path: Path, value: Any, key: str) -> None:
    folder = tmp_path / "iter_0000003"
    manifest = json.loads(manifest_of(folder))
    if key in manifest:
        manifest[key] = value
    elif key == "name":
        manifest["files"][str(value)] = manifest["files"]["a.distcp"]
    else:
        manifest["files"]["a.distcp"][key] = value
    (folder / MANIFEST).write_text(json.dumps(manifest))
    with clear_error_or_load(ManifestError):
        sums = read_manifest(folder)
        assert all(isinstance(one.bytes, int) and one.bytes >= 0 for one in sums.values())


LINEAGE = {
    "identity": {"seed": 7, "slices": {"v1": "abc"}, "arguments": {"lr": 1}, "tokenizer_model": None},
    "identity_hash": "0",
    "parent": {"run": "main", "step": 3, "checkpoints": "x", "fingerprint": "y"},
    "starts": [{"step": 0}],
    "skipped": [{"step": 4, "samples": [0, 3]}],
}
LINEAGE["identity_hash"] = json_digest(LINEAGE["identity"])  # type: ignore[arg-type]


@FUZZ
@given(edits=EDITS)
def test_lineage_files(tmp_path: Path, edits: list[Edit]) -> None:
    RunFolder(tmp_path).lineage.write_bytes(edited(json.dumps(LINEAGE).encode(), edits))
    with clear_error_or_load(UserError):
        lineage.check_same_run(tmp_path, dict(LINEAGE["identity"]))  # type: ignore[call-overload]


@FUZZ
@given(path=st.sampled_from(["identity", "parent", "starts", "skipped", "slices", "arguments"]), value=JSON)
def test_lineage_values(tmp_path: Path, path: str, value: Any) -> None:
    content = json.loads(json.dumps(LINEAGE))
    owner = content if path in content else content["identity"]
    owner[path] = value
    if isinstance(content["identity"], dict) and path != "identity_hash":
        content["identity_hash"] = json_digest(content["identity"])
    RunFolder(tmp_path).lineage.write_text(json.dumps(content))
    identity: dict[str, Any] = dict(LINEAGE["identity"])  # type: ignore[call-overload]
    with clear_error_or_load(UserError):
        lineage.check_same_run(tmp_path, identity)
        lineage.check_parent(tmp_path, tmp_path / "nowhere", 3, identity)


@FUZZ
@given(
    lines=st.lists(st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()), max_size=6)
)
def test_histories(tmp_path: Path, lines: list[bytes]) -> None:
    """A damaged line is dropped; whole lines stay."""
    whole = b'{"step": 1, "loss": 4.5}'
    path = RunFolder(tmp_path).history
    path.write_bytes(b"\n".join([whole, *lines]))
    history.drop_steps_after(path, 5)
    assert whole in path.read_bytes().splitlines()
    assert history.losses_before(tmp_path, 5, 9)[0] == 4.5


@FUZZ
@given(edits=EDITS)
def test_run_folders(tmp_path: Path, edits: list[Edit]) -> None:
    """A caller that asks for a run's samples may name any folder."""
    RunFolder(tmp_path).lineage.write_bytes(edited(json.dumps(LINEAGE).encode(), edits))
    with clear_error_or_load(UserError):
        named_run(tmp_path, None)


@FUZZ
@given(
    name=st.sampled_from(["lineage.json", "result.json", "eval.json"]),
    value=JSON | st.dictionaries(st.sampled_from(["step", "identity", "skipped", "starts", "domains"]), JSON),
    edits=EDITS,
)
def test_reports(tmp_path: Path, name: str, value: Any, edits: list[Edit]) -> None:
    """A damaged file in a run's folder is reported as a line in the report."""
    path = tmp_path / "plan.yaml"
    path.write_text(PLAN.replace("output: runs", f"output: {tmp_path}/runs"))
    plan = load_plan(path)
    folder = plan.folder(plan.run("ours", "main"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text(json.dumps(value))
    (folder / "history.jsonl").write_bytes(edited(b'{"step": 1, "loss": 4.5}\n' * 3, edits))
    with clear_error_or_load(UserError):
        tree = collect(plan)
        gaps(tree), run_table(tree), facts(tree)


@pytest.fixture(scope="module")
def metadata_bytes(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """Return the `.metadata` of a small checkpoint."""
    import torch
    import torch.distributed.checkpoint as dcp

    folder = tmp_path_factory.mktemp("checkpoint")
    dcp.save({"a": torch.ones(3), "b": torch.ones(2, 2)}, checkpoint_id=folder, no_dist=True)
    return (folder / ".metadata").read_bytes()


BOMBS = (
    b"\x80\x04N\x72\xff\xff\xff\x7f.",
    b"\x80\x05\x96" + struct.pack("<Q", 2**40) + b".",
)  # memo, bytearray


@FUZZ
@given(edits=EDITS, bomb=st.none() | st.sampled_from(BOMBS))
def test_checkpoint_metadata(metadata_bytes: bytes, edits: list[Edit], bomb: bytes | None) -> None:
    """This includes pickles that say how much memory to allocate."""
    content = bomb or edited(metadata_bytes, edits)
    with clear_error_or_load(UserError):
        load_metadata(content, Path(".metadata"))


FUZZERS: tuple[Callable[..., None], ...] = (
    test_plan_files, test_plan_values, test_slices, test_index_files, test_trackers, test_manifests,
    test_manifest_values, test_lineage_files, test_lineage_values, test_histories, test_run_folders,
    test_reports, test_checkpoint_metadata,
)  # fmt: skip


def test_there_are_thousands_of_inputs() -> None:
    assert FUZZ.max_examples * len(FUZZERS) >= 3900
