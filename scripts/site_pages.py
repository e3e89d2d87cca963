"""Pages of the site that are generated (commands) or stand outside docs/; links to files of the source."""

from __future__ import annotations

import argparse
import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "examples/reproduction/README.md")
"""Pages that stand where a reader of the repository looks for them; they have the same place in the site."""
COMMANDS = "commands.md"
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated page, and the pages from outside docs/ (an event of MkDocs)."""
    from mkdocs.structure.files import File

    files.append(File.generated(config, COMMANDS, content=commands_page()))
    for name in OUTSIDE:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Resolve a page's links: to other pages by their place in the site, to files of the source as their names.

    A link to a file that does not exist is left alone, so that the strict build refuses it.
    """
    place = page.file.src_uri
    source = place if place in OUTSIDE else f"docs/{place}"

    def resolved(match: re.Match[str]) -> str:
        target = match["target"]
        if "://" in target or target.startswith("mailto:"):
            return match[0]
        path = posixpath.normpath(posixpath.join(posixpath.dirname(source), target))
        name = path.removeprefix("docs/")
        if files.get_file_from_path(name):
            relative = posixpath.relpath(name, posixpath.dirname(place) or ".")
            return f"[{match['text']}]({relative}{match['anchor'] or ''})"
        return f"{match['text']} (`{path}`)" if (ROOT / path).exists() else match[0]

    return LINK.sub(resolved, markdown)


def commands_page() -> str:
    """The reference of all commands, from their own parsers."""
    os.environ["COLUMNS"] = "100"
    from megatron_lrpath.cli import build_parser

    parser = build_parser()
    choices = next(one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    lines = [
        "# Commands",
        "",
        "Look up a command's arguments, options and exit status here. `lrpath COMMAND --help` prints the same text.",
        "",
        "Exit statuses: 0 success; 1 failure that another call may get over; 2 a mistake to correct; 75 saved and",
        "stopped before the end (call again); 130 interrupted.",
        "",
    ]
    for name, command in choices.items():
        lines += [f"## lrpath {name}", "", "```text", command.format_help().strip(), "```", ""]
    return "\n".join(lines)
