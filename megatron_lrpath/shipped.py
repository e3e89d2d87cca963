"""The example plans, Slurm recipes, settings and documents that the package includes: their location, and a
copy.
"""

from __future__ import annotations

from pathlib import Path

from megatron_lrpath.errors import UserError

FOLDERS = ("examples", "slurm")
ENDINGS = (".yaml", ".py", ".sh", ".example")


def shipped_folder(name: str) -> Path:
    """Return the folder `examples`, `slurm` or `docs`: inside an installed package, or next to the package in
    a checkout.
    """
    package = Path(__file__).resolve().parent
    return next(folder for folder in (package / name, package.parent / name) if folder.is_dir())


def shipped_files() -> dict[Path, Path]:
    """Return all shipped files by their path in a copy, such as `examples/paper/1.2b.yaml`."""
    found: dict[Path, Path] = {}
    for name in FOLDERS:
        folder = shipped_folder(name)
        files = (path for path in sorted(folder.rglob("*")) if path.suffix in ENDINGS and path.is_file())
        found |= {Path(name) / path.relative_to(folder): path for path in files}
    return found


def documents() -> dict[str, Path]:
    """Return the pages of the documents by their names without the suffix, the start page first."""
    pages = {path.stem: path for path in sorted(shipped_folder("docs").glob("*.md"))}
    return {"index": pages.pop("index"), **pages}


def site() -> Path:
    """Return the start page of the built site.

    Raises:
        UserError: the site has not been built.
    """
    page = Path(__file__).resolve().parent / "site" / "index.html"
    if not page.is_file():
        raise UserError("the site is not built; in a checkout: make docs. `lrpath docs` shows the pages here")
    return page
