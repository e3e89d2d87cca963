"""Make the golden pairs by running Megatron-LM's own tool: `make.py CHECKOUT_OF_MEGATRON_LM [CASE…]`.

The stored pairs were made with core_v0.19.0. Inputs and tokenizers are only made if they are missing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).resolve().parent
SPECIAL = ["<|endoftext|>", "<|padding|>"]
SP = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "sp.model"]
NFKC = ["--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model", "nfkc.model"]
HF = ["--tokenizer-type", "HuggingFaceTokenizer", "--tokenizer-model", "hf"]
# name of the pair: (input, arguments)
CASES: dict[str, tuple[str, list[str]]] = {
    "sp": ("texts.jsonl", [*SP, "--append-eod"]),
    "sp-keys": ("texts.jsonl", [*SP, "--json-keys", "title", "text"]),
    "sp-parts": ("texts.jsonl", [*SP, "--append-eod", "--partitions", "2", "--workers", "2"]),
    "sp-lists": ("lists.jsonl", [*SP, "--append-eod"]),
    "nfkc": ("texts.jsonl", [*NFKC, "--append-eod"]),
    "hf": ("texts.jsonl", [*HF, "--append-eod"]),
    "hf-bare": ("texts.jsonl", [*HF, "--tokenizer-hf-no-include-special-tokens"]),
    "hf-specials": ("specials.jsonl", [*HF, "--append-eod"]),
    "null": ("numbers.jsonl", ["--tokenizer-type", "NullTokenizer", "--vocab-size", "1000", "--append-eod"]),
    "null-wide": ("numbers.jsonl", ["--tokenizer-type", "NullTokenizer", "--vocab-size", "70000"]),
}

PARAGRAPHS = [
    "A language model is updated when new data arrive; the learning rate decides what it remembers.",
    "学习率从峰值衰减到谷底，新的数据不断到来，模型需要更新。窗前明月光，疑是地上霜。",
    "Größe, naïve café, Ωμέγα, привет, العربية, हिन्दी, 한국어, ﬁne ①②③ ½ ﷺ e\u0301 Ⅷ.",
    "emoji 😀👨‍👩‍👧‍👦🏳️‍🌈 and a family; \U0010ffff \ue000 \ufffd",
    "def f(x):\n\treturn  x  +  1\n\n\n# tabs\tand   runs of   spaces \r\n\x0b\x0c end  ",
    "nul \x00 inside, bom \ufeff inside, \u200b zero width, \u00a0 no-break, \u3000 ideographic, \x7f \x85 \u2028",
    "control symbols <s> </s> <unk> <pad> <0x41> <|endoftext|x> spelled out </s></s>, s> </ s>",
    "1234567890 3.14159 0x1F600 1e-5 -42",
    "▁literal▁marks▁ and _underscores_",
    " leading and trailing ",
    "x",
]


def texts() -> list[str]:
    """Return documents of every kind: short ones and a very long one."""
    joined = ["\n".join(PARAGRAPHS), " ".join(reversed(PARAGRAPHS)), "".join(PARAGRAPHS) * 3]
    mixed = [
        PARAGRAPHS[i % 11] + sep + PARAGRAPHS[i * 7 % 11] for i, sep in enumerate(["", " ", "\n", "  "] * 8)
    ]
    return [*PARAGRAPHS, *joined, *mixed, "long " * 3000 + "a" * 5000 + "长" * 2000]


def write_lines(name: str, documents: list[dict[str, object]]) -> None:
    """Write JSON lines, every other one with escapes instead of UTF-8."""
    with (HERE / name).open("w", encoding="utf-8", newline="\n") as out:
        for number, document in enumerate(documents):
            out.write(json.dumps(document, ensure_ascii=number % 2 == 0) + "\n")


def make_inputs() -> None:
    """Write the input files."""
    titled = [{"id": i, "title": f"Title {i}", "text": text} for i, text in enumerate(texts())]
    write_lines("texts.jsonl", [dict(one) for one in titled])
    write_lines("lists.jsonl", [{"text": text.split(". ")} for text in texts()[:12]] + [{"text": ["", "a"]}])
    write_lines("specials.jsonl", [{"text": f"a{s}b {s}"} for s in SPECIAL] + [{"text": "plain"}])
    write_lines(
        "numbers.jsonl", [{"text": " ".join(str(i * j % 1000) for j in range(i + 1))} for i in range(50)]
    )


def make_tokenizers() -> None:
    """Make two SentencePiece models (lossless, and normalizing) and a Hugging Face byte-level BPE."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    root = HERE.parents[1]
    train = [sys.executable, str(root / "tools/train_tokenizer.py"), "--input", str(HERE / "texts.jsonl")]
    for name, more in {"sp": [], "nfkc": ["--normalize", "--user-defined-symbols", "<sep>", "1234"]}.items():
        command = [*train, "--output-prefix", str(HERE / name), "--vocab-size", "600", "--overwrite", *more]
        subprocess.run(command, check=True, env={**os.environ, "PYTHONPATH": str(root)})
        (HERE / f"{name}.vocab").unlink()
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=600, special_tokens=SPECIAL, show_progress=False)
    tokenizer.train_from_iterator(texts(), trainer)
    begin = ("<|endoftext|>", tokenizer.token_to_id("<|endoftext|>"))
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[begin]
    )
    (HERE / "hf").mkdir(exist_ok=True)
    tokenizer.save(str(HERE / "hf/tokenizer.json"), pretty=False)
    named = {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": SPECIAL[0], "pad_token": SPECIAL[1]}
    (HERE / "hf/tokenizer_config.json").write_text(json.dumps(named) + "\n")


def main() -> int:
    """Make missing inputs and tokenizers, then the pairs."""
    if not (HERE / "texts.jsonl").exists():
        make_inputs()
    if not (HERE / "sp.model").exists():
        make_tokenizers()
    for name in sys.argv[2:] or CASES:
        source, more = CASES[name]
        command = [sys.executable, f"{sys.argv[1]}/tools/preprocess_data.py", "--input", source]
        command += ["--workers", "1"] if "--workers" not in more else []
        command += [*more, "--output-prefix", f"pairs/{name}"]
        (HERE / "pairs").mkdir(exist_ok=True)
        subprocess.run(command, check=True, cwd=HERE, env={**os.environ, "PYTHONPATH": sys.argv[1]})
    for left_over in [*HERE.glob("texts_?.jsonl"), *HERE.glob("pairs/*_?_text_document.*")]:
        left_over.unlink()
    return 0


if __name__ == "__main__":
    sys.exit(main())
