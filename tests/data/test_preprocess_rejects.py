"""Bad documents are counted, listed by file and line, and fail the run unless they are allowed."""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest

from megatron_lrpath.data.preprocess import readers
from tests.support.preprocess_fixtures import NULL, SP, documents, left_behind, preprocess, write_lines

GOOD = b'{"text": "1 2"}'
BAD = {
    b'{"text": "1 2"': "not JSON",
    b"[1, 2]": "the line is a list, not an object",
    b"null": "the line is null, not an object",
    b'{"body": "1"}': "no key 'text'",
    b'{"text": 5}': "'text' is a number, not a string",
    b'{"text": null}': "'text' is null, not a string",
    b'{"text": true}': "'text' is true or false, not a string",
    b'{"text": ["1", "2"]}': "'text' is a list, not a string",
    b'{"text": {"a": 1}}': "'text' is an object, not a string",
    b'{"text": "\xff\xfe"}': "invalid UTF-8 at byte 11",
    b'{"text": "\xed\xa0\x80"}': "invalid UTF-8",
    b'{"text": "\xf0\x9f\x98"}': "invalid UTF-8",
    b'{"text": "1"} {"text": "2"}': "not JSON: Extra data",
    b'{"text": "a\x00b"}': "not JSON",
    b"\x00\x00\x00": "not JSON",
    b"[" * 100_000: "not JSON",
    b'{"text": "1", "n": ' + b"9" * 5000 + b"}": "not JSON",
    b'{"text": "1 x"}': "'text': NullTokenizer expects integers",
    b'{"text": "1 1000"}': "'text': token id 1000 is outside the vocabulary",
    b'{"text": "-1"}': "'text': token id -1 is outside the vocabulary",
}


def rejects(prefix: Path) -> list[str]:
    """Return the lines of the reject file."""
    return Path(f"{prefix}.rejects").read_text().splitlines()


