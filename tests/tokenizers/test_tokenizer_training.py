"""A tokenizer is the same for the same inputs and seed, loses nothing, and has what training needs."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st

from megatron_lrpath.tokenizers.encoders import SentencePieceEncoder
from tests.golden.make import PARAGRAPHS
from tests.support.preprocess_fixtures import GOLDEN, call, write_lines
from tools import train_tokenizer
from tools.train_tokenizer import LINE_BYTES, draw_sample, sentences

SOURCE = GOLDEN / "texts.jsonl"


def train(source: Path, prefix: Path, *more: str) -> bytes:
    """Call the tool in this process; return the model's bytes."""
    arguments = ["--input", str(source), "--output-prefix", str(prefix), "--vocab-size", "600", *more]
    assert train_tokenizer.main(arguments) == 0
    return Path(f"{prefix}.model").read_bytes()


def load(path: Path) -> Any:
    return sentencepiece.SentencePieceProcessor(model_file=str(path))


def test_the_same_inputs_and_seed_give_the_same_bytes(tmp_path: Path) -> None:
    packed = tmp_path / "texts.gz"
    packed.write_bytes(gzip.compress(SOURCE.read_bytes()))
    sampled = ["--sample-bytes", "30000", "--vocab-size", "500"]
    first = train(SOURCE, tmp_path / "one", *sampled)
    assert train(packed, tmp_path / "elsewhere" / "two", *sampled) == first
    assert train(SOURCE, tmp_path / "three", *sampled, "--seed", "5") != first


def test_in_another_process_too(tmp_path: Path) -> None:
    here = train(SOURCE, tmp_path / "here")
    prefix = tmp_path / "there"
    answer = call("train_tokenizer", "--input", SOURCE, "--output-prefix", prefix, "--vocab-size", 600)
    assert answer.returncode == 0, answer.stderr
    assert Path(f"{prefix}.model").read_bytes() == here == (GOLDEN / "sp.model").read_bytes()


@settings(max_examples=200, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])) | st.sampled_from(PARAGRAPHS))
def test_decoding_gives_the_text_back(text: str) -> None:
    model = load(GOLDEN / "sp.model")
    if "\u2581" not in text:  # SentencePiece's own sign for a space
        assert model.decode(model.encode(text)) == text


def test_the_special_tokens_that_training_needs() -> None:
    model = load(GOLDEN / "sp.model")
    assert [model.id_to_piece(i) for i in range(4)] == ["<unk>", "<s>", "</s>", "<pad>"]
    assert (model.eos_id(), model.pad_id(), model.get_piece_size()) == (2, 3, 600)
    assert SentencePieceEncoder(str(GOLDEN / "sp.model"), exact_only=False).fast is not None


def test_extra_symbols(tmp_path: Path) -> None:
    train(SOURCE, tmp_path / "m", "--control-symbols", "<call>", "--user-defined-symbols", "<sep>")
    model = load(tmp_path / "m.model")
    assert model.is_control(model.piece_to_id("<call>"))
    assert model.piece_to_id("<call>") not in model.encode("a<call>b")
    assert model.piece_to_id("<sep>") in model.encode("a<sep>b")


def test_the_vocabulary_file_lists_the_pieces(tmp_path: Path) -> None:
    train(SOURCE, tmp_path / "m")
    lines = (tmp_path / "m.vocab").read_text("utf-8").split("\n")
    assert lines[0] == "<unk>\t0"
    assert len(lines) == 601


def test_an_existing_model_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(SOURCE, tmp_path / "m")
    arguments = ["--input", str(SOURCE), "--output-prefix", str(tmp_path / "m"), "--vocab-size", "500"]
    assert train_tokenizer.main(arguments) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert load(tmp_path / "m.model").get_piece_size() == 600


def test_too_little_text_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = write_lines(tmp_path / "in", ["a b c"])
    assert train_tokenizer.main(["--input", str(source), "--output-prefix", str(tmp_path / "m")]) == 2
    assert "SentencePiece cannot train this" in capsys.readouterr().err
    plain = tmp_path / "plain.txt"
    plain.write_text("It was a dark night.\n")
    assert train_tokenizer.main(["--input", str(plain), "--output-prefix", str(tmp_path / "m")]) == 2
    assert f"{plain}:1: not JSON" in capsys.readouterr().err
    none = write_lines(tmp_path / "none", [])
    assert train_tokenizer.main(["--input", str(none), "--output-prefix", str(tmp_path / "m")]) == 2
    assert "no usable documents" in capsys.readouterr().err
    assert list(tmp_path.glob("m*")) == []


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--vocab-size", "0"], "--vocab-size 0: must be from 1 to"),
        (["--character-coverage", "nan"], "--character-coverage nan: must be from 0 to 1"),
        (["--sample-bytes", "inf"], "--sample-bytes inf: must be from 1 to"),
        (["--seed", "-1"], "--seed -1: must be from 0 to"),
        (["--user-defined-symbols", "", "x"], "a piece is empty"),
        (["--output-prefix", "models/"], "add the beginning of the files' names"),
    ],
)
def test_values_that_cannot_be_are_refused(
    words: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--input", str(GOLDEN / "texts.jsonl"), "--output-prefix", str(tmp_path / "m"), *words]
    assert train_tokenizer.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert said in error


def test_unusable_documents_are_passed_over_and_counted(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = tmp_path / "in"
    source.write_bytes(SOURCE.read_bytes() + b'{"text": 5}\nnonsense\n')
    train(source, tmp_path / "m")
    assert "2 documents were unusable" in capsys.readouterr().err


def test_a_sample_is_bounded_in_input_order_and_fair(tmp_path: Path) -> None:
    texts = [f"{i:06d}" + "x" * (i % 50) for i in range(3000)]
    source = write_lines(tmp_path / "in", texts)
    whole = draw_sample([str(source)], ["text"], 10**9, seed=1)
    assert whole.texts == texts
    assert (whole.documents, whole.drawn_bytes) == (3000, whole.total_bytes)
    part = draw_sample([str(source)], ["text"], 30_000, seed=1)
    assert part.texts == sorted(part.texts)
    assert 29_900 < part.drawn_bytes <= 30_000
    assert abs(sum(int(text[:6]) for text in part.texts) / len(part.texts) - 1500) < 150
    assert draw_sample([str(source)], ["text"], 30_000, seed=2).texts != part.texts


@settings(deadline=None)
@example(text="0\x00\U00010000", times=2000)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=50), times=st.integers(1, 200))
def test_sentences_lose_nothing_and_are_short(text: str, times: int) -> None:
    pieces = list(sentences([text * times]))
    assert "".join(pieces) == (text * times).replace("\n", "").replace("\x00", "")
    assert all(len(piece.encode()) <= LINE_BYTES for piece in pieces)
