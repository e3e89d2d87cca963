"""Every command line in the documents is accepted by its parser, and every option in their sentences exists."""

from __future__ import annotations

import argparse
import re
import shlex
from collections.abc import Iterator
from functools import cache

import pytest

from megatron_lrpath.cli import build_parser
from tests.support import ROOT

PAGES = sorted([*(ROOT / "docs").glob("*.md"), *ROOT.glob("*.md"), *(ROOT / "examples").rglob("README.md")])
BLOCK = re.compile(r"^ *```(?:bash|sh|console)\n(.*?)^ *```", re.MULTILINE | re.DOTALL)
INLINE = re.compile(r"`(lrpath [^`\n]+)`")
ENDS = {"--", "|", ">", ">>", "&&", "||", ";", "&", "2>&1"}
# Placeholders for numbers and choices -> a value that the parser accepts.
VALUES = {"N": "1", "S": "1", "STEP": "1", "L": "ours", "P%": "1%", "SECONDS": "5", "F": "0.5"}


def lines_of(pattern: re.Pattern[str]) -> Iterator[tuple[str, str]]:
    """Yield (page, command line) of every call of lrpath in the matching parts of the pages."""
    for page in PAGES:
        found = "\n".join(pattern.findall(page.read_text(encoding="utf-8"))).replace("\\\n", " ")
        for line in found.splitlines():
            line = line.strip().removeprefix("$ ").removeprefix(".venv/bin/")
            if line.startswith("lrpath ") and "…" not in line and "[" not in line:
                yield page.name, line


def words_of(line: str) -> list[str]:
    """Return the arguments of lrpath in a line of shell code, up to Megatron's, a pipe or the like."""
    argv = shlex.split(line, comments=True)[1:]
    end = next((place for place, word in enumerate(argv) if word in ENDS), len(argv))
    return [VALUES.get(word, word) for word in argv[:end]]


@cache
def parser() -> argparse.ArgumentParser:
    """Return the parser of lrpath."""
    return build_parser()


def command_parser(name: str) -> argparse.ArgumentParser:
    """Return the parser of a command."""
    actions = [one for one in parser()._actions if isinstance(one, argparse._SubParsersAction)]
    return actions[0].choices[name]


@pytest.mark.parametrize(("page", "line"), sorted(set(lines_of(BLOCK))))
def test_a_command_line_of_a_page_parses(page: str, line: str) -> None:
    argv = words_of(line)
    if argv[0] not in ("--help", "COMMAND"):
        assert parser().parse_args(argv).command == argv[0]


@pytest.mark.parametrize(("page", "line"), sorted(set(lines_of(INLINE))))
def test_a_command_in_a_sentence_and_its_options_exist(page: str, line: str) -> None:
    argv = words_of(line)
    if not argv[0].isupper() and argv[0] != "--help":
        known = command_parser(argv[0])._option_string_actions
        given = {word.partition("=")[0] for word in argv[1:] if word.startswith("--")}
        assert given <= set(known)