@pytest.mark.parametrize("bad", BAD, ids=lambda bad: repr(bad[:24]))
def test_one_bad_line_fails_the_run_and_is_listed(
    bad: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_bytes(b"\n".join([GOOD, GOOD, bad, GOOD]) + b"\n")
    assert preprocess(source, out, *NULL) == 2
    assert len(rejects(out)) == 1
    assert rejects(out)[0].startswith(f"{source}:3: {BAD[bad]}")
    answer = capsys.readouterr().err
    assert "1 of 4 documents were rejected" in answer
    assert f"{source}:3: " in answer
    assert "--max-rejects 1" in answer
    assert not list(tmp_path.glob("*_document*"))
    assert left_behind(tmp_path) == []


def test_allowed_rejects_leave_the_rest(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    lines = [GOOD] + [line for bad in BAD for line in (bad, GOOD)]
    source.write_bytes(b"\n".join(lines))
    assert preprocess(source, out, *NULL, "--max-rejects", str(len(BAD)), "--workers", "2") == 0
    assert documents(f"{out}_text_document") == [[1, 2]] * (len(BAD) + 1)
    numbers = [int(line.removeprefix(f"{source}:").split(":")[0]) for line in rejects(out)]
    assert numbers == list(range(2, 2 * len(BAD) + 1, 2))
    assert f"{len(BAD)} rejected" in capsys.readouterr().err
    assert preprocess(source, tmp_path / "again", *NULL, "--max-rejects", str(len(BAD) - 1)) == 2


def test_a_run_without_rejects_removes_an_old_list(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_bytes(b"x\n")
    assert preprocess(source, out, *NULL) == 2
    assert rejects(out)
    source.write_bytes(GOOD)
    assert preprocess(source, out, *NULL) == 0
    assert not Path(f"{out}.rejects").exists()


def test_a_wrong_key_is_no_reason_to_allow_rejects(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in.jsonl"
    source.write_bytes(GOOD + b"\n" + GOOD + b"\n")
    assert preprocess(source, tmp_path / "out", *NULL, "--json-keys", "txt") == 2
    answer = capsys.readouterr().err
    assert f"{source}:1: no key 'txt', it has 'text'" in answer
    assert "--json-keys names another key" in answer
    assert "--max-rejects 2" not in answer


def test_nothing_but_rejects_is_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["x", "y"])
    assert preprocess(source, tmp_path / "out", *NULL, "--max-rejects", "2") == 2
    answer = capsys.readouterr().err
    assert "no usable documents" in answer
    assert f"the first is\n  {source}:1: " in answer
    assert "lrpath docs data" in answer
    assert not list(tmp_path.glob("*document*"))


def test_all_keys_of_a_document_go_or_stay_together(tmp_path: Path) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    rows = [
        {"a": "1", "b": "2"},
        {"a": "3", "b": "x"},
        {"a": "", "b": "4"},
        {"a": "", "b": "x"},
        {"a": "5", "b": "6"},
    ]
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert preprocess(source, out, *NULL, "--json-keys", "a", "b", "--max-rejects", "2") == 0
    assert documents(f"{out}_a_document") == [[1], [5]]
    assert documents(f"{out}_b_document") == [[2], [6]]


def test_numbers_of_lines_over_several_files(tmp_path: Path) -> None:
    one, two = tmp_path / "one.jsonl", tmp_path / "two.jsonl"
    one.write_bytes(GOOD + b"\n" + b"?\n")
    two.write_bytes(b"?\n" + GOOD)
    assert preprocess([one, two], tmp_path / "out", *NULL, "--max-rejects", "2") == 0
    assert [line.rsplit(": not", 1)[0] for line in rejects(tmp_path / "out")] == [f"{one}:2", f"{two}:1"]


def test_rows_of_parquet(tmp_path: Path) -> None:
    values = [b"1", None, b"", b"\xff", b"2"]
    path = tmp_path / "in.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"text": pyarrow.array(values, pyarrow.binary())}), path)
    assert preprocess(path, tmp_path / "out", *NULL, "--max-rejects", "2") == 0
    assert documents(tmp_path / "out_text_document") == [[1], [2]]
    starts = [f"{path}:2: 'text' is null", f"{path}:4: invalid UTF-8"]
    for line, start in zip(rejects(tmp_path / "out"), starts, strict=True):
        assert line.startswith(start)


def test_half_a_surrogate_pair_is_rejected(tmp_path: Path) -> None:
    source = tmp_path / "in.jsonl"
    source.write_text('{"text": "fine"}\n{"text": "\\ud800"}\n{"text": "also fine"}\n')
    assert preprocess(source, tmp_path / "out", *SP, "--max-rejects", "1") == 0
    assert "surrogate" in rejects(tmp_path / "out")[0]
    assert len(documents(tmp_path / "out_text_document")) == 2


def test_empty_documents_are_kept_when_asked_for(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["", "a", ""])
    assert preprocess(source, tmp_path / "out", *SP, "--append-eod", "--keep-empty") == 0
    found = documents(tmp_path / "out_text_document")
    assert [len(one) > 0 for one in found] == [False, True, False]
    assert found[1][-1] == 2  # </s>


@pytest.mark.parametrize("blank", [b"", b"  ", b'{"text": ""}'])
def test_what_has_no_text_is_passed_over_and_counted(
    blank: bytes, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_bytes(b"\n".join([GOOD, blank, GOOD, blank]) + b"\n")
    assert preprocess(source, out, *NULL) == 0
    assert documents(f"{out}_text_document") == [[1, 2], [1, 2]]
    assert not Path(f"{out}.rejects").exists()
    assert "; 2 without text passed over" in capsys.readouterr().err


def test_nothing_but_empty_texts_is_no_dataset(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["", ""])
    assert preprocess(source, tmp_path / "out", *NULL) == 2
    assert "2 lines or rows, none with a text" in capsys.readouterr().err


def test_a_text_of_which_the_tokenizer_makes_nothing_is_empty(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["a", "  "])
    model = [word.replace("sp.model", "nfkc.model") for word in SP]
    assert preprocess(source, tmp_path / "out", *model) == 0
    assert "; 1 without text passed over" in capsys.readouterr().err
    assert len(documents(tmp_path / "out_text_document")) == 1


def test_one_reject_too_many_ends_the_run_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(readers, "CHUNK_BYTES", 1000)
    monkeypatch.setattr(readers, "READ_BYTES", 1000)
    source, out = tmp_path / "in.jsonl", tmp_path / "out"
    source.write_bytes(b"x\ny\n" + (GOOD + b"\n") * 20_000)
    assert preprocess(source, out, *NULL, "--max-rejects", "1") == 2
    answer = capsys.readouterr().err
    assert "2 of 20,002" not in answer
    assert "reading stopped there" in answer
    assert len(rejects(out)) == 2
    assert left_behind(tmp_path) == []


def test_a_file_that_is_nearly_all_unusable_fails_at_any_allowance(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good, bad = write_lines(tmp_path / "good.jsonl", ["1"] * 500), tmp_path / "bad.jsonl"
    bad.write_bytes(b"<p>a line</p>\n" * 99 + GOOD)
    for sources in ([good, bad], [bad, good]):
        assert preprocess(sources, tmp_path / "out", *NULL, "--max-rejects", "1000") == 2
        assert f"{bad}: 99 of 100 documents are unusable" in capsys.readouterr().err
    bad.write_bytes(b"<p>a line</p>\n" * 90 + (GOOD + b"\n") * 10)
    assert preprocess([good, bad], tmp_path / "out", *NULL, "--max-rejects", "1000") == 0
