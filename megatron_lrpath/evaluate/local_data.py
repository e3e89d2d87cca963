"""Read benchmark data from local folders, as in the data sets' own repositories, without a network."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

from megatron_lrpath.errors import UserError
from megatron_lrpath.reading import parse_json, read_json, why

LARGEST = 2**30  # bytes of a benchmark's file at most
ENDINGS = (".parquet", ".jsonl", ".json", ".csv")
Rows = list[dict[str, Any]]


@contextmanager
def local_datasets(folder: Path | None) -> Iterator[None]:
    """Make the harness load its data sets from `folder` only; with None the harness uses its own sources.

    The task files of this project read their data in the original format and have no other source.
    """
    import datasets

    original = datasets.load_dataset

    def load(path: str, name: str | None = None, **options: Any) -> Any:
        if path in OWN:
            splits = {"test": OWN[path](own_folder(folder, path))}
        elif folder is None:
            return original(path=path, name=name, **options)
        else:
            found = find(folder, path, name)
            splits = {
                split: [row for file in files for row in read_file(file)] for split, files in found.items()
            }
        return datasets.DatasetDict(
            {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
        )

    with mock.patch.object(datasets, "load_dataset", load):
        yield


def find(folder: Path, dataset: str, config: str | None) -> dict[str, list[Path]]:
    """Return the files of a data set (and its configuration) below `folder`, by split.

    The supported layouts are DATASET/CONFIG/SPLIT.*, DATASET/data/SPLIT.* (without a configuration),
    DATASET/SPLIT.* and DATASET/SPLIT/CONFIG.csv (or CONFIG_SPLIT.csv), each SPLIT also in parts
    (`test-00000-of-00002.parquet`).

    Raises:
        UserError: there are none.
    """
    place = folder / dataset
    for candidate in (place / config,) if config else (place / "data", place):
        if files := by_split(candidate):
            return files
    if config:
        files = {}
        for path in sorted(place.glob(f"*/{config}*.*")):
            if path.suffix in ENDINGS and path.stem in (config, f"{config}_{path.parent.name}"):
                files.setdefault(path.parent.name, []).append(path)
        if files:
            return files
    wanted = f"{place}/{config or 'data'}/test.parquet (or .jsonl, .json, .csv)"
    raise UserError(
        f"--task-data {folder}: no data of {dataset}{f', {config}' if config else ''}; expected for example "
        f"{wanted}. docs/evaluation.md lists where the data of the paper's benchmarks are."
    )


def by_split(folder: Path) -> dict[str, list[Path]]:
    """Return the files in a folder, by split."""
    found: dict[str, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        if path.suffix in ENDINGS and path.is_file():
            found.setdefault(re.sub(r"-\d+-of-\d+$", "", path.stem), []).append(path)
    return found


def read_file(path: Path) -> Rows:
    """Return the rows of a file; every value of a CSV is text. A `.json` file has a list, or JSON lines."""
    if path.suffix == ".parquet":
        import pyarrow.parquet

        rows: Rows = pyarrow.parquet.read_table(path).to_pylist()
        return rows
    if path.suffix == ".csv":
        with path.open(encoding="utf-8-sig", newline="") as stream:
            return list(csv.DictReader(stream))
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json" and text.lstrip().startswith("["):
            return list(parse_json(text))
        return [parse_json(line) for line in text.splitlines() if line.strip()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({why(error)}); copy it again.") from None


def own_folder(folder: Path | None, dataset: str) -> Path:
    """Return the folder with the data of one of this project's task files.

    Raises:
        UserError: it does not exist.
    """
    name = dataset.partition("/")[2]
    if folder is None or not (folder / name).is_dir():
        raise UserError(
            f"the benchmark {name} needs --task-data DIR with its authors' files in DIR/{name}; "
            "docs/evaluation.md lists where they are and under which license."
        )
    return folder / name


def matching(folder: Path, pattern: str) -> list[Path]:
    """Return the files below a folder; raise UserError with the missing pattern if there are none."""
    files = sorted(folder.glob(pattern))
    if not files:
        raise UserError(f"{folder}: there is no {pattern} (see docs/evaluation.md)")
    return files


def benchmark(path: Path) -> Any:
    """Read the JSON value in a file of a benchmark's authors; raise UserError."""
    try:
        return read_json(path, LARGEST)
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({why(error)}); copy it again.") from None


def read_c3(folder: Path) -> Rows:
    """Read C3's test questions: `c3-d-test.json` (dialogues) and `c3-m-test.json`, as in the repository's
    data/.

    A file is a list of [[lines of the document], [{question, choice, answer}], id].
    """
    rows: Rows = []
    for path in matching(folder, "**/c3-[dm]-test.json"):
        for lines, questions, _ in benchmark(path):
            for asked in questions:
                rows.append(
                    {
                        "context": "\n".join(lines),
                        "question": asked["question"],
                        "choices": asked["choice"],
                        "gold": asked["choice"].index(asked["answer"]),
                    }
                )
    return rows


def read_csl(folder: Path) -> Rows:
    """Read CSL's classification by category: `cls_ctg/test.tsv`, as in the repository's benchmark/.

    A line has the prompt, a paper's title and its category.
    """
    rows: Rows = []
    for path in matching(folder, "**/cls_ctg/test.tsv"):
        lines = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        rows += [{"title": parts[-2], "category": parts[-1].strip()} for parts in lines if len(parts) >= 2]
    choices = sorted({row["category"] for row in rows})
    return [row | {"choices": choices, "gold": choices.index(row["category"])} for row in rows]


def read_gaokao(folder: Path) -> Rows:
    """Read GAOKAO-Bench's objective questions with one correct letter of A to D, as in the repository's
    Objective_Questions.

    Questions with several correct letters and texts with several questions are excluded: they have no
    probability of a single letter.
    """
    rows: Rows = []
    for path in matching(folder, "**/20*.json"):
        for asked in benchmark(path)["example"]:
            answers = asked["answer"]
            if len(answers) == 1 and answers[0] in ("A", "B", "C", "D"):
                question = asked["question"].strip()
                rows.append({"question": question, "gold": "ABCD".index(answers[0]), "subject": path.stem})
    return rows


def in_their_form(read: Callable[[Path], Rows]) -> Callable[[Path], Rows]:
    """Wrap a reader so that a file in an unexpected format is a user's error."""

    def checked(folder: Path) -> Rows:
        try:
            return read(folder)
        except (LookupError, TypeError, ValueError, AttributeError, OSError) as error:
            raise UserError(
                f"{folder}: its files do not have the format of the benchmark's authors ({why(error)}); copy "
                "them again (docs/evaluation.md)."
            ) from None

    return checked


OWN: dict[str, Callable[[Path], Rows]] = {
    "lrpath/c3": in_their_form(read_c3),
    "lrpath/csl": in_their_form(read_csl),
    "lrpath/gaokao": in_their_form(read_gaokao),
}
