"""Small made-up data for the nine benchmarks, in the form of the originals' repositories."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

EXAM = {"question": "1 + 1 = ?", "A": "1", "B": "2", "C": "3", "D": "4", "answer": "B"}
AGI_OPEN = ("math", "gaokao-mathcloze")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def write_own(folder: Path) -> None:
    """Write C3, CSL and GAOKAO as their authors do; some GAOKAO answers have more than one letter."""
    questions = [
        {"question": "他们在哪儿？", "choice": ["学校", "家", "商店"], "answer": "家"},
        {"question": "几点了？", "choice": ["三点", "四点"], "answer": "三点"},
    ]
    for kind, count in (("d", 2), ("m", 1)):
        path = folder / f"c3/c3-{kind}-test.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        documents = [[["男：你好。", "女：你好。"], questions, f"{kind}-{number}"] for number in range(count)]
        path.write_text(json.dumps(documents, ensure_ascii=False))
    lines = [
        "to category\t桥梁结构的损伤识别\t工学",
        "to category\t中药的应用\t医学",
        "to category\t历史的思考\t历史学",
    ]
    (folder / "csl/cls_ctg").mkdir(parents=True)
    (folder / "csl/cls_ctg/test.tsv").write_text("\n".join(lines) + "\n")
    asked = [(["A"], "甲"), (["AC"], "乙"), (["C", "D"], "丙"), (["D"], "丁")]
    example = [
        {"question": f"{text}\nA. 一\nB. 二\nC. 三\nD. 四\n", "answer": answer} for answer, text in asked
    ]
    (folder / "gaokao").mkdir()
    content = {"keywords": "2010-2022_Physics_MCQs", "example": example}
    (folder / "gaokao/2010-2022_Physics_MCQs.json").write_text(json.dumps(content, ensure_ascii=False))


def write_harness(folder: Path, tasks: Iterable[Any]) -> None:
    """Write two rows of every data set (and configuration) that these tasks of the harness read."""
    for task in tasks:
        dataset, config = task["dataset_path"], task.get("dataset_name")
        place = folder / dataset / (config or "data")
        for split, rows in rows_of(dataset).items():
            write_jsonl(place / f"{split}.jsonl", rows)


def rows_of(dataset: str) -> dict[str, list[dict[str, Any]]]:
    """Return two rows for each split, with the columns of the data set."""
    family, _, name = dataset.partition("/")
    if name == "gsm8k":
        row = {"question": "What is 2 + 3?", "answer": "2 + 3 = 5\n#### 5"}
        return {"train": [row] * 6, "test": [row, row]}
    if name == "mmlu":
        row = {"question": "1 + 1 = ?", "choices": ["1", "2", "3", "4"], "answer": 1, "subject": "x"}
        return {"dev": [row] * 5, "test": [row, row]}
    if name == "cmmlu":
        row = {
            key.capitalize() if key in ("question", "answer") else key: value for key, value in EXAM.items()
        }
        return {"dev": [row] * 5, "test": [row, row]}
    if name == "ceval-exam":
        return {"dev": [EXAM] * 5, "val": [EXAM, EXAM]}
    if name == "bbh":
        return {"test": [{"input": "not True is", "target": "False"}] * 2}
    assert family == "hails", dataset
    if name.removeprefix("agieval-") in AGI_OPEN:
        return {"test": [{"query": "Q: 1 + 1 = ? A:", "answer": "2"}] * 2}
    choices = ["(A)1", "(B)2", "(C)3", "(D)4"]
    return {"test": [{"query": "Q: 1 + 1 = ? A:", "choices": choices, "gold": [1]}] * 2}
