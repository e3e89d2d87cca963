"""Pages of the site that are generated from the code or are outside docs/; links to files of the source."""

from __future__ import annotations

import argparse
import os
import posixpath
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
OUTSIDE = ("CONTRIBUTING.md", "CHANGELOG.md", "benchmarks/README.md", "examples/reproduction/README.md")
"""Pages that are elsewhere in the repository; they have the same path in the site."""
LINK = re.compile(r"\[(?P<text>[^\]]+)\]\((?P<target>[^)#\s]+)(?P<anchor>#[^)\s]*)?\)")


def on_files(files: Any, config: Any) -> Any:
    """Add the generated pages, and the pages from outside docs/ (an event of MkDocs)."""
    from mkdocs.structure.files import File

    for name, page in {
        "commands.md": commands_page,
        "arguments.md": arguments_page,
        "slurm-settings.md": settings_page,
    }.items():
        files.append(File.generated(config, name, content=page()))
    for name in OUTSIDE:
        text = (ROOT / name).read_text(encoding="utf-8")
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown: str, page: Any, files: Any, **_: Any) -> str:
    """Resolve a page's links: to other pages by their path in the site, to source files as their names.

    A link to a file that does not exist is not changed, so that the strict build refuses it.
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
    """Return the reference of all commands, from their parsers."""
    os.environ["COLUMNS"] = "100"
    from megatron_lrpath.cli import build_parser

    parser = build_parser()
    choices = next(one.choices for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    lines = [
        "# Commands",
        "",
        "Look up a command's arguments, options and exit status here. `lrpath COMMAND --help` prints the same text.",
        "",
        "[When something fails](failures.md#exit-statuses) explains the exit statuses.",
        "",
    ]
    for name, command in choices.items():
        lines += [f"## lrpath {name}", "", "```text", command.format_help().strip(), "```", ""]
    return "\n".join(lines)


def arguments_page() -> str:
    """Return the reference of Megatron's and this project's training arguments, from their table."""
    from megatron_lrpath.plan.arguments import PATH, PLAN, table
    from megatron_lrpath.plan.companions import companions
    from megatron_lrpath.plan.needs import WORDS, needs

    ways = {one.name: one.ways for one in companions()}
    required = {one.name: WORDS[one.of] for one in needs() if not one.only and not one.unless}
    lines = [
        "# Training arguments",
        "",
        "Look up here whether a run accepts an argument of `pretrain_gpt.py`, under a plan and with `--lr-path`.",
        "`lrpath check-args` prints the same for a whole launch line.",
        "",
        "- *neutral*: does not affect the result; it can change at any start.",
        "- *identity*: affects the result; a resumed run must have the same value. A plan sets it under `model` or",
        "  `megatron`.",
        "- *set*: the plan or `--lr-path` sets it; a contradicting value is refused.",
        "- *start*: names the run and its device.",
        "- *refused*: not supported; the last column has the reason or the replacement.",
        "",
        "| argument | under a plan | with `--lr-path` | reason |",
        "|---|---|---|---|",
    ]
    for one in sorted(table().values(), key=lambda row: row.option):
        reasons = [
            one.reason,
            *(dict.fromkeys(one.why(way) for way in (PLAN, PATH)) if one.refusal or one.instead else ()),
        ]
        if one.key:
            reasons.append(f"plan key `{one.key}`")
        if one.name in ways:
            reasons.append(f"acts only with `{ways[one.name]}`")
        if one.name in required:
            reasons.append(f"needs {required[one.name]}")
        if one.script:
            reasons.append(f"only a script of your own with {one.script} reads it")
        reason = "; ".join(dict.fromkeys(part for part in reasons if part)).replace("|", "\\|")
        lines.append(f"| `{one.option}` | {one.class_for(PLAN)} | {one.class_for(PATH)} | {reason} |")
    return "\n".join([*lines, ""])


def settings_page() -> str:
    """Return the reference of the cluster settings, from their definitions."""
    from megatron_lrpath.launch.slurm.settings import SETTINGS, Settings

    lines = [
        "# Slurm settings",
        "",
        "Look up here every setting of `lrpath submit`. A settings file (`--settings FILE`, see",
        "[Your cluster](cluster.md)) has lines `LRPATH_NAME=value`; the option on the command line overrides it.",
        "",
        "| variable | option | default | meaning |",
        "|---|---|---|---|",
    ]
    defaults = Settings()
    for one in SETTINGS:
        default = getattr(defaults, one.name)
        shown = "–" if default is None or default == () else f"`{default}`"
        about = one.about.replace("|", "\\|")
        lines.append(f"| `{one.variable}` | `{one.option}` | {shown} | {about} |")
    return "\n".join([*lines, ""])
