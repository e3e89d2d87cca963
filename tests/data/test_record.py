"""The origin of a dataset is recorded next to it and in its slices; another tokenizer is refused by name."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml

from megatron_lrpath.cli import main as lrpath
from megatron_lrpath.data.record import blend_problems, record_path, tokenizer_problems
from megatron_lrpath.data.slice import Slice
from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan, load_plan
from megatron_lrpath.readiness.data import made_checks
from megatron_lrpath.sft.prepare import prepare
from megatron_lrpath.sft.prepared import open_prepared
from megatron_lrpath.tokenizers.prints import TokenizerSpec
from megatron_lrpath.tokenizers.sentencepiece_model import parse_model
from tests.support import GOLDEN
from tests.support.data_fixtures import make_indexed_dataset, make_lengths_dataset, make_slice
from tests.support.plan_text import plan_with
from tests.support.preprocess_fixtures import NULL, SP, call, pair, preprocess, write_lines
from tests.support.sft_fixtures import SFT, conversations
from tools import check_dataset, merge_datasets

SP_MODEL, OTHER_MODEL = GOLDEN / "sp.model", GOLDEN / "nfkc.model"  # 600 pieces each
HF = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model"]


def tokens(prefix: Path) -> dict[str, Any]:
    """Return the record's part about the tokenizer."""
    return dict(json.loads(record_path(prefix).read_text())["tokenizer"])


def sliced(folder: Path, prefix: Path) -> Path:
    """Draw v1, v2 and valid from a dataset with the tool; return their folder."""
    options = [
        "--versions",
        2,
        "--tokens-per-version",
        600,
        "--valid-tokens",
        200,
        "--output",
        folder / "slices",
    ]
    answer = call("slice_versions", "--source", prefix, *options)
    assert answer.returncode == 0, answer.stderr
    return folder / "slices"


def make_team(folder: Path) -> Path:
    """Make data with sp.model, and slices of it; return the folder."""
    folder.mkdir(exist_ok=True)
    shutil.copy(SP_MODEL, folder / "made.model")
    model = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(folder / "made.model")]
    assert preprocess(GOLDEN / "texts.jsonl", folder / "web", "--append-eod", *model) == 0
    sliced(folder, folder / "web_text_document")
    return folder


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_team(tmp_path_factory.mktemp("team"))


@pytest.fixture
def team(shared: Path, tmp_path: Path) -> Path:
    """Return a separate copy."""
    return Path(shutil.copytree(shared, tmp_path / "team"))


def plan_of(
    folder: Path, model: Path | str | None = None, kind: str = "SentencePieceTokenizer", **more: Any
) -> Plan:
    """Return a plan of the slices in `folder`; `more` are keys of the file."""
    slices = str(folder / "slices")
    changes: dict[str, Any] = {
        "tokenizer": {"type": kind, "model": str(model or folder / "made.model")},
        "data": {"slices": slices, "valid": f"{slices}/valid"},
        "batch": {"global_batch_size": 8, "micro_batch_size": 2, "seq_length": 16},
        "schedule": {"warmup_steps": 2},
        "versions": [{"name": "v1", "steps": 4}, {"name": "v2", "steps": 4}],
        "output": str(folder / "runs"),
    }
    return plan_with(folder, **changes | more)


def null_plan(folder: Path, size: int, **megatron: Any) -> Plan:
    plan = plan_of(folder, megatron=megatron)
    text = yaml.safe_load(plan.path.read_text())
    text["tokenizer"] = {"type": "NullTokenizer", "vocab_size": size}
    plan.path.write_text(yaml.safe_dump(text, sort_keys=False))
    return load_plan(plan.path)


def smaller_model(path: Path) -> Path:
    """Write the first 500 pieces of the model to `path`."""
    model = parse_model(SP_MODEL.read_bytes())
    del model.pieces[500:]
    path.write_bytes(model.SerializeToString())
    return path


def test_the_record_lists_what_made_the_data(shared: Path) -> None:
    record = json.loads(record_path(shared / "web_text_document").read_text())
    facts = record["tokenizer"]
    assert facts["type"] == "SentencePieceTokenizer"
    assert facts["files"] == {"made.model": hashlib.sha256(SP_MODEL.read_bytes()).hexdigest()}
    assert (facts["vocab_size"], facts["eod"], facts["append_eod"]) == (600, 2, True)
    assert facts["normalization"].startswith("identity")
    size = (GOLDEN / "texts.jsonl").stat().st_size
    files = [{"name": str(GOLDEN / "texts.jsonl"), "bytes": size}]
    assert record["inputs"] == {"count": 1, "bytes": size, "files": files}
    assert record["tool"].startswith("preprocess_data.py (megatron-lrpath")


