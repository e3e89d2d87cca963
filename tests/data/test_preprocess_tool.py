"""The preprocessing tool as a command: fast to start, with clear errors, with constant memory."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.preprocess_fixtures import (
    GOLDEN,
    NULL,
    ROOT,
    SP,
    command,
    environment,
    preprocess,
    write_lines,
)

TOOLS = ["preprocess_data", "train_tokenizer", "check_dataset", "merge_datasets"]
LARGE = {"torch", "megatron", "transformers", "tokenizers", "sentencepiece", "pyarrow", "matplotlib", "scipy"}


@pytest.mark.parametrize("tool", TOOLS)
def test_help_imports_none_of_the_large_libraries(tool: str) -> None:
    line = command(tool, "--help")
    line[1:1] = ["-X", "importtime"]
    answer = subprocess.run(line, env=environment(), capture_output=True, text=True, check=True)
    assert "usage:" in answer.stdout
    imported = {row.rpartition("|")[2].strip().partition(".")[0] for row in answer.stderr.splitlines()}
    assert "argparse" in imported
    assert not imported & LARGE


def test_sentencepiece_needs_neither_torch_nor_megatron(tmp_path: Path) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["some text"])
    program = (
        "import sys; from tools import preprocess_data as tool; tool.main(sys.argv[1:]);"
        "print([name for name in ('torch', 'megatron', 'transformers') if name in sys.modules])"
    )
    arguments = ["--input", str(source), "--output-prefix", str(tmp_path / "out"), *SP]
    answer = subprocess.run(
        [sys.executable, "-c", program, *arguments], cwd=ROOT, capture_output=True, text=True, check=True,
        env=environment(),
    )  # fmt: skip
    assert answer.stdout.strip() == "[]"


MODEL = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model"]
REFUSED = [
    ([*MODEL, "nothing.model"], "nothing.model: No such file"),
    ([*MODEL, str(GOLDEN / "texts.jsonl")], "not a SentencePiece model"),
    (["--tokenizer-type", "SentencePieceTokenizer"], "needs --tokenizer-model"),
    (["--tokenizer-type", "NullTokenizer"], "needs --vocab-size"),
    ([*NULL, "--workers", "0"], "--workers must be at least 1"),
    ([*NULL, "--max-rejects", "-1"], "--max-rejects must be at least 0"),
    ([*NULL, "--output-prefix", "out/"], "add the beginning of the files' names"),
    (["--tokenizer-type", "NullTokenizer", "--vocab-size", "-5"], "needs --vocab-size, at least 1"),
    (
        ["--tokenizer-type", "TikTokenizer", "--tokenizer-model", str(GOLDEN / "sp.model")],
        "sp.model: Megatron cannot load it (AssertionError)",
    ),
    ([*NULL, "--json-keys", "text", "text"], "named twice"),
    ([*NULL, "--split-sentences"], "--sentence-lists"),
    ([*NULL, "--find-optimal-num-workers"], "as many --workers"),
]


@pytest.mark.parametrize(("arguments", "word"), REFUSED)
def test_unusable_arguments_are_refused_with_a_reason(
    arguments: list[str], word: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["1"])
    assert preprocess(source, tmp_path / "out", *arguments) == 2
    said = capsys.readouterr().err
    assert said.splitlines()[-1].startswith("error: ")  # after Megatron's warnings, where it is imported
    assert word in said
    assert not list(tmp_path.glob("out*"))


def test_append_eod_needs_a_token_for_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    import sentencepiece

    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["a b c d e f"] * 9), model_prefix=str(tmp_path / "m"), vocab_size=300,
        model_type="bpe", byte_fallback=True, eos_id=-1, hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    source = write_lines(tmp_path / "in.jsonl", ["a"])
    arguments = [*MODEL, str(tmp_path / "m.model")]
    assert preprocess(source, tmp_path / "out", *arguments, "--append-eod") == 2
    assert "no end-of-document token" in capsys.readouterr().err
    assert preprocess(source, tmp_path / "out", *arguments) == 0


def test_an_unwritable_place_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["1"])
    assert preprocess(source, source / "out", *NULL) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert "in.jsonl" in said


def test_the_notice_of_a_slower_way_is_shown(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in.jsonl", ["a"])
    assert preprocess(source, tmp_path / "out", *SP, "--exact-tokenizer") == 0
    assert "tokenizing with SentencePiece, as requested" in capsys.readouterr().err


@pytest.mark.slow
def test_memory_does_not_grow_with_the_input(tmp_path: Path) -> None:
    peaks = []
    for thousands in (20, 200):
        program = f"for _ in range({thousands * 1000}): print('{{\"text\": \"' + '7 ' * 50 + '7\"}}')"
        line = command(
            "preprocess_data", "--input", "-", *NULL, "--output-prefix", tmp_path / f"out{thousands}"
        )
        source = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        process = subprocess.Popen(line, stdin=source.stdout, env=environment(), stderr=subprocess.DEVNULL)
        peak = 0
        while process.poll() is None:
            status = Path(f"/proc/{process.pid}/status").read_text()
            found = re.search(r"VmHWM:\s+(\d+)", status)
            peak = int(found[1]) if found else peak
            time.sleep(0.02)
        source.wait()
        assert process.returncode == 0
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 20_000  # kilobytes, for ten times the documents
