"""JSON within bounds, sealed files, and one rule from a system error to a message."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_lrpath import cli
from megatron_lrpath.errors import message_of
from megatron_lrpath.reading import MAXIMUM_DEPTH, UnreadableError, parse_json, read_json, why
from megatron_lrpath.runs import history
from megatron_lrpath.runs.folder import RunFolder, inspect
from megatron_lrpath.sealed import SEAL, read_sealed, write_sealed

ERRNOS = sorted(errno.errorcode)
REFUSED = {
    "deep": "[" * 200_000 + "]" * 200_000,
    "deep objects": '{"a":' * 5_000 + "1" + "}" * 5_000,
    "a little too deep": "[" * (MAXIMUM_DEPTH + 2) + "]" * (MAXIMUM_DEPTH + 2),
    "a long number": "1" * 100_000,
    "a long fraction": "0." + "1" * 100_000,
    "too large": "1e999",
    "infinity": "[Infinity]",
    "nan": '{"a": NaN}',
    "half a pair": '"\\ud800x"',
    "half a pair as a key": '{"\\udfff": 1}',
    "cut short": '{"a": [1',
    "empty": "",
    "not UTF-8": b'"\xff"',
    "UTF-16": '"a"'.encode("utf-16"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_json_beyond_the_bounds_is_one_sentence(name: str) -> None:
    with pytest.raises(UnreadableError) as caught:
        parse_json(REFUSED[name])
    assert 5 < len(str(caught.value)) < 200


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ('{"a": [1, 2.5, null, true, "ä\\ud83d\\ude00"]}', {"a": [1, 2.5, None, True, "ä😀"]}),
        ("[" * MAXIMUM_DEPTH + "]" * MAXIMUM_DEPTH, None),
        ("1000000000000000019884624838656", 1e30),  # the length without a limit that transformers writes
        (str(2**64 - 1), 2**64 - 1),
        ("\ufeff1", 1),
    ],
)
def test_json_within_the_bounds_is_read(text: str, value: Any) -> None:
    found = parse_json(text.encode())
    assert value is None or found == value
    assert type(found) is type(value) or value is None


def test_a_loss_that_was_no_number_is_one_still() -> None:
    assert math.isnan(parse_json('{"loss": NaN}', own=True)["loss"])
    assert math.isnan(parse_json('{"loss": -Infinity}', own=True)["loss"])


def test_no_more_than_the_bound_is_read(tmp_path: Path) -> None:
    path = tmp_path / "large.json"
    with path.open("wb") as stream:
        stream.truncate(2**40)
    with pytest.raises(UnreadableError, match="more than the"):
        read_json(path)


@given(
    value=st.recursive(st.none() | st.floats() | st.integers() | st.text(), st.lists, max_leaves=9),
    text=st.text(),
)
@settings(max_examples=200, deadline=2000, suppress_health_check=[HealthCheck.too_slow])
def test_every_value_that_is_read_can_be_written(value: Any, text: str) -> None:
    for content in (json.dumps(value), text):
        try:
            found = parse_json(content)
        except UnreadableError as error:
            message = why(error)
        else:
            message = json.dumps(found, ensure_ascii=False, allow_nan=False)
        assert message.encode()


@pytest.mark.parametrize("number", ERRNOS, ids=[errno.errorcode[number] for number in ERRNOS])
def test_every_error_of_the_system_gives_one_message(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command line prints no stack trace but a remedy, with and without a file's name."""
    if number in (errno.EPIPE, errno.ESHUTDOWN):
        return  # the reader of the output is gone
    for name in ("/data/runs/result.json", None):
        error = OSError(number, os.strerror(number), name) if name else OSError(number, os.strerror(number))

        def broken(*_: Any, error: OSError = error, **__: Any) -> None:
            raise error

        monkeypatch.setattr("megatron_lrpath.commands.status.execute", broken)
        status = cli.main(["status", "plan.yaml"])
        said = capsys.readouterr().err
        assert status in (1, 2)
        assert said.count("\n") == 1
        assert os.strerror(number) in said
        assert message_of(error).rstrip().endswith(".")
    passing = {errno.EIO, errno.ESTALE, errno.ETIMEDOUT, errno.EAGAIN, errno.ENOMEM, errno.EMFILE}
    assert number not in passing or status == 1
    assert number not in {errno.ENAMETOOLONG, errno.ENOENT, errno.EACCES, errno.EISDIR} or status == 2


def test_a_librarys_own_text_is_kept() -> None:
    assert message_of(OSError("the tokenizer is not there")) == "the tokenizer is not there"


def test_names_that_no_file_system_takes_are_a_message(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("a" * 300 + ".yaml", "a\0b", "plan.yaml/x", "/dev/null/x", "."):
        assert cli.main(["status", name]) in (1, 2)
        assert capsys.readouterr().err.startswith("lrpath: error: ")


def test_a_sealed_file_is_what_was_written_or_refused(tmp_path: Path) -> None:
    path = tmp_path / "result.json"
    value = {"step": 12, "loss": 3.25, "by step": {"3": [1, None, "ä"]}}
    write_sealed(path, value)
    content = path.read_bytes()
    assert read_sealed(path) == (value, True)
    for byte in range(len(content)):
        path.write_bytes(content[:byte] + bytes([content[byte] ^ 4]) + content[byte + 1 :])
        try:
            found, _ = read_sealed(path)
        except ValueError:
            continue
        assert {
            name: one for name, one in found.items() if name in value
        } == value  # the mutation hit the seal's own name


def test_a_file_of_before_is_read_unverified(tmp_path: Path) -> None:
    path = RunFolder(tmp_path).result
    path.write_text('{"step": 12}')
    assert read_sealed(path) == ({"step": 12}, False)
    assert inspect(tmp_path) == ([], ["result.json"])
    path.write_text(json.dumps({"step": 12, SEAL: "0" * 64}))
    assert inspect(tmp_path) == (
        ["result.json cannot be read (damaged: its content does not match its checksum)"],
        [],
    )


def test_a_changed_line_of_a_history_is_left_out_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    writer = history.HistoryWriter(tmp_path, 0)
    for step in range(1, 6):
        writer.append({"step": step, "loss": 3.0 + step})
    writer.sync()
    path = RunFolder(tmp_path).history
    lines = path.read_bytes().splitlines(keepends=True)
    for number in (1, 4):
        lines[number] = lines[number].replace(b'"loss": ', b'"loss": 1')
    path.write_bytes(b"".join(lines))
    found = history.read_history(tmp_path)
    assert (found.steps.tolist(), found.unreadable) == ([1, 3, 4], 2)
    path.write_bytes(b"".join(lines)[:-9])  # a torn line is expected of a running training
    assert history.read_history(tmp_path).unreadable == 1
    path.write_bytes(b"".join(lines))
    history.drop_steps_after(path, 9)
    assert "2 lines cannot be read" in capsys.readouterr().err
    assert history.read_history(tmp_path).unreadable == 0


def test_lines_of_before_are_read(tmp_path: Path) -> None:
    RunFolder(tmp_path).history.write_text('{"step": 1, "loss": 4.5}\n{"step": 2, "loss": NaN}\n')
    found = history.read_history(tmp_path)
    assert found.steps.tolist() == [1, 2]
    assert math.isnan(found["loss"][1])
