"""Check the prose of documents, docstrings, comments and messages: proselint, with the style of prose.toml."""

from __future__ import annotations

import io
import re
import subprocess
import sys
import tokenize
import tomllib
from collections.abc import Iterator, Sequence
from fnmatch import fnmatch
from functools import cache
from pathlib import Path
from typing import Any

from proselint.checks import __register__ as proselint_checks
from proselint.config import Config
from proselint.registry import CheckRegistry
from proselint.registry.checks import Check, types
from proselint.registry.checks.engine import Fancy
from proselint.tools import LintFile

ROOT = Path(__file__).resolve().parents[1]
STYLE = ROOT / "scripts/prose.toml"
FORMS = "preferred"  # the section of the style file, and the name of its check
CODE = re.compile(r"^ *(```+).*?^ *\1 *$|``.*?``|`[^`\n]*`|<[^>\n]+>|\]\([^)]*\)", re.MULTILINE | re.DOTALL)
VALUE = re.compile(r"\{[^{}]*\}|\S*[\d_/=]\S*")
QUOTES = re.compile(r"""^[rbfuRBFU]*(\"\"\"|'''|"|')|(\"\"\"|'''|"|')$""")  # proselint skips quotations
FEWEST_WORDS = 4  # a shorter string is a name or a value


@cache
def style() -> dict[str, Any]:
    """Return the style file."""
    return tomllib.loads(STYLE.read_text(encoding="utf-8"))


def preferred() -> Check:
    """Return the check of the preferred forms; a space in a pattern matches a line break as well."""
    items = {pattern.replace(" ", r"\s+"): form for pattern, form in style()[FORMS].items()}
    return Check(
        check_type=types.PreferredForms(items),
        path=FORMS,
        message="write {} instead of {!r}",
        engine=Fancy(),  # patterns look ahead
    )


def registered() -> Config:
    """Register proselint's checks and the project's own; return the configuration."""
    CheckRegistry().register_many((*proselint_checks, preferred()))
    return Config(max_errors=100_000, checks=dict.fromkeys([*style()["proselint"]["checks"], FORMS], True))


def blank(text: str) -> str:
    """Return as many characters that no check looks at, on as many lines."""
    return re.sub(r"[^\n]", "~", text)


def prose_of_markdown(text: str) -> str:
    """Return the page with everything blanked out that is not prose: code, tags, link targets, values."""
    for pattern in (CODE, VALUE):
        text = pattern.sub(lambda match: blank(match.group()), text)
    return text


def prose_of_page(text: str, name: str) -> str:
    """Return the page's prose without the rows that are generated from code, which is checked itself."""
    for pages, rows in style()["from_code"].items():
        if fnmatch(name, pages):
            text = re.sub(rows, lambda match: blank(match.group()), text, flags=re.MULTILINE)
    return prose_of_markdown(text)


def prose_of_python(text: str) -> str:
    """Return the comments, docstrings and longer strings of a module in place, the rest blanked out."""
    rows = [["~"] * len(line) for line in text.splitlines()]
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        name = tokenize.tok_name[token.type]
        words = QUOTES.sub(lambda match: blank(match.group()), token.string)
        prose = name == "COMMENT" or (
            name in ("STRING", "FSTRING_MIDDLE") and len(words.split()) >= FEWEST_WORDS
        )
        if prose:
            start, column = token.start
            for number, line in enumerate(prose_of_markdown(words).split("\n")):
                at = column if number == 0 else 0
                rows[start - 1 + number][at : at + len(line)] = line
    return "\n".join("".join(row) for row in rows)


def problems(path: Path, name: str, config: Config) -> Iterator[str]:
    """Yield `FILE:LINE: problem` for every finding in a file."""
    text = path.read_text(encoding="utf-8")
    prose = prose_of_python(text) if path.suffix == ".py" else prose_of_page(text, name)
    prose = re.sub(r"~[~ ]*", "~", prose)  # lines stay; the checks take a third of the time
    if not prose.strip("~\n"):
        return
    for found in LintFile(name, prose).lint(config):
        end = found.check_result.span[1] - 1
        yield f"{name}:{prose.count(chr(10), 0, end - 1) + 1}: {found.check_result.message}"


def main(names: Sequence[str]) -> int:
    """Check the named files, or all Markdown pages and modules of the checkout; return 1 if there are findings."""
    config = registered()
    if not names:
        command = ["git", "-C", str(ROOT), "ls-files", "-co", "--exclude-standard", "*.md", "*.py"]
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
        names = [name for name in listed if not any(fnmatch(name, pattern) for pattern in style()["skip"])]
    found = [problem for name in names for problem in problems(ROOT / name, name, config)]
    print("\n".join(found) or f"prose: {len(names)} files, nothing found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