def test_a_matching_plan_hears_nothing(team: Path) -> None:
    assert tokenizer_problems(plan_of(team)) == tokenizer_problems(plan_of(team, kind="Llama2Tokenizer"))
    assert tokenizer_problems(plan_of(team)).problems == tokenizer_problems(plan_of(team)).notes == ()
    assert Slice.load(team / "slices/v1.slice").sources[0].tokenizer == tokens(team / "web_text_document")


COMMANDS = {
    "plan": ["plan"],
    "run": ["run", "--device", "cpu"],
    "submit": ["submit", "--dry-run"],
    "eval": ["eval"],
    "eval --tasks": ["eval", "--tasks", "paper"],
    "sft": ["sft"],
    "export": ["export"],
}


@pytest.mark.parametrize("command", COMMANDS.values(), ids=COMMANDS)
def test_another_model_of_the_same_size_is_refused_naming_both(
    command: list[str], team: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    monkeypatch.setattr("megatron_lrpath.commands.eval.find_spec", lambda name: name)
    plan = plan_of(team, OTHER_MODEL)
    assert lrpath([command[0], str(plan.path), *command[1:]]) == 2
    said = " ".join("".join(capsys.readouterr()).split())
    assert f"made.model (SentencePieceTokenizer), and {plan.path} names {OTHER_MODEL} (Sent" in said
    assert "both vocabularies have 600 entries, but they differ" in said
    assert "web_text_document" in said
    assert not (team / "runs").exists()


def test_the_doctor_reports_all_three(team: Path, foreign: Path) -> None:
    right, wrong, unknown = (
        made_checks(plan_of(*where))[0] for where in ((team,), (team, OTHER_MODEL), (foreign,))
    )
    assert (right.status, wrong.status, unknown.status) == ("ok", "failed", "info")
    assert "nfkc.model" in wrong.found
    assert "no record" in unknown.found


def test_an_export_is_compared_with_the_tokenizer_that_it_is_given(
    team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lrpath(["export", str(plan_of(team).path), "--tokenizer", str(OTHER_MODEL)]) == 2
    assert f"--tokenizer names {OTHER_MODEL}" in capsys.readouterr().err


@pytest.mark.parametrize("carried", [True, False])
def test_a_smaller_vocabulary_is_refused(carried: bool, team: Path) -> None:
    plan = plan_of(team, smaller_model(team / "small.model"))
    if carried:  # by the slices: the data may be only on the cluster
        record_path(team / "web_text_document").unlink()
    else:  # drawn before there were records
        for path in (team / "slices").glob("*.slice"):
            without_facts(path)
    [problem] = tokenizer_problems(plan).problems
    assert "the vocabularies have 600 and 500 entries" in problem
    assert "made.model" in problem
    assert "small.model" in problem


def without_facts(path: Path) -> None:
    """Write a slice in its form before slices carried facts."""
    one = Slice.load(path)
    for source in one.sources:
        object.__setattr__(source, "tokenizer", None)
    one.save(path)


def test_the_facts_are_no_part_of_a_slices_fingerprint(team: Path) -> None:
    path = team / "slices/v1.slice"
    before, size = Slice.load(path).fingerprint, path.stat().st_size
    without_facts(path)
    assert Slice.load(path).fingerprint == before
    assert path.stat().st_size < size


def test_slices_without_facts_are_the_bytes_that_they_were(tmp_path: Path) -> None:
    prefix = make_lengths_dataset(tmp_path / "data/a", [5, 7, 3, 9])
    made = make_slice(tmp_path / "data/slices/v1.slice", [(prefix, [0, 2], "web")])
    assert made.fingerprint == "ff445b0efb3f23b004a6ad4587b532daceb14a3564c8bc7aa979caf2dbce708d"
    content = (tmp_path / "data/slices/v1.slice").read_bytes()
    assert (
        hashlib.sha256(content).hexdigest()
        == "35fe6b6d27011908aeb351c86dc41309cc5cd7e097b57e615a961acfac4e58ec"
    )


def test_a_tokenizer_that_was_saved_again_is_the_same(tmp_path: Path) -> None:
    folder = tmp_path / "team"
    shutil.copytree(GOLDEN / "hf", folder / "hf")
    assert preprocess(GOLDEN / "texts.jsonl", folder / "web", *HF, str(folder / "hf")) == 0
    sliced(folder, folder / "web_text_document")
    again = folder / "again"
    shutil.copytree(folder / "hf", again)
    content = json.loads((again / "tokenizer.json").read_text())
    (again / "tokenizer.json").write_text(json.dumps(content, sort_keys=True))
    plan = plan_of(folder, again, "HuggingFaceTokenizer")
    assert TokenizerSpec.of_plan(plan).hashes != tokens(folder / "web_text_document")["files"]
    assert tokenizer_problems(plan).problems == ()
    content["model"]["merges"].reverse()
    (again / "tokenizer.json").write_text(json.dumps(content))
    [problem] = tokenizer_problems(plan).problems
    assert "the two tokenizers split texts differently" in problem


def test_a_null_tokenizer_is_its_size_and_its_end(tmp_path: Path) -> None:
    source = write_lines(
        tmp_path / "in.jsonl", [" ".join(map(str, range(first, first + 50))) for first in range(60)]
    )
    assert preprocess(source, tmp_path / "web", *NULL) == 0
    sliced(tmp_path, tmp_path / "web_text_document")
    assert tokenizer_problems(null_plan(tmp_path, 1000)).problems == ()
    assert tokenizer_problems(null_plan(tmp_path, 1000, null_tokenizer_eod_id=999)).problems == ()
    [problem] = tokenizer_problems(null_plan(tmp_path, 900)).problems
    assert "the vocabularies have 1,000 and 900 entries" in problem
    [problem] = tokenizer_problems(null_plan(tmp_path, 1000, null_tokenizer_eod_id=0)).problems
    assert "documents end with the ids 999 and 0" in problem


@pytest.fixture
def foreign(tmp_path: Path) -> Path:
    """Return a folder with slices of a dataset from Megatron-LM's own tool: ids up to 599 and no record."""
    documents = [[*range(30 + number, 70 + number)] for number in range(500)]
    prefix = make_indexed_dataset(tmp_path / "theirs_text_document", [*documents, [599, 2]])
    for name, chosen in (("v1", range(200)), ("v2", range(200, 400)), ("valid", range(400, 501))):
        make_slice(tmp_path / f"slices/{name}.slice", [(prefix, chosen, "web")])
    shutil.copy(SP_MODEL, tmp_path / "made.model")
    return tmp_path


def test_data_without_a_record_are_used_with_one_line(
    foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = plan_of(foreign)
    assert lrpath(["plan", str(plan.path), "--no-curves"]) == 0
    [line] = capsys.readouterr().err.splitlines()
    assert "theirs_text_document: no record of the tokenizer" in line
    assert "20,002 ids, sampled, are in its vocabulary of 600" in line
    options = ["--tokenizer-model", str(foreign / "made.model"), "--record"]
    assert options == re.search(r"PREFIX (.*)", line)[1].split()  # type: ignore[index]
    assert check_dataset.main([str(foreign / "theirs_text_document"), *options]) == 0
    capsys.readouterr()
    assert lrpath(["plan", str(plan.path), "--no-curves"]) == 0
    assert capsys.readouterr().err == ""
    assert "nfkc" in "".join(tokenizer_problems(plan_of(foreign, OTHER_MODEL)).problems)


def test_a_mistyped_folder_of_slices_is_not_made(foreign: Path) -> None:
    data = {"slices": str(foreign / "slcies"), "valid": str(foreign / "slices/valid")}
    assert tokenizer_problems(plan_of(foreign, data=data)).notes
    assert not (foreign / "slcies").exists()


def test_ids_beyond_the_vocabulary_are_refused(foreign: Path) -> None:
    small = smaller_model(foreign / "small.model")
    for _ in range(2):  # the second time from the cache
        [problem] = tokenizer_problems(plan_of(foreign, small)).problems
        assert "theirs_text_document.bin" in problem
        assert "holds the id 599" in problem
        assert "small.model" in problem
        assert "500 entries" in problem
    assert len(list((foreign / "slices/.cache").iterdir())) == 1


def test_what_is_recorded_is_read_in_full_and_never_overwritten(
    foreign: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    prefix, small = str(foreign / "theirs_text_document"), str(smaller_model(foreign / "small.model"))
    assert check_dataset.main([prefix, "--tokenizer-model", small, "--record"]) == 2
    assert "id 5" in capsys.readouterr().err
    assert not record_path(prefix).exists()
    assert check_dataset.main([prefix, "--record", "--vocab-size", "600"]) == 0  # a NullTokenizer
    assert check_dataset.main([prefix, "--tokenizer-model", str(SP_MODEL), "--record"]) == 2
    assert "documents end with the ids 599 and 2" in capsys.readouterr().err
    assert check_dataset.main([prefix, "--record"]) == 2
    assert "--tokenizer-model" in capsys.readouterr().err


def test_where_the_data_are_read_only_the_record_is_next_to_the_slices(
    foreign: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    prefix, slices = foreign / "theirs_text_document", foreign / "slices"
    options = [str(prefix), "--tokenizer-model", str(SP_MODEL)]

    def refused(path: Path, value: Any) -> None:
        raise OSError(30, "Read-only file system", str(path))

    with monkeypatch.context() as patched:
        patched.setattr("megatron_lrpath.data.record.write_sealed", refused)
        assert check_dataset.main([*options, "--record"]) == 2
        assert "--record-in FOLDER" in capsys.readouterr().err
    assert check_dataset.main([*options, "--record-in", str(slices)]) == 0
    assert not record_path(prefix).exists()
    assert tokenizer_problems(plan_of(foreign)) == tokenizer_problems(plan_of(foreign, SP_MODEL))
    assert tokenizer_problems(plan_of(foreign)).notes == ()
    assert tokenizer_problems(plan_of(foreign, OTHER_MODEL)).problems
    answer = call("slice_versions", "--documents", f"v3={prefix}:500-", "--output", foreign / "more")
    assert "nothing records" in answer.stderr
    for path in slices.glob("*.slice"):
        path.unlink()
    answer = call("slice_versions", "--documents", f"v3={prefix}:500-", "--output", slices)
    assert (answer.returncode, answer.stderr) == (0, "duplicates: none in 501 documents\n")
    assert Slice.load(slices / "v3.slice").sources[0].tokenizer is not None


def test_a_mix_and_the_validation_are_compared_too(team: Path) -> None:
    other = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(OTHER_MODEL)]
    assert preprocess(GOLDEN / "texts.jsonl", team / "curated", *other) == 0
    source = f"curated={team / 'curated_text_document'}:0-"
    assert call("slice_versions", "--documents", source, "--output", team / "apart").returncode == 0
    plan = plan_of(team, branch_mix={"slices": {f"{team}/apart/curated": 0.25}})
    [problem] = tokenizer_problems(plan).problems
    assert "curated_text_document" in problem
    assert "apart/curated.slice" in problem
    shutil.copy(team / "apart/curated.slice", team / "held.slice")
    moved = Slice.load(team / "apart/curated.slice")
    Slice("held", 1, moved.sources).save(team / "held.slice")
    plan = plan_of(team, data={"slices": str(team / "slices"), "valid": str(team / "held")})
    assert "held.slice" in tokenizer_problems(plan).problems[0]


def test_different_tokenizers_are_neither_drawn_from_nor_merged(
    team: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", str(OTHER_MODEL)]
    assert preprocess(GOLDEN / "texts.jsonl", team / "other", *other) == 0
    both = [str(team / "web_text_document"), str(team / "other_text_document")]
    capsys.readouterr()
    assert merge_datasets.main(["--input", *both, "--output-prefix", str(team / "merged")]) == 2
    said = capsys.readouterr().err
    assert "made.model" in said
    assert "nfkc.model" in said
    assert not (team / "merged.idx").exists()
    answer = call("slice_versions", "--source", both[1], "--append", "--output", team / "slices")
    assert answer.returncode == 2
    assert "made.model" in answer.stderr
    assert "nfkc.model" in answer.stderr
    assert not (team / "slices/v3.slice").exists()


def test_a_merged_dataset_has_the_record_of_its_parts(team: Path, capsys: pytest.CaptureFixture[str]) -> None:
    parts = [team / "web_text_document", team / "more_text_document"]
    assert (
        preprocess(GOLDEN / "specials.jsonl", team / "more", "--append-eod", "--json-keys", "text", *SP) == 0
    )
    assert merge_datasets.main(["--input", *map(str, parts), "--output-prefix", str(team / "all")]) == 0
    assert tokens(team / "all")["vocabulary"] == tokens(parts[0])["vocabulary"]
    assert tokens(team / "all")["append_eod"] is True
    record_path(parts[1]).unlink()
    capsys.readouterr()
    more = ["--output-prefix", str(team / "all"), "--overwrite"]
    assert merge_datasets.main(["--input", *map(str, parts), *more]) == 0
    assert "more_text_document" in capsys.readouterr().err
    assert not record_path(team / "all").exists()  # the old one is not the new dataset's


def test_a_record_is_never_used_for_another_dataset(team: Path, foreign: Path) -> None:
    shutil.copy(record_path(team / "web_text_document"), record_path(foreign / "theirs_text_document"))
    [problem] = tokenizer_problems(plan_of(foreign)).problems[:1]
    assert "describes another dataset" in problem
    assert "--record" in problem


@pytest.mark.parametrize(
    "content", [b"", b"[]", b"{", b'{"format": 1}', b'{"format": 9}', b"\xff", b"[" * 100_000]
)
def test_a_damaged_record_is_named(content: bytes, foreign: Path) -> None:
    path = record_path(foreign / "theirs_text_document")
    path.write_bytes(content)
    assert str(path) in tokenizer_problems(plan_of(foreign)).problems[0]


def test_what_is_not_there_yet_is_no_contradiction(tmp_path: Path, team: Path) -> None:
    assert tokenizer_problems(plan_of(tmp_path, "no/such/file.model")).problems == ()
    assert tokenizer_problems(plan_of(tmp_path, SP_MODEL)).problems == ()  # no slices
    for path in team.glob("web_*"):
        path.unlink()
    assert tokenizer_problems(plan_of(team)).problems == ()  # the slices still carry the facts
    assert tokenizer_problems(plan_of(team, OTHER_MODEL)).problems


def test_datasets_of_arguments_are_compared_with_their_tokenizer(team: Path) -> None:
    prefix = str(team / "web_text_document")
    assert blend_problems([prefix], TokenizerSpec("Llama2Tokenizer", str(SP_MODEL))).problems == ()
    [problem] = blend_problems([prefix], TokenizerSpec("Llama2Tokenizer", str(OTHER_MODEL))).problems
    assert "nfkc.model" in problem


def test_prepared_chats_record_their_tokenizer(team: Path) -> None:
    write_lines(team / "chat.jsonl", [])
    (team / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations()))
    section = SFT | {"data": str(team / "chat.jsonl")}
    plan = plan_of(team, sft=section)
    prepare(plan)
    assert tokenizer_problems(plan).notes == ()
    other = plan_of(team, OTHER_MODEL, sft=section)
    [note] = tokenizer_problems(other).notes
    assert "--prepare" in note
    with pytest.raises(UserError, match=r"made\.model.*nfkc\.model"):
        open_prepared(other, verify=True)
    shutil.move(team / "made.model", team / "moved.model")
    open_prepared(plan_of(team, team / "moved.model", sft=section), verify=True)


@pytest.mark.parametrize(("size", "dtype"), [(65_499, np.uint16), (65_500, np.int32)])
def test_the_type_of_ids_changes_where_megatrons_does(size: int, dtype: type, tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", [f"1 {size - 1}"])
    options = ["--tokenizer-type", "NullTokenizer", "--vocab-size", str(size), "--append-eod"]
    assert preprocess(source, tmp_path / "out", *options) == 0
    content, _ = pair(tmp_path / "out_text_document")
    assert np.frombuffer(content, dtype=dtype).tolist() == [1, size - 1, size - 1]
    assert check_dataset.main([str(tmp_path / "out_text_document"), "--vocab-size", str(size)]) == 0
    assert check_dataset.main([str(tmp_path / "out_text_document"), "--vocab-size", str(size - 1)]) == 2


def test_prepared_chats_can_be_mixed_with_and_without_a_record(team: Path) -> None:
    (team / "chat.jsonl").write_text("".join(json.dumps(row) + "\n" for row in conversations()))
    plan = plan_of(team, sft=SFT | {"data": str(team / "chat.jsonl")})
    prepare(plan)
    chats = team / "runs/sft/data-1/train_tokens"
    draw = ["--documents", f"chat={chats}:0-", "--output", team / "apart"]
    assert "no hashes of the documents" in call("slice_versions", *draw).stderr
    mixed = plan_of(team, branch_mix={"slices": {f"{team}/apart/chat": 0.25}})
    assert tokenizer_problems(mixed).problems == tokenizer_problems(mixed).notes == ()
    record_path(chats).unlink()
    without_facts(team / "apart/chat.slice")  # prepared before there were records
    assert tokenizer_problems(mixed).problems == ()
    assert len(tokenizer_problems(mixed).notes) == 1
