"""The identity of a tokenizer: the hashes of its files, its vocabulary, and its ids for probe texts."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from megatron_lrpath.errors import UserError
from megatron_lrpath.plan import Plan
from megatron_lrpath.reading import read_json
from megatron_lrpath.tokenizers.files import HUGGING_FACE, NO_TOKENIZER, open_hugging_face
from megatron_lrpath.tokenizers.sentencepiece_model import (
    NASTY,
    SENTENCEPIECE,
    SPACE,
    open_model,
    parse_model,
)

type Facts = dict[str, Any]
"""JSON-serializable facts of a tokenizer, see `TokenizerSpec.facts`; unknown facts are kept."""

# The files of a Hugging Face tokenizer's folder that its ids depend on; a chat template is not among them.
ID_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "*.tiktoken", "*.py",
)  # fmt: skip
PROSE = (
    "The quick brown fox jumps over the lazy dog, twice; then it isn't seen again.",
    "In 1998, 3,141 parcels (92.65%) were delivered to Zürich, São Paulo and Kraków for $12.50 each.",
    "for (int i = 0; i < n; ++i) {\n\ttotal += values[i] * 0x1F;  // overflow?\n}",
    "Съешь же ещё этих мягких французских булок, да выпей чаю.",
    "今天天气很好，我们去公园散步吧。東京は日本の首都です。",
    "antidisestablishmentarianism unbelievably re-evaluated https://example.org/a_b?c=d#e",
)
HUB_NAME = r"\w[\w.-]*(/\w[\w.-]*)?"
PIECES_OF_PROBES, PIECES_IN_PROBE = 2048, 8
PROBE_TEXTS = hashlib.sha256("\x00".join([*NASTY, *PROSE]).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Opened:
    """A loaded tokenizer: `pieces` by id, end-of-document token, normalization, and the function that splits
    a text.
    """

    pieces: Mapping[str, int]
    eod: int | None
    normalization: str
    encode: Callable[[str], Sequence[int]]

    @property
    def vocab_size(self) -> int:
        """The largest id plus one."""
        return max(self.pieces.values(), default=-1) + 1

    def facts(self) -> Facts:
        """Return a digest that equal tokenizers share, regardless of their files."""
        listed = sorted((number, piece) for piece, number in self.pieces.items())
        vocabulary = hashlib.sha256(json.dumps(listed).encode())
        probes = hashlib.sha256()
        for text in self._probe_texts([piece for _, piece in listed]):
            probes.update(json.dumps(list(map(int, self.encode(text)))).encode())
        return {
            "vocab_size": self.vocab_size,
            "eod": self.eod,
            "normalization": self.normalization,
            "vocabulary": vocabulary.hexdigest(),
            "probes": probes.hexdigest(),
            "probe_texts": PROBE_TEXTS,
        }

    def _probe_texts(self, pieces: Sequence[str]) -> Iterator[str]:
        """Yield fixed texts, then texts of pieces from all parts of the vocabulary."""
        yield from NASTY
        yield from PROSE
        chosen = pieces[:: max(1, len(pieces) // PIECES_OF_PROBES)]
        for start in range(0, len(chosen), PIECES_IN_PROBE):
            joined = "".join(chosen[start : start + PIECES_IN_PROBE])
            yield joined.replace(SPACE, " ").replace("Ġ", " ")


@dataclass(frozen=True)
class TokenizerSpec:
    """A tokenizer as named by arguments or a plan; `eod` is NullTokenizer's, `files` are additional ones
    (merges).
    """

    kind: str
    model: str | None = None
    vocab_size: int | None = None
    eod: int | None = None
    special_tokens: tuple[str, ...] = ()
    files: tuple[str, ...] = ()

    @classmethod
    def of_plan(cls, plan: Plan) -> TokenizerSpec:
        """Return the tokenizer that a plan's runs train with."""
        more = plan.megatron
        tokens = more.get("tokenizer_special_tokens") or more.get("special_tokens") or ()
        files = tuple(str(more[name]) for name in ("vocab_file", "merge_file") if more.get(name))
        own = plan.tokenizer
        return cls(
            own.type, own.model, own.vocab_size, more.get("null_tokenizer_eod_id"), tuple(tokens), files
        )

    @classmethod
    def of_arguments(cls, args: Any) -> TokenizerSpec:
        """Return the tokenizer in Megatron's arguments, or in those of preprocess_data.py."""
        named = (getattr(args, name, None) for name in ("vocab_file", "merge_file"))
        return cls(
            args.tokenizer_type,
            getattr(args, "tokenizer_model", None),
            getattr(args, "vocab_size", None),
            getattr(args, "null_tokenizer_eod_id", None),
            tuple(getattr(args, "special_tokens", None) or ()),
            tuple(name for name in named if name),
        )

    @property
    def label(self) -> str:
        """`data/tokenizer.model (SentencePieceTokenizer)`."""
        return label({"type": self.kind, "model": self.model, "vocab_size": self.vocab_size})

    @property
    def is_null(self) -> bool:
        """Return whether texts are already token ids."""
        return self.kind == NO_TOKENIZER

    @property
    def is_missing(self) -> bool:
        """Return whether its named file is missing, so that it cannot be compared yet."""
        return bool(self.model) and not self.is_named and not Path(str(self.model)).exists()

    @property
    def is_named(self) -> bool:
        """Return whether it can be a name on a hub (`owner/name`), because there is no such local file."""
        name = self.model or "/"
        return (
            self.kind == HUGGING_FACE and not Path(name).exists() and re.fullmatch(HUB_NAME, name) is not None
        )

    @cached_property
    def hashes(self) -> dict[str, str]:
        """Return the SHA-256 of the files that its ids depend on, by name; empty for a name on a hub."""
        place = Path(self.model or "")
        paths = [Path(name) for name in self.files]
        if self.model and place.is_dir():
            paths += sorted({path for pattern in ID_FILES for path in place.glob(pattern)})
        elif self.model:
            paths.append(place)
        found = {}
        for path in paths:
            if path.is_file():
                with path.open("rb") as stream:
                    found[path.name] = hashlib.file_digest(stream, "sha256").hexdigest()
        return found

    @cached_property
    def described(self) -> Facts:
        """Return the facts known without opening it: type, model, files, added special tokens."""
        more = {"special_tokens": list(self.special_tokens)} if self.special_tokens else {}
        return {"type": self.kind, "model": self.model, "files": self.hashes, **more}

    @cached_property
    def opened(self) -> Opened | None:
        """The loaded tokenizer; None for types that only Megatron opens. Raise UserError if it cannot be
        opened.
        """
        if self.kind in SENTENCEPIECE and self.model:
            return open_sentencepiece(self.model)
        if self.kind == HUGGING_FACE and self.model:
            return open_fast(self.model)
        return None

    @cached_property
    def facts(self) -> Facts:
        """Return all known facts. Raise UserError if it cannot be opened."""
        if self.is_null:
            size = self.vocab_size or 0
            return self.described | {"vocab_size": size, "eod": size - 1 if self.eod is None else self.eod}
        opened = self.opened
        return self.described | ({"vocab_size": self.vocab_size} if opened is None else opened.facts())

    @property
    def size(self) -> int | None:
        """The exclusive upper bound of ids; None if it is unknown without Megatron."""
        if self.is_null:
            return self.vocab_size
        opened = self.opened
        if opened is None:
            return self.vocab_size
        return opened.vocab_size + sum(token not in opened.pieces for token in self.special_tokens)

    def difference(self, made: Facts) -> str | None:
        """Return how this tokenizer differs from the one with the facts `made`; None if ids mean the same to
        both.

        It is not opened if the files are equal. Raise UserError if it must be opened and cannot be.
        """
        return None if same_files(made, self.described) else facts_differ(made, self.facts)


