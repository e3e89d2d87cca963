#!/usr/bin/env python3
"""Train a SentencePiece tokenizer on a random sample of JSON lines or Parquet files.

The same inputs, arguments and seed give the same model, byte for byte.
"""

from __future__ import annotations

import argparse
import heapq
import io
import random
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_lrpath.console import ToolParser, run_tool
from megatron_lrpath.data.preprocess.readers import expand_inputs, none_usable, read_chunks
from megatron_lrpath.data.preprocess.worker import DocumentOptions, Rejected, texts_of
from megatron_lrpath.errors import UserError
from megatron_lrpath.files import atomic_write_bytes, check_prefix

LINE_BYTES = 4096  # SentencePiece skips longer lines
TRAINER_THREADS = 4  # stored in the model, so it must not depend on the machine
SPECIAL = {"unk_id": 0, "bos_id": 1, "eos_id": 2, "pad_id": 3}  # <unk> <s> </s> <pad>; </s> ends a document
TRAINER_OPTIONS = (
    "vocab_size", "model_type", "byte_fallback", "character_coverage", "control_symbols", "user_defined_symbols",
)  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    """Return the parser of the tool's arguments."""
    parser = ToolParser(description=__doc__)
    parser.add_argument("--input", nargs="+", required=True, metavar="FILE", help="as for preprocess_data.py")
    parser.add_argument(
        "--json-keys", nargs="+", default=["text"], metavar="KEY", help="keys (or columns) to take"
    )
    parser.add_argument("--output-prefix", required=True, help="writes PREFIX.model and PREFIX.vocab")
    parser.add_argument(
        "--vocab-size", type=int, default=100_000, help="pieces, special ones included (default: 100000)"
    )
    parser.add_argument("--model-type", choices=["bpe", "unigram"], default="bpe")
    parser.add_argument(
        "--no-byte-fallback",
        dest="byte_fallback",
        action="store_false",
        help="unknown characters become <unk>",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="SHARE",
        help="of the text's characters to know as such (default: 0.9995)",
    )
    parser.add_argument(
        "--sample-bytes",
        type=float,
        default=256e6,
        metavar="N",
        help="bytes of text to train on (default: 256e6)",
    )
    parser.add_argument("--seed", type=int, default=1234, help="draws the sample (default: 1234)")
    parser.add_argument(
        "--normalize", action="store_true", help="NFKC and single spaces; without it text is kept as it is"
    )
    parser.add_argument(
        "--control-symbols",
        nargs="+",
        default=[],
        metavar="PIECE",
        help="more control tokens, which text never becomes",
    )
    parser.add_argument(
        "--user-defined-symbols",
        nargs="+",
        default=[],
        metavar="PIECE",
        help="pieces that are always one token",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace an existing model")
    return parser


def train(args: argparse.Namespace) -> int:
    """Draw the sample, train the model, write it and print a report; return 0."""
    started = time.monotonic()
    _check_arguments(args)
    target = Path(f"{args.output_prefix}.model")
    if target.exists() and not args.overwrite:
        raise UserError(f"{target} exists already; --overwrite replaces it")
    sample = draw_sample(expand_inputs(args.input), args.json_keys, int(args.sample_bytes), args.seed)
    if not sample.texts:
        raise UserError(none_usable(args.input, sample.first_unusable))
    options = {name: getattr(args, name) for name in TRAINER_OPTIONS}
    write_model(args.output_prefix, train_model(sample.texts, args.seed, not args.normalize, **options))
    unusable = f"; {sample.unusable:,} documents were unusable" if sample.unusable else ""
    print(
        f"{target}: {args.vocab_size:,} pieces from {sample.drawn_bytes / 1e6:,.1f} of "
        f"{sample.total_bytes / 1e6:,.1f} MB of text ({sample.documents:,} documents), "
        f"{time.monotonic() - started:.1f} s{unusable}",
        file=sys.stderr,
    )
    return 0


def _check_arguments(args: argparse.Namespace) -> None:
    check_prefix(args.output_prefix)
    for option, value, least, most in (
        ("--vocab-size", args.vocab_size, 1, 2**31 - 1),
        ("--character-coverage", args.character_coverage, 0, 1),
        ("--sample-bytes", args.sample_bytes, 1, sys.maxsize),
        ("--seed", args.seed, 0, 2**32 - 1),
    ):
        if not least <= value <= most:
            raise UserError(f"{option} {value}: must be from {least} to {most}")
    if not all(piece.strip() for piece in (*args.control_symbols, *args.user_defined_symbols)):
        raise UserError("--control-symbols, --user-defined-symbols: a piece is empty")


@dataclass(frozen=True)
class Sample:
    """Drawn texts in input order, what they were drawn from, the number of unusable texts and their first."""

    texts: list[str]
    drawn_bytes: int
    documents: int
    total_bytes: int
    unusable: int
    first_unusable: str


def draw_sample(names: Sequence[str], keys: Sequence[str], limit: int, seed: int) -> Sample:
    """Draw whole texts, all equally likely, until the next would exceed `limit` bytes.

    Each text gets a random number by its position; those with the smallest numbers stay. Memory is bounded
    by the sample.
    """
    options = DocumentOptions(
        tuple(keys), append_eod=False, keep_empty=False, sentence_lists=True, partitions=1
    )
    rng = random.Random(seed)
    heap: list[tuple[float, int, str, int]] = []  # the largest random number first
    held = documents = total = unusable = 0
    first_unusable = ""
    for chunk in read_chunks(names, keys):
        for line, document in enumerate(texts_of(chunk, options), chunk.first):
            if isinstance(document, Rejected):
                first_unusable = first_unusable or f"{chunk.name}:{line}: {document}"
                unusable += 1
                continue
            documents += 1
            for text in (text for texts in document for text in texts):
                size = len(text.encode("utf-8", "ignore"))
                total += size
                held += size
                heapq.heappush(heap, (-rng.random(), total, text, size))
                while held > limit and len(heap) > 1:
                    held -= heapq.heappop(heap)[3]
    texts = [text for _, _, text, _ in sorted(heap, key=lambda entry: entry[1])]
    return Sample(texts, held, documents, total, unusable, first_unusable)


def sentences(texts: Iterable[str]) -> Iterator[str]:
    """Yield the lines of the texts without NULs, long lines cut at spaces, as SentencePiece needs them."""
    for text in texts:
        for line in text.encode("utf-8", "ignore").replace(b"\x00", b"").split(b"\n"):
            start = 0
            while len(line) - start > LINE_BYTES:
                end = line.rfind(b" ", start + 1, start + LINE_BYTES)
                end = end if end > 0 else _character_start(line, start + LINE_BYTES)
                yield line[start:end].decode()
                start = end
            if rest := line[start:].decode():
                yield rest


def _character_start(line: bytes, at: int) -> int:
    """Return the last position up to `at` where a character begins."""
    while line[at] & 0xC0 == 0x80:
        at -= 1
    return at


def train_model(texts: Iterable[str], seed: int, lossless: bool, **options: Any) -> bytes:
    """Train and return the model file's bytes; `options` are SentencePiece's own.

    Without `lossless` the text is normalized (NFKC, single spaces), and decoding does not give it back.

    Raises:
        UserError: SentencePiece refuses, most often because the text is too small for the vocabulary.
    """
    import sentencepiece

    model = io.BytesIO()
    settings: dict[str, Any] = dict(SPECIAL)
    if lossless:
        settings |= {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    sentencepiece.set_random_generator_seed(seed)
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=sentences(texts),
            model_writer=model,
            allow_whitespace_only_pieces=lossless,
            split_digits=lossless,
            num_threads=TRAINER_THREADS,
            max_sentence_length=2 * LINE_BYTES,
            minloglevel=2,
            **settings,
            **options,
        )
    except (RuntimeError, OSError) as error:
        reason = str(error).split("] ")[-1].strip() or str(error).strip()
        raise UserError(f"SentencePiece cannot train this: {reason}") from None
    return model.getvalue()


def write_model(prefix: Path | str, model: bytes) -> None:
    """Write `PREFIX.model` and, for people to read, `PREFIX.vocab` (piece and score)."""
    import sentencepiece

    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    lines = (
        f"{processor.id_to_piece(i)}\t{processor.get_score(i):g}\n" for i in range(processor.get_piece_size())
    )
    atomic_write_bytes(f"{prefix}.vocab", "".join(lines).encode())
    atomic_write_bytes(f"{prefix}.model", model)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the tool; return 0, or 2 for bad input."""
    return run_tool(build_parser(), train, argv)


if __name__ == "__main__":
    sys.exit(main())
