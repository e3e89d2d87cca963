"""`lrpath docs`: the documents, in the terminal or as the built site."""

from __future__ import annotations

import argparse
from pathlib import Path

from megatron_lrpath.errors import UserError
from megatron_lrpath.wording import nearest

HELP = "show a page of the documents, or print the path of the site"
EXAMPLE = "lrpath docs plan-file   or   lrpath docs --site"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the page, and the option for the site's path."""
    parser.add_argument(
        "page", nargs="?", metavar="PAGE", help="a page, such as plan-file; none: list the pages"
    )
    parser.add_argument("--site", action="store_true", help="print the path of the built site's start page")


def execute(args: argparse.Namespace) -> int:
    """Print the list of pages, a page, or the path of the site; return 0."""
    from rich.console import Console
    from rich.markdown import Markdown

    from megatron_lrpath.shipped import documents, site

    if args.site:
        print(site())
        return 0
    pages = documents()
    if args.page is None:
        width = max(map(len, pages))
        for name, path in pages.items():
            print(f"{name:<{width}}  {title(path)}")
        return 0
    name = Path(args.page).name.removesuffix(".md")
    if name not in pages:
        raise UserError(
            f"there is no page {args.page!r}{nearest(name, pages)}; `lrpath docs` lists the pages"
        )
    console = Console()
    with console.pager(styles=True) if console.is_terminal else console:
        console.print(Markdown(pages[name].read_text(encoding="utf-8")))
    return 0


def title(path: Path) -> str:
    """Return the first heading of a page."""
    with path.open(encoding="utf-8") as lines:
        return next((line[2:].strip() for line in lines if line.startswith("# ")), "")