def facts_differ(made: Facts, own: Facts) -> str | None:
    """Return how two tokenizers differ; None if ids mean the same to both.

    Equal files are sufficient. Otherwise vocabulary and probe texts are compared: a re-saved tokenizer is
    the same one. NullTokenizer, on either side, is compared by vocabulary size and end-of-document.
    """
    if NO_TOKENIZER in (made["type"], own["type"]):
        return sizes_differ(made, own) or end_differs(made, own)
    if (made.get("special_tokens") or []) != (own.get("special_tokens") or []):
        return "the added special tokens differ"
    if same_files(made, own):
        return None
    if not made.get("vocabulary") or not own.get("vocabulary"):
        other = "the types differ" if family(made["type"]) != family(own["type"]) else "the files differ"
        return sizes_differ(made, own) or f"{other}, and cannot be compared by their vocabularies"
    return sizes_differ(made, own) or content_differs(made, own)


def same_files(made: Facts, own: Facts) -> bool:
    """Return whether both have one type and files with the same content, or one name on a hub."""
    if family(made["type"]) != family(own["type"]) or made["type"] == NO_TOKENIZER:
        return False
    if (made.get("special_tokens") or []) != (own.get("special_tokens") or []):
        return False
    theirs, ours = made.get("files") or {}, own.get("files") or {}
    if not theirs and not ours:
        return bool(made.get("model") == own.get("model"))
    if len(theirs) == len(ours) == 1:  # the file can have another name
        return [*theirs.values()] == [*ours.values()]
    return bool(theirs == ours)


def check_facts(facts: Any) -> Facts:
    """Parse the facts of a tokenizer in a file; raise ValueError or TypeError if they are malformed."""
    if not isinstance(facts, dict) or not isinstance(facts.get("type"), str):
        raise ValueError("no tokenizer")
    for name in ("vocab_size", "eod"):
        if facts.get(name) is not None and type(facts[name]) is not int:
            raise ValueError(name)
    return facts


