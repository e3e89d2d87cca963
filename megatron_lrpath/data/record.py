"""The record of a dataset's origin, `PREFIX.tokens.json`, and the comparison of data with a tokenizer."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from megatron_lrpath import __version__
from megatron_lrpath.console import say
from megatron_lrpath.data import content_sums, document_hashes
from megatron_lrpath.data.document_hashes import HashFile, hashes_path
from megatron_lrpath.data.indexed import fingerprint_source, read_header
from megatron_lrpath.data.slice import Slice, slice_path, validation_paths
from megatron_lrpath.data.slice_codec import DamagedError, read_slice_header
from megatron_lrpath.data.token_sample import Samples
from megatron_lrpath.errors import UserError
from megatron_lrpath.paradigms import OURS
from megatron_lrpath.plan import Plan
from megatron_lrpath.plan.sft import PREPARED
from megatron_lrpath.reading import read_json, why
from megatron_lrpath.sealed import read_sealed, write_sealed
from megatron_lrpath.tokenizers.prints import Facts, TokenizerSpec, check_facts, facts_differ, label
from megatron_lrpath.wording import listing

ENDING = ".tokens.json"
FORMAT = 1
LIMIT = 1 << 24  # bytes of a record that are read at most
INPUTS_LISTED = 1000
CACHE = ".cache"  # in the slices' folder; also has the indices of samples
REMEDY = "Name the tokenizer that made the data, or tokenize the text again and draw new slices."


def record_path(prefix: Path | str) -> Path:
    """Return the record of the dataset at `prefix`, next to its `.idx`."""
    return Path(f"{prefix}{ENDING}")


def path_in(folder: Path, prefix: Path | str, fingerprint: str) -> Path:
    """Return the record in another folder, which can have datasets with one name from several folders."""
    return folder / f"{Path(prefix).name}-{fingerprint[:12]}{ENDING}"


def inputs_of(names: Iterable[str]) -> dict[str, Any]:
    """Return the input files for a record: their number, their bytes, and the names and sizes of the first
    thousand.
    """
    sizes = [(name, os.path.getsize(name) if os.path.isfile(name) else None) for name in names]
    listed = [{"name": name, "bytes": size} for name, size in sizes[:INPUTS_LISTED]]
    return {"count": len(sizes), "bytes": sum(size or 0 for _, size in sizes), "files": listed}


def hashes_of(prefix: Path | str, eod: int | None) -> dict[str, Any]:
    """Return the hashes entry of a record, for a dataset that has just been written; {} without hashes."""
    path = hashes_path(record_path(prefix))
    return {document_hashes.KEY: document_hashes.describe(path, eod)} if path.exists() else {}


def write_record(
    prefix: Path | str, tool: str, facts: Facts, details: Mapping[str, Any], folder: Path | None = None
) -> Path:
    """Write the record of a finished dataset; return its path.

    `tool` made the dataset (or examined it), `facts` are the tokenizer's, `details` further information.
    The record has the dataset's fingerprint, so that it cannot be used for another dataset.
    """
    header, fingerprint = read_header(str(prefix)), fingerprint_source(prefix)
    content = {
        "format": FORMAT,
        "tool": f"{tool} (megatron-lrpath {__version__})",
        "fingerprint": fingerprint,
        "type": header.dtype,
        "documents": header.documents,
        "tokenizer": facts,
        content_sums.KEY: content_sums.content_sums(Path(f"{prefix}.bin")),
        **details,
    }
    path = record_path(prefix) if folder is None else path_in(folder, prefix, fingerprint)
    write_sealed(path, content)
    return path


def read_record(prefix: Path | str, fingerprint: str, folder: Path | None = None) -> Facts | None:
    """Return the facts of the tokenizer that made a dataset; None if nothing is recorded.

    The record is next to the dataset or, if that folder is read-only, in `folder` (the slices').

    Raises:
        UserError: it cannot be read, or belongs to another dataset than the one with this fingerprint.
    """
    paths = [record_path(prefix), *([path_in(folder, prefix, fingerprint)] if folder else [])]
    for path in paths:
        content = read_content(path)
        if content is not None and content["fingerprint"] != fingerprint:
            raise UserError(
                f"{path}: describes another dataset than {prefix}.idx, which was written since; remove it, and write "
                f"it anew: tools/check_dataset.py {prefix} --tokenizer-model MODEL --record"
            )
        if content is not None:
            return dict(content["tokenizer"])
    return None


def read_content(path: Path) -> dict[str, Any] | None:
    """Return a record's content, checked; None if there is none. Raise UserError if it cannot be read."""
    try:
        content, _ = read_sealed(path, LIMIT)
        if content["format"] == FORMAT:
            check_facts(content["tokenizer"])
            for part in (content_sums, document_hashes):
                if part.KEY in content:
                    part.check_form(content[part.KEY])
            return dict(content, fingerprint=str(content["fingerprint"]))
        reason = f"is of format {content['format']}, and this version of the program reads {FORMAT}"
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = f"cannot be read ({why(error)})"
    raise UserError(f"{path}: {reason}; remove it, and write it again with tools/check_dataset.py … --record")


def recorded_content(
    prefix: Path | str, fingerprint: str, folder: Path | None = None
) -> Mapping[str, Any] | None:
    """Return the checksums of a dataset's `.bin` in its record; None without a record, or in one of an older
    version.

    Raises:
        UserError: the record cannot be read.
    """
    own = own_records(prefix, fingerprint, folder).values()
    return next((content[content_sums.KEY] for content in own if content_sums.KEY in content), None)


def recorded_hashes(prefix: Path | str, fingerprint: str, folder: Path | None = None) -> HashFile | None:
    """Return the hashes of a dataset's documents, None if there are none. The dataset need not be on disk.

    Raises:
        UserError: the record cannot be read.
    """
    for path, content in own_records(prefix, fingerprint, folder).items():
        if (found := content.get(document_hashes.KEY)) is not None:
            return HashFile(hashes_path(path), found["documents"], found["eod"], found["xxh3_128"])
    return None


def own_records(prefix: Path | str, fingerprint: str, folder: Path | None) -> dict[Path, dict[str, Any]]:
    """Return the records of the dataset with this fingerprint by their paths: next to it, then in `folder`."""
    paths = [record_path(prefix), *([path_in(folder, prefix, fingerprint)] if folder else [])]
    found = {path: content for path in paths if (content := read_content(path)) is not None}
    return {path: content for path, content in found.items() if content["fingerprint"] == fingerprint}


def verify_content(slices: Iterable[Slice], whole: bool = False) -> list[Path]:
    """Compare the `.bin` of each source with its record, in sampled blocks or completely; return prefixes
    without checksums.

    Raises:
        UserError: with all differing bytes.
    """
    problems: list[str] = []
    unverified: list[Path] = []
    for prefix, (fingerprint, folder) in _places(slices).items():
        path = Path(f"{prefix}.bin")
        sums = recorded_content(prefix, fingerprint, folder)
        if sums is None:
            unverified.append(prefix)
        else:
            chosen = (
                None if whole or path.stat().st_size != sums["bytes"] else content_sums.sampled(path, sums)
            )
            problems += content_sums.wrong_blocks(path, sums, chosen)
    if problems:
        raise UserError(
            "; ".join(problems)
            + ". Restore the file from a copy, or tokenize the text again (the same text and "
            "tokenizer give the same bytes)."
        )
    return unverified


def _places(slices: Iterable[Slice]) -> dict[Path, tuple[str, Path | None]]:
    """Return each source's prefix with its fingerprint and the folder of a slice that names it."""
    return {
        source.prefix: (source.fingerprint, one.path.resolve().parent if one.path else None)
        for one in slices
        for source in one.sources
    }


@dataclass(frozen=True)
class Findings:
    """The results of a comparison, each in one line: `problems` forbid the use of the data, `notes` do not."""

    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Made:
    """A dataset in use: its path, its origin in a message, and the tokenizer that made it (None: not
    recorded).
    """

    prefix: Path
    where: str
    facts: Facts | None


@dataclass
class Comparison:
    """Datasets compared with the tokenizer `spec`, which `owner` (a plan's file, an option) names."""

    spec: TokenizerSpec
    owner: str
    samples: Samples
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def findings(self, datasets: Sequence[Made]) -> Findings:
        """Return the comparison of all datasets."""
        recorded: dict[str, list[Made]] = {}
        for one in datasets:
            if one.facts is not None:
                recorded.setdefault(json.dumps(one.facts, sort_keys=True), []).append(one)
        for group in recorded.values():
            self.attempt(lambda group=group: self.compare(group))  # type: ignore[misc]
        unknown = [one for one in datasets if one.facts is None]
        if unknown:
            self.attempt(lambda: self.look(unknown))
        return Findings(tuple(self.problems), tuple(self.notes))

    def attempt(self, action: Callable[[], None]) -> None:
        """Call `action`; if the tokenizer cannot be opened, add a problem, or a note if it can be a name on a
        hub.
        """
        try:
            action()
        except UserError as error:
            told = self.notes if self.spec.is_named else self.problems
            told.append(f"{self.owner}: the tokenizer cannot be compared with the data: {error}")

    def compare(self, group: Sequence[Made]) -> None:
        """Compare datasets that one tokenizer made."""
        facts = group[0].facts
        assert facts is not None
        if difference := self.spec.difference(facts):
            self.problems.append(
                f"{named(group)}: made with {label(facts)}, and {self.owner} names {self.spec.label}: {difference}. "
                f"{REMEDY}"
            )

    def look(self, group: Sequence[Made]) -> None:
        """Compare a sample of the ids of datasets without a record with the vocabulary."""
        size, looked, seen = self.spec.size, 0, []
        for one in group:
            if not os.path.isfile(f"{one.prefix}.bin"):
                continue  # opening the data reports it
            sample = self.samples.of(one.prefix)
            known = None if size is None else size + control_tokens(one.prefix)
            if (wrong := sample.outside(known)) is not None:
                self.problems.append(
                    f"{one.prefix}.bin{one.where}: holds the id {wrong:,}, and the vocabulary of {self.spec.label}, "
                    f"which {self.owner} names, has {size or 0:,} entries: another tokenizer made it. {REMEDY}"
                )
                continue
            seen.append(one)
            looked += sample.ids
        if seen:
            within = (
                f"{looked:,} ids, sampled, are in its vocabulary of {size:,}"
                if size
                else "no id was compared"
            )
            option = f"--tokenizer-model {self.spec.model}" if self.spec.model else f"--vocab-size {size}"
            names = listing([str(one.prefix) for one in seen], 2)
            self.notes.append(
                f"{names}: no record of the tokenizer ({ENDING}); taken as made with {self.spec.label}: {within}. To "
                f"look at all ids and record it: tools/check_dataset.py PREFIX {option} --record"
            )


def control_tokens(prefix: Path) -> int:
    """Return the number of control tokens of prepared chats beyond the vocabulary, if the dataset is one of
    them.
    """
    for folder in prefix.parents[:2]:  # the folder of the data, or its parent
        with suppress(OSError, ValueError, KeyError, TypeError):
            prepared = read_json(folder / PREPARED)
            return len(prepared["control_tokens"])
    return 0


def named(group: Sequence[Made]) -> str:
    """Return the datasets for a line: the first two, and the number of the others."""
    return listing([f"{one.prefix}{one.where}" for one in group], 2)


def tokenizer_problems(plan: Plan, model: str | None = None) -> Findings:
    """Compare the tokenizer of a plan with the ones that made its available data.

    The comparison covers the sources of all slices (versions, validation, those of mixes) and the prepared
    chat data. `model` replaces the path of its tokenizer, as in an export. It is fast: files are hashed,
    headers read, and a million ids of each dataset without a record, once.
    """
    spec = TokenizerSpec.of_plan(plan)
    owner = str(plan.path)
    if model is not None:
        spec, owner = replace(spec, model=model), "--tokenizer"
    if spec.is_missing:
        return Findings()  # opening the tokenizer reports it
    folder = Path(plan.data.slices)
    datasets: dict[str, Made] = {}
    problems: list[str] = []
    for path in slice_files(plan):
        try:
            for fingerprint, one in sources_of(path):
                if fingerprint not in datasets or datasets[fingerprint].facts is None:
                    datasets[fingerprint] = one
        except UserError as error:
            problems.append(str(error))
    found = Comparison(spec, owner, Samples(folder / CACHE)).findings([*datasets.values()])
    return Findings((*problems, *found.problems), (*found.notes, *prepared_notes(plan)))


def require_tokenizer(plan: Plan, model: str | None = None) -> None:
    """Print the notes of `tokenizer_problems`, one line each.

    Raises:
        UserError: with all problems.
    """
    refuse(tokenizer_problems(plan, model))


def refuse(findings: Findings) -> None:
    """Print notes; raise UserError with all problems."""
    for note in dict.fromkeys(findings.notes):
        say(f"note: {note}")
    if findings.problems:
        raise UserError("\n".join(dict.fromkeys(findings.problems)))


def slice_files(plan: Plan) -> list[Path]:
    """Return the existing slice files: of the versions, of validation, and of the mixes."""
    folder = Path(plan.data.slices)
    paths = [slice_path(folder, version.name) for version in plan.versions]
    paths += validation_paths(plan.data)
    for run in plan.runs(OURS.name):
        for part in run.mix.parts if run.mix else ():
            paths.append(slice_path(Path(part.slice).parent if "/" in part.slice else folder, part.name))
    return [path for path in dict.fromkeys(paths) if path.is_file()]


def sources_of(path: Path) -> list[tuple[str, Made]]:
    """Return the sources of a slice by their fingerprints; none for an unreadable slice, which is refused
    elsewhere.

    Raises:
        UserError: a source's record cannot be read, or belongs to another dataset.
    """
    folder = path.resolve().parent
    found = []
    with suppress(OSError, DamagedError, KeyError, TypeError, ValueError):
        for source in read_slice_header(path)["sources"]:
            prefix = shown(folder / source["prefix"])
            fingerprint = str(source["fingerprint"])
            facts = source.get("tokenizer")
            facts = read_record(prefix, fingerprint, folder) if facts is None else check_facts(facts)
            found.append((fingerprint, Made(prefix, f" (in {path})", facts)))
    return found


def shown(path: Path) -> Path:
    """Return a path for messages: relative if it is below the working directory."""
    whole, here = Path(os.path.normpath(path)), Path.cwd()
    return whole.relative_to(here) if whole.is_relative_to(here) else whole


def prepared_notes(plan: Plan) -> list[str]:
    """Return a line if chat data were prepared with another tokenizer; `lrpath run` and `lrpath sft` prepare
    them again.
    """
    record = plan.prepared_record() if plan.sft is not None else None
    try:
        difference = prepared_difference(plan, record or {})
    except UserError as error:
        difference = str(error)
    return [difference] if difference else []


def prepared_difference(plan: Plan, record: Mapping[str, Any]) -> str | None:
    """Return how the tokenizer of the prepared chat data in `record` differs from the plan's, if it does.

    Return None for data that were prepared before tokenizers were recorded.
    """
    if not (facts := record.get("tokenizer")):
        return None
    spec = TokenizerSpec.of_plan(plan)
    try:
        difference = spec.difference(check_facts(facts))
    except (ValueError, TypeError):
        return (
            f"{plan.sft_folder}: the record of its tokenizer cannot be read: lrpath sft {plan.path} --prepare"
        )
    if difference is None:
        return None
    return (
        f"{plan.sft_folder}: prepared with {label(facts)}, and {plan.path} names {spec.label}: {difference}. "
        f"Prepare the data again: lrpath sft {plan.path} --prepare"
    )


def blend_problems(prefixes: Iterable[str], spec: TokenizerSpec) -> Findings:
    """Return the same for datasets that arguments name (--data-path), each with its record next to it."""
    if spec.is_missing:
        return Findings()
    datasets = []
    for prefix in dict.fromkeys(prefixes):
        content = read_content(record_path(prefix))
        facts = read_record(prefix, fingerprint_source(prefix)) if content else None
        datasets.append(Made(Path(prefix), "", facts))
    return Comparison(spec, "--tokenizer-model", Samples()).findings(datasets)


def one_tokenizer(parts: Sequence[tuple[str, Facts | None]], remedy: str) -> Facts | None:
    """Return the facts that datasets share, by their names; None if none of them has a record.

    Raises:
        UserError: two were made by different tokenizers, with both names; `remedy` is what to do.
    """
    known = [(name, facts) for name, facts in parts if facts is not None]
    for name, facts in known[1:]:
        first, other = known[0]
        if difference := facts_differ(other, facts):
            raise UserError(
                f"{first} was made with {label(other)}, {name} with {label(facts)}: {difference}. {remedy}"
            )
    return known[0][1] if known else None