def family(kind: str) -> str:
    """Return the types that give the same ids for one model file: Megatron opens all of SENTENCEPIECE alike."""
    return SENTENCEPIECE[0] if kind in SENTENCEPIECE else kind


def label(facts: Facts) -> str:
    """Return `data/tokenizer.model (SentencePieceTokenizer)`, or `NullTokenizer (vocab_size 100)`."""
    model, kind = facts.get("model"), facts["type"]
    if model:
        return f"{model} ({kind})"
    size = facts.get("vocab_size")
    return f"{kind} (vocab_size {size:,})" if size else str(kind)


def sizes_differ(made: Facts, own: Facts) -> str | None:
    """Describe the two vocabularies' sizes if they are known and differ."""
    theirs, ours = made.get("vocab_size"), own.get("vocab_size")
    if theirs is None or ours is None or theirs == ours:
        return None
    return f"the vocabularies have {theirs:,} and {ours:,} entries"


def end_differs(made: Facts, own: Facts) -> str | None:
    """Describe the two end-of-document tokens if they differ."""
    theirs, ours = made.get("eod"), own.get("eod")
    return None if theirs == ours else f"documents end with the ids {theirs} and {ours}"


def content_differs(made: Facts, own: Facts) -> str | None:
    """Describe the difference between two vocabularies of one size. An unused end-of-document token is not
    compared.
    """
    if made["vocabulary"] != own["vocabulary"]:
        return f"both vocabularies have {own['vocab_size']:,} entries, but they differ"
    if made.get("append_eod") is not False and (difference := end_differs(made, own)):
        return difference
    if made.get("probe_texts") == own["probe_texts"] and made["probes"] != own["probes"]:
        return "the vocabularies are equal, but the two tokenizers split texts differently"
    return None


def open_sentencepiece(path: str) -> Opened:
    """Load a SentencePiece model; raise UserError if it is not one."""
    data, processor = open_model(path)
    spec = parse_model(data).normalizer_spec
    flags = [name for name in ("add_dummy_prefix", "remove_extra_whitespaces") if getattr(spec, name)]
    pieces = {processor.id_to_piece(number): number for number in range(processor.get_piece_size())}
    eod = processor.eos_id()
    return Opened(
        pieces, eod if eod >= 0 else None, " ".join([spec.name or "none", *flags]), processor.encode_as_ids
    )


def open_fast(name: str) -> Opened:
    """Load a Hugging Face tokenizer, from its `tokenizer.json` if there is one, offline and without its own
    code.

    Raises:
        UserError: it cannot be loaded this way.
    """
    place = Path(name)
    file = place / "tokenizer.json" if place.is_dir() else place
    if not file.is_file():
        return open_by_transformers(name)
    from tokenizers import Tokenizer

    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises no more specific exception
        raise UserError(f"{file}: not a tokenizer: {str(error).splitlines()[0]}") from None
    return opened_fast(tokenizer, special_tokens(file.parent))


def open_by_transformers(name: str) -> Opened:
    """Load a tokenizer without `tokenizer.json`, or one from a hub (if it is in the cache); raise UserError."""
    loaded = open_hugging_face(name, local_files_only=True, trust_remote_code=False)
    if getattr(loaded, "is_fast", False):
        named = {name: token for name, token in loaded.special_tokens_map.items() if isinstance(token, str)}
        return opened_fast(loaded.backend_tokenizer, named)

    def encode(text: str) -> list[int]:
        return list(loaded.encode(text, add_special_tokens=False))

    return Opened(loaded.get_vocab(), loaded.eos_token_id, "", encode)


def opened_fast(tokenizer: Any, named: Mapping[str, Any]) -> Opened:
    """Load a `tokenizers.Tokenizer`, with the special tokens that its folder names and its `tokenizer.json`
    can lack.
    """
    vocabulary = tokenizer.get_vocab(with_added_tokens=True)
    for number, token in named.get("added_tokens_decoder", {}).items():
        vocabulary.setdefault(str(token["content"]), int(number))
    tokenizer.encode_special_tokens = True  # special tokens in a text are text
    tokenizer.no_truncation()
    tokenizer.no_padding()
    end = named.get("eos_token") or named.get("sep_token")  # as in the preprocessing
    end = end.get("content") if isinstance(end, dict) else end

    def encode(text: str) -> list[int]:
        return list(tokenizer.encode(text, add_special_tokens=False).ids)

    normalizer = type(tokenizer.normalizer).__name__ if tokenizer.normalizer is not None else "none"
    return Opened(vocabulary, vocabulary.get(end), normalizer, encode)


def special_tokens(folder: Path) -> dict[str, Any]:
    """Return the special tokens in a folder's configuration; empty if there are none."""
    found: dict[str, Any] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        with suppress(OSError, ValueError):
            content = read_json(folder / name)
            found |= content if isinstance(content, dict) else {}
    return found
